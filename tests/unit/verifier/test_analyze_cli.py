"""``verifier analyze`` as a user runs it: what is printed where, and the exit code."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lab_documents import Layout, make_document, write_document
from synthetic import write_synthetic

from fpforensics.verifier.cli import main

TWO_MACHINES = (("a_1", "A100", 1), ("a_2", "A100", 2), ("h_1", "H100", 1), ("h_2", "H100", 2))
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def analyze(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs the command in an empty folder; returns its exit code, output and errors."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["verifier", "analyze", *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return int(left.value.code or 0), out, err

    return run


def written(name: str, layout: Layout | None = None, **metadata: Any) -> str:
    document = make_document(layout or Layout())
    document["experiment_metadata"] |= metadata
    write_document(document, Path(name))
    return name


def test_json_is_keyed_by_phase_then_signal_and_by_nothing_else(analyze: Run) -> None:
    code, out, err = analyze(written("a.json"), "--json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    signals = {"logprobs", "key_vectors", "hidden_states"}
    assert {phase: set(cells) for phase, cells in found.items()} == {"prefill": signals, "decode": signals}
    about = found["decode"]["key_vectors"]["about"]
    assert about["claimed"] == {"file": "a.json", "model": "none", "hardware": ["H100"]}
    assert (about["observed"], about["canonical"], about["top"]) == (None, "claimed", 5)


def test_a_bad_file_is_a_row_and_the_others_are_still_summed_up(analyze: Run) -> None:
    written("good.json", Layout(TWO_MACHINES))
    Path("bad.json").write_text("{")
    written("nan.json")
    Path("nan.json").write_text(Path("nan.json").read_text().replace('"log_probs": [', '"log_probs": [NaN, ', 1))
    code, out, err = analyze("--summary", "bad.json", "nan.json", "good.json")
    rows = [line for line in out.splitlines() if ".json " in line]
    assert code == 4
    assert [row.split()[0] for row in rows] == ["bad.json", "nan.json", *["good.json"] * 6]
    assert rows[0].endswith("error: the document: not JSON: it ends too early (in bad.json)")
    assert "NaN is not a number" in rows[1]
    assert all("A100, H100" in row and "made_up" in row for row in rows[2:])
    assert [line.partition(":")[2].split(":")[0].strip() for line in err.splitlines()] == ["bad.json", "nan.json"]
    code, out, _ = analyze("--summary", "--json", "bad.json", "good.json")
    bad, *good = json.loads(out)
    assert code == 4 and bad["file"] == "bad.json" and "ends too early" in bad["error"] and bad["snr"] is None
    assert {(row["file"], tuple(row["hardware"]), row["error"]) for row in good} == {
        ("good.json", ("A100", "H100"), "")
    }
    assert analyze("--summary", "good.json")[0] == 0
    assert analyze("--summary", "good.json", "missing.json")[0] == 2


def test_two_files_of_two_variables_are_a_usage_error(analyze: Run) -> None:
    code, out, err = analyze(written("a.json"), "--observed", written("b.json", variable_tested="other"))
    assert (code, out) == (2, "")
    assert err.startswith("error: a.json tests 'value' and b.json tests 'other' (") and err.count("\n") == 1


def test_a_file_against_itself_is_warned_of_on_stderr(analyze: Run) -> None:
    code, out, err = analyze(written("a.json"), "--observed", "a.json", "--json")
    assert code == 0 and json.loads(out)
    assert err.startswith("warning: a.json: the same contents as claimed and as observed")
    assert analyze("a.json", "--observed", written("b.json", Layout(seed=1)), "--json")[2] == ""


@pytest.mark.parametrize(
    ("file", "code", "says"),
    [
        (".", 2, ". is a folder (name the files in it: ./*.json, with --summary for many)"),
        ("missing.json", 2, "no file missing.json"),
        ("a.msgpack", 2, "a.msgpack is a bundle, not an experiment (write one from it: verifier export a.msgpack"),
        ("bom.json", 4, "bom.json is UTF-8 with a byte order mark (save it as UTF-8 without a byte order mark)"),
        ("empty.json", 4, "empty.json is empty: 0 bytes"),
    ],
)
def test_what_is_no_experiment_is_called_by_its_name(analyze: Run, file: str, code: int, says: str) -> None:
    write_synthetic(Path("a.msgpack"))
    Path("bom.json").write_text(Path(written("a.json")).read_text(), encoding="utf-8-sig")
    Path("empty.json").touch()
    left, out, err = analyze(file)
    assert (left, out) == (code, "")
    assert err.startswith(f"error: {says}") and err.count("\n") == 1
