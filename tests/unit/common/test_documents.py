"""Documents: what each file type gives, and the line that each bad input is told."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from fpforensics.common.documents import Message, read_documents
from fpforensics.common.errors import MissingDependencyError, UsageError


def write_pdf(path: Path, *pages: str) -> Path:
    """A PDF with one line of text a page, written by hand."""
    kids = " ".join(f"{3 + 2 * i} 0 R" for i in range(len(pages)))
    font = "<< /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >>"
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>"]
    for i, text in enumerate(pages):
        drawn = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET" if text else ""
        page = f"/Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Resources {font}"
        objects += [
            f"<< {page} /Contents {4 + 2 * i} 0 R >>",
            f"<< /Length {len(drawn)} >>\nstream\n{drawn}\nendstream",
        ]
    content, offsets = "%PDF-1.4\n", []
    for number, body in enumerate(objects, start=1):
        offsets.append(len(content))
        content += f"{number} 0 obj\n{body}\nendobj\n"
    table = "".join(f"{offset:010} 00000 n \n" for offset in offsets)
    size = len(objects) + 1
    start = len(content)
    content += f"xref\n0 {size}\n0000000000 65535 f \n{table}"
    content += f"trailer\n<< /Size {size} /Root 1 0 R >>\nstartxref\n{start}\n%%EOF\n"
    path.write_text(content)
    return path


def test_builtin_is_two_whole_books() -> None:
    alice, play = read_documents(["builtin"])
    assert alice.name == "alice_in_wonderland.txt"
    assert play.name == "as_you_like_it.txt"
    for document, begins, ends in (
        (alice, "ALICE'S ADVENTURES IN WONDERLAND\n", "THE END\n"),
        (play, "AS YOU LIKE IT\n", "[Exeunt]\n"),
    ):
        assert document.text.startswith(begins)
        assert document.text.endswith(ends)
        assert len(document.text) > 120_000
        assert not set(document.text) & set("\r\t\x1a")
    assert alice.text.count("\nCHAPTER ") == 12
    assert play.text.count("\nSCENE ") == 22


def test_text_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfplain\r\ntext \xe6\x9d\xb1")
    (tmp_path / "b.MD").write_text("# Title\n")
    first, second, third = read_documents([str(tmp_path / "b.MD"), str(tmp_path / "a.txt"), str(tmp_path / "a.txt")])
    assert (first.name, first.text) == ("b.MD", "# Title\n")
    assert second == third
    assert second.text == "plain\r\ntext 東"


def test_pdf(tmp_path: Path) -> None:
    (document,) = read_documents([str(write_pdf(tmp_path / "two.pdf", "First page.", "Second page."))])
    assert document.name == "two.pdf"
    assert document.text == "First page.\nSecond page."


def test_conversations(tmp_path: Path) -> None:
    lines = [
        {"messages": [{"role": "user", "content": "one\u2028still one"}], "id": 7},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "two"}]},
    ]
    file = tmp_path / "c.jsonl"
    file.write_text("\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n", encoding="utf-8")
    first, second = read_documents([str(file)])
    assert (first.name, first.messages) == ("c.jsonl:1", (Message("user", "one\u2028still one"),))
    assert (second.name, second.messages) == ("c.jsonl:3", (Message("system", "s"), Message("user", "two")))


GOOD_LINE = b'{"messages": [{"role": "user", "content": "x"}]}\n'


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("gone.txt", None, "no document at"),
        ("a.docx", b"x", "of unknown type"),
        ("a.txt", b"ab\xff", "not UTF-8 at byte 2"),
        ("a.txt", b" \n", "is empty"),
        ("a.pdf", b"not a pdf", "cannot read PDF"),
        ("a.pdf", b"", "cannot read PDF"),
        ("a.jsonl", b"\n\n", "is empty"),
        ("a.jsonl", GOOD_LINE + b"{", "line 2: "),
        ("a.jsonl", GOOD_LINE + b'\n{"messages": []}', "line 3: the conversation has no messages"),
        ("a.jsonl", b'{"message": []}', "line 1: "),
        ("a.jsonl", b'{"messages": [{"role": "usr", "content": "x"}]}', "usr"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": ["x"]}]}', r"\$.messages\[0\].content"),
        ("a.jsonl", b'{"messages": [{"role": "assistant", "content": "x"}]}', "line 1: .*assistant's own"),
        ("a.jsonl", b"[" * 100_000, "line 1: "),
        ("a.jsonl", b"\xff", "not UTF-8"),
        ("x" * 300 + ".txt", None, "no document at"),
    ],
)
def test_bad_documents(tmp_path: Path, name: str, content: bytes | None, says: str) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError, match=says) as caught:
        read_documents([str(file)])
    assert "\n" not in caught.value.diagnostics()


def test_pdf_without_text(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no extractable text"):
        read_documents([str(write_pdf(tmp_path / "scan.pdf", ""))])


def test_near_miss_of_builtin_and_no_documents() -> None:
    with pytest.raises(UsageError) as caught:
        read_documents(["bultin"])
    assert "did you mean 'builtin'?" in caught.value.diagnostics()
    with pytest.raises(UsageError, match="no documents were given"):
        read_documents([])


def test_folder_is_no_document(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no document at"):
        read_documents([str(tmp_path)])


def test_pdf_without_pypdf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_pdf(tmp_path / "a.pdf", "text")
    monkeypatch.setitem(sys.modules, "pypdf", None)
    with pytest.raises(MissingDependencyError) as caught:
        read_documents([str(file)])
    assert "pip install '.[pdf]'" in caught.value.hint
