"""A suite from the command line to its files: real workers, a real architecture, and numbers that analyze gives again."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner
from small_suite import CONCURRENT, write_suite

from fpforensics.common.errors import UsageError
from fpforensics.verifier.cli.analyze import analyze
from fpforensics.verifier.cli.suite import suite


def verifier(*arguments: object) -> str:
    program = "from fpforensics.verifier.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def analyzed(*arguments: object) -> str:
    done = CliRunner().invoke(analyze, [*map(str, arguments), "--top", "10", "--json", "-q"])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_suite(tmp_path: Path) -> None:
    write_suite(tmp_path, CONCURRENT)
    out = tmp_path / "out"
    checked = json.loads(
        verifier(
            "suite", "check", tmp_path / "small.toml", "--model-path", f"tiny={tmp_path / 'model'}", "-q", "--json"
        )
    )
    assert checked["ready"]
    checks = {(each["check"], each["status"]) for each in checked["findings"]}
    assert {("model loads", "passed"), ("signals and shapes", "passed"), ("repetitions bit-exact", "passed")} <= checks
    assert {
        ("experiment JSON", "passed"),
        ("prompts exact", "passed"),
        ("would be skipped", "not_applicable"),
    } <= checks
    said = verifier(
        "suite", "run", tmp_path / "small.toml", "-o", out, "--model-path", f"tiny={tmp_path / 'model'}", "-q"
    )
    states = dict(re.findall(r"^(\w+) +(\d of \d configs)$", said, flags=re.MULTILINE))
    assert states == {
        "attention": "2 of 2 configs",
        "expert_parallel": "1 of 2 configs",
        "concurrent_streams": "2 of 2 configs",
    }
    assert "skipped: here.ep=2" in said
    assert "3 signed bundles" in said
    assert (out / "report.html").read_text().startswith("<!doctype html>")
    # The suite's own numbers are those that analyze gives for its file.
    again = json.loads(analyzed(out / "attention_experiment.json"))
    assert again == json.loads((out / "analysis_reports.json").read_text())["attention"]
    summary = [row for row in json.loads((out / "summary.json").read_text()) if row["experiment"] == "attention"]
    table = json.loads(analyzed("--summary", out / "attention_experiment.json"))
    assert [row | {"file": ""} for row in table] == [row | {"file": ""} for row in summary]
    # On the prover's own machine a replay of the same config has the same bits, one of another has not.
    (attention, _, concurrent) = json.loads((out / "experiments.json").read_text())
    (keys,) = [
        each
        for each in attention["matrices"]["here"]
        if (each["phase"], each["signal"], each["layer"]) == ("decode", "key_vectors", "last")
    ]
    assert [keys["aggregate"][0][0], keys["aggregate"][1][1]] == [0.0, 0.0]
    assert keys["aggregate"][0][1] > 0
    # Other products beside it took time and changed no bit, which a replay beside others has again.
    (found,) = concurrent["forensics"]
    assert (found["numbers"], set(found["distances"].values())) == ("UNTOUCHED", {0.0})
    assert [each["overlap"] >= 0.3 for each in found["work"]] == [True, True]
    assert found["time"] in ("SLOWER", "NOT_SLOWER", "UNRESOLVED")
    assert "here_concurrent=true: numbers UNTOUCHED (bit-identical); time" in said
    assert {value for each in concurrent["matrices"]["here"] for row in each["aggregate"] for value in row} == {0.0}
    before = (out / "journal.jsonl").read_bytes()
    assert CliRunner().invoke(suite, ["resume", str(out), "-q"]).exit_code == 0
    assert (out / "journal.jsonl").read_bytes() == before
    # All that can be is replayed, and only what was skipped is tried again; in another way it is not replayed into the same folder.
    assert CliRunner().invoke(suite, ["replay", str(out), "-q"]).exit_code == 0
    added = (out / "journal.jsonl").read_bytes().removeprefix(before).splitlines()
    assert {(each["event"], each["job"]) for each in map(json.loads, added)} == {
        ("started", "replay:ep=2"),
        ("skipped", "replay:ep=2"),
    }
    refused = CliRunner().invoke(suite, ["replay", str(out), "-q", "--mode", "prefill"])
    assert isinstance(refused.exception, UsageError)
