"""Files that hold no experiment, or hold one packed or damaged; and that none of them stays open."""

from __future__ import annotations

import gzip
import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lab_documents import Layout, make_document, write_document
from lab_problems import SMALL, changed, problem_of, read_everything, set_at
from synthetic import write_synthetic

from fpforensics.common.errors import Error, EvidenceError, UsageError
from fpforensics.common.lab import document, reader, text
from fpforensics.common.lab.reader import open_experiment


def test_gzip_is_recognized_by_its_bytes_not_its_name(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(gzip.compress(json.dumps(make_document(SMALL)).encode()))
    with open_experiment(path) as experiment:
        assert len(experiment.runs) == 4
        experiment.validate()


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = json.dumps(make_document(Layout(references=("ref_0",), layers=(1,), positions=(-1,), steps=1))).encode()
    path = tmp_path / "a.json"
    for length in range(1, len(whole), 7):
        path.write_bytes(whole[:length])
        assert "not JSON" in problem_of(path), length


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "a.json is empty: 0 bytes"),
        (b"hello", "the document: not JSON: invalid character (byte 0)"),
        (b"\0" * 100, "the document: not JSON: invalid character (byte 0)"),
        (b"\xef\xbb\xbf{}", "a.json is UTF-8 with a byte order mark"),
        ('{"runs": []}'.encode("utf-16"), "a.json is UTF-16"),
        (b"\xfe\xff" + '{"runs": []}'.encode("utf-16-be"), "a.json is UTF-16"),
        (b"\x83 but no bundle", "the document: not JSON: invalid character (byte 0)"),
        (b'{"runs": [{"config_id": "\xff\xfe"}]}', "the document: not UTF-8"),
        (b"[]", "the document: a list where object is expected"),
        (b"{}", "the document: 'experiment_metadata' is a required property"),
        (b'{"experiment_metadata": ' + b"[" * 5000, "the document: it nests too deeply"),
        (b'{"runs": [{"rep_id": ' + b"1" * 5000 + b"}]}", "runs[0].rep_id: Integer value out of range"),
    ],
)
def test_what_is_no_document_at_all(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    assert problem_of(tmp_path / "a.json") == says


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("missing.json", "no file"),
        ("folder/missing.json", "no file"),
        ("a\0b", "no file"),
        ("folder", r"folder is a folder \(name the files in it: .*folder/\*.json, with --summary for many\)"),
        ("pipe", "pipe is no regular file"),
    ],
)
def test_no_file_there(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError) as error:
        open_experiment(tmp_path / name)
    assert re.search(says, error.value.diagnostics()) and error.value.diagnostics().isprintable()


def test_a_bundle_is_called_one(tmp_path: Path) -> None:
    write_synthetic(tmp_path / "a.msgpack")
    with pytest.raises(UsageError, match=r"a.msgpack is a bundle") as error:
        open_experiment(tmp_path / "a.msgpack")
    assert "verifier export a.msgpack" in error.value.hint


BAD = {
    "no JSON": b"{",
    "unknown config": changed(set_at("runs", 0, "config_id", to="x")),
    "bad metadata": changed(set_at("experiment_metadata", "variable_tested", to=1)),
    "bad tokens": changed(set_at("runs", 0, "token_ids", to=[-1])),
    "a bundle": b"\x83\xa6format\xb4fpforensics-bundle/1",
}


@pytest.mark.parametrize("name", BAD)
def test_what_was_refused_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Even while its error, whose traceback has seen the map, is still at hand."""
    content = BAD[name]
    (tmp_path / "a.json").write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    maps = []

    def mapped(*arguments: Any) -> Any:
        maps.append(text.map_text(*arguments))
        return maps[0]

    monkeypatch.setattr(reader, "map_text", mapped)
    with pytest.raises(Error) as error:
        open_experiment(tmp_path / "a.json")
    assert maps[0].closed, error.value


def test_more_names_than_memory_bears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_document(make_document(Layout(references=("ref_0",), steps=0, hidden=0, keys=0)), tmp_path / "a.json")
    names = path.read_text().count('"') // 2
    monkeypatch.setattr(text, "MAX_NAMES", names)
    read_everything(path)
    monkeypatch.setattr(text, "MAX_NAMES", names - 1)
    assert problem_of(path) == f"the document: more than {names - 1} names"


def test_more_tokens_than_memory_bears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_document(changed(set_at("runs", 0, "token_ids", to=[10, 11, 12])), tmp_path / "a.json")
    monkeypatch.setattr(document, "MAX_TOKEN_BYTES", len("[10, 11, 12]"))
    read_everything(path)
    monkeypatch.setattr(document, "MAX_TOKEN_BYTES", len("[10, 11, 12]") - 1)
    assert problem_of(path) == "runs: more than 11 bytes of token_ids"


def test_the_same_contents_packed_or_not(tmp_path: Path) -> None:
    one = write_document(make_document(SMALL), tmp_path / "a.json")
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(one.read_bytes()))
    other = write_document(changed(set_at("runs", 0, "prompt_sha256", to="of ref_1")), tmp_path / "c.json")
    assert one.stat().st_size == other.stat().st_size
    with open_experiment(one) as a, open_experiment(tmp_path / "b.json.gz") as b, open_experiment(other) as c:
        assert a.same_contents(b)
        assert not a.same_contents(c)


def test_a_hostile_file_name_stays_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a\nb\x1b[31m.json"
    path.write_text("{}")
    problem_of(path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data[:5],
        lambda data: data[:2],
        lambda data: data[:2] + b"garbage" * 10,
        lambda data: data[:40] + bytes(byte ^ 0xFF for byte in data[40:60]) + data[60:],
        lambda data: data[:-8] + bytes(4) + data[-4:],  # the checksum
        lambda data: data + b"more",
    ],
)
def test_damaged_gzip(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(json.dumps(make_document(SMALL)).encode()))
    read_everything(path)
    path.write_bytes(damage(path.read_bytes()))
    assert "a.json.gz is damaged" in problem_of(path)


def test_gzip_of_garbage_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(b"garbage"))
    assert "not JSON" in problem_of(tmp_path / "a.json.gz")
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(b""))
    assert "is empty" in problem_of(tmp_path / "a.json.gz")


def test_a_gzip_bomb_stops_at_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "MAX_UNPACKED_BYTES", 1 << 20)
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(b" " * (4 << 20)))
    before = {each.name for each in Path(tempfile.gettempdir()).glob("fpforensics-*")}
    assert "unpacks to over" in problem_of(path)
    assert {each.name for each in Path(tempfile.gettempdir()).glob("fpforensics-*")} <= before


def test_an_error_comes_through_the_with_statement(tmp_path: Path) -> None:
    """What its traceback holds points into the mapped file: closing must not fail on that, and hide the error."""
    path = write_document(
        changed(set_at("runs", 3, "decode_steps", 0, "logprobs", "pos_-1", "log_probs", 0, to=None)),
        tmp_path / "a.json",
    )
    with pytest.raises(EvidenceError) as error, open_experiment(path) as experiment:
        experiment.validate()
    assert error.value.__context__ is None or isinstance(error.value.__context__, ValueError)
    with pytest.raises(KeyError), open_experiment(path) as experiment:
        raw = experiment._runs[0]
        raise KeyError(raw.config_id)
