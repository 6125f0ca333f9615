"""The scripts of bench/ on suites: what they count, and that runs which differ are told from runs that do not."""

from __future__ import annotations

import fcntl
import gzip
import json
import math
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from bench_modules import bench_module
from fake_engine import WORK, FakeEngine, starter
from page_parser import Page
from suite_world import Starts, make, run

from fpforensics.verifier.suite.folder import Folder
from fpforensics.verifier.suite.journal import Entry, Journal, read_journal

bench, same, kills = bench_module("suite"), bench_module("suite_same"), bench_module("suite_kills")

OTHER_TIMES = {"products": 4, "seconds": 0.625, "overlap": 0.5, "busy": 0.5, "outside_seconds": 1e-6}


def beside(**changes: Any) -> Starts:
    """Starts engines that say that this ran beside each generation, unlike what others say."""
    return Starts(engine=starter(partial(FakeEngine, work=msgspec.structs.replace(WORK, **changes))))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """Two runs of one suite, each with its own times, keys and challenges, and other times of its concurrent work."""
    folder = tmp_path_factory.mktemp("two")
    run(make(folder / "one", tiny))
    run(make(folder / "other", tiny, start=beside(**OTHER_TIMES)))
    return folder


def test_runs_of_one_suite_are_the_same(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(same.differences(two / "one", two / "other")) == []
    assert kills.report(two / "one", two / "other") == 0
    said = capsys.readouterr().out
    assert "4 bundles of them tensor by tensor, 4 replays; not local.key, local.key.pub" in said
    assert "may differ in bundles/*.msgpack: created_at, nonce, session_id" in said


def test_other_times_of_concurrent_work_are_no_difference(two: Path) -> None:
    """The two runs do differ in them, wherever they stand."""
    one, other = (json.loads((two / name / "experiments.json").read_text()) for name in ("one", "other"))
    found = {line.split(":")[0].rpartition("/")[2] for line in same.unequal(one, other, ())}
    assert found >= set(OTHER_TIMES)
    assert "50 %, 50 %" in Page((two / "other" / "report.html").read_text()).text
    assert "50 %, 50 %" not in Page((two / "one" / "report.html").read_text()).text


def test_other_concurrent_work_is_a_difference(two: Path, tiny: Path) -> None:
    run(make(two / "larger", tiny, start=beside(size=16)))
    found = list(same.differences(two / "one", two / "larger"))
    assert found == [
        f"{file}/{repetition}/size: 8 and 16"
        for file in (
            "bundles/local.concurrent=true.msgpack: rows/0/facts/concurrent_work",
            "experiments.json: 3/forensics/0/work",
        )
        for repetition in range(2)
    ]


def edit(name: str, old: str, new: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return act


def another_distance(folder: Path) -> None:
    path = folder / "replays" / "attn=eager.json"
    content = json.loads(path.read_text())
    measured = content["claimed"]["local.baseline"]["distances"]["ref_0"]
    measured[-1]["value"] = math.nextafter(measured[-1]["value"], math.inf)
    path.write_text(json.dumps(content))


def another_bundle(folder: Path) -> None:
    bundles = folder / "bundles"
    shutil.copy(bundles / "local.attn=eager.msgpack", bundles / "local.baseline.msgpack")


def done_twice(folder: Path) -> None:
    with Journal(folder / "journal.jsonl") as journal:
        journal.add(Entry(event="finished", job="local.baseline"))


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (
            edit("summary.json", '"baseline_l2": null', '"baseline_l2": 0.5'),
            "summary.json: 0/baseline_l2: null and 0.5",
        ),
        (edit("attention_experiment.json", "local_attn=eager", "local_attn=other"), "attention_experiment.json: "),
        (edit("suite.json", '"repetitions": 2', '"repetitions": 3'), "suite.json: suite/repetitions: 2 and 3"),
        (edit("report.html", "Summary", "Summery"), "report.html: the pages differ beyond their times"),
        (
            edit("experiments.json", '"numbers": "UNTOUCHED"', '"numbers": "CHANGED"'),
            'experiments.json: 3/forensics/0/numbers: "UNTOUCHED" and "CHANGED"',
        ),
        (edit("report.html", "UNTOUCHED: bit", "CHANGED: bit"), "report.html: the pages differ beyond their times"),
        (another_distance, "replays/attn=eager.json: claimed/local.baseline/distances/ref_0/"),
        (another_bundle, "bundles/local.baseline.msgpack: prefill hidden_states/1 of ref_0 differs"),
        (lambda folder: (folder / "replays" / "baseline.json").unlink(), "replays/baseline.json: only in"),
        (done_twice, "journal.jsonl: local.baseline finished 2 times"),
    ],
)
def test_what_differs_is_found(two: Path, tmp_path: Path, act: Callable[[Path], None], said: str) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(two / "other", changed)
    assert list(same.differences(two / "one", changed)) == []
    act(changed)
    assert any(line.startswith(said) for line in same.differences(two / "one", changed))


def test_moments() -> None:
    waits = kills.moments(100.0, 5, seed=7)
    assert waits == kills.moments(100.0, 5, seed=7)
    assert waits != kills.moments(100.0, 5, seed=8)
    assert len(waits) == 5
    assert all(each >= 0 for each in waits)
    assert sum(waits) <= 95.0


def test_a_process_group_is_killed(tmp_path: Path) -> None:
    """The child of what is killed holds a lock until it ends, too."""
    lock = tmp_path / "lock"
    child = f"import fcntl, time; fcntl.flock(open({str(lock)!r}, 'w'), fcntl.LOCK_EX); time.sleep(600)"
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert not kills.ended_within([sys.executable, "-c", script], 3.0)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
    assert kills.ended_within([sys.executable, "-c", "pass"], 60.0)
    with pytest.raises(SystemExit, match="ended by itself with 3"):
        kills.ended_within([sys.executable, "-c", "raise SystemExit(3)"], 60.0)


def test_parts(two: Path) -> None:
    folder = Folder(two / "one")
    suite, entries = folder.load().suite, read_journal(folder.journal)
    sessions, replays = bench.parts(suite, entries)
    # Three configs once and one with a reload; each of the four once to replay.
    assert (sessions.finished, sessions.loads, sessions.least, sessions.refused) == (4, 5, 5, 0)
    assert (replays.finished, replays.loads, replays.least, replays.refused) == (4, 4, 4, 0)
    assert 0 < sessions.load_seconds < sessions.seconds
    assert 0 < replays.load_seconds < replays.seconds
    whole = sessions.seconds + replays.seconds
    assert bench.overhead(whole * 1.25, sessions, replays) == pytest.approx(0.25)
    more = [*entries, Entry(event="failed", job="local.ep=2", loads=1, load_seconds=5.0)]
    refusing, _ = bench.parts(suite, more)
    assert (refusing.refused, refusing.loads) == (1, 5)
    assert refusing.seconds == pytest.approx(sessions.seconds + 5.0)
    wasteful = [*entries, Entry(event="finished", job="local.baseline", loads=2)]
    assert bench.parts(suite, wasteful)[0].loads == 6


def test_one_table_over_folders(two: Path, tmp_path: Path) -> None:
    standing = bench_module("suite_table")
    columns = {name: list(standing.pairs(two / name)) for name in ("one", "other")}
    numbers = [[(*row[:2], row[2].partition(", time ")[0]) for row in column] for column in columns.values()]
    assert numbers[0] == numbers[1]
    for name in ("experiments.json", "analysis_reports.json"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((two / "one" / name).read_bytes()))
    assert list(standing.pairs(tmp_path)) == columns["one"]
    found = {config: said for _, config, said in columns["one"]}
    sessions, *decisions = found["attn=eager"].split("; ")
    assert float(sessions.removeprefix("sessions ").partition(", ")[0]) > 0
    assert [each.split()[-1] for each in decisions] == ["DETECTABLE", "DETECTABLE"]
    assert found["concurrent=true"].startswith("sessions equal; numbers UNTOUCHED, time ")
    head, rule, *rows = standing.table({"one": columns["one"], "other": columns["other"][:1]})
    assert {line.count("|") for line in (head, rule, *rows)} == {6}
    assert rows[-1].endswith("| — |")
    with pytest.raises(SystemExit, match="holds a config twice"):
        list(standing.table({"both": columns["one"] + columns["other"]}))


def test_sessions_that_differ_at_generated_positions_alone_are_not_equal(two: Path, tmp_path: Path) -> None:
    standing = bench_module("suite_table")
    for name in ("experiments.json", "analysis_reports.json"):
        shutil.copy(two / "one" / name, tmp_path)
    path = tmp_path / "analysis_reports.json"
    reports = json.loads(path.read_text())
    found = reports["concurrent_streams"]["decode"]["hidden_states"]
    found["matrix"] = [[0.0, 0.5], [0.5, 0.0]]
    path.write_text(json.dumps(reports))
    said = {config: said for _, config, said in standing.pairs(tmp_path)}["concurrent=true"]
    assert said.startswith("sessions 0, 0; one replay; numbers UNTOUCHED")
    found["diverged"] = [{"configs": found["configs"][::-1], "reference": "ref_0", "step": 1}]
    reports["concurrent_streams"]["decode"]["logprobs"]["diverged"] = found["diverged"]
    del reports["attention"]
    path.write_text(json.dumps(reports))
    rows = {config: said for _, config, said in standing.pairs(tmp_path)}
    assert rows["concurrent=true"].startswith("sessions 0, tokens differ; ")
    assert rows["attn=eager"].startswith("sessions not analyzed, not analyzed; ")


def test_rows_of_one_experiment_stand_together() -> None:
    standing = bench_module("suite_table")
    rows = list(standing.table({"a": [("x", "1", "p"), ("y", "1", "q")], "b": [("x", "2", "r")]}))[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| x", "| x", "| y"]
    assert [row.split(" | ")[-2:] for row in rows] == [["p", "— |"], ["—", "r |"], ["q", "— |"]]


def test_the_results_hold_their_table() -> None:
    standing = bench_module("suite_table")
    root = Path(__file__).parents[4]
    results = root / "examples" / "results"
    columns = {
        "H100, replayed on a CPU": ["h100-on-cpu"],
        "CPU, replayed on an H100": ["cpu-on-h100"],
        "two H200 under vLLM, replayed on a CPU": ["two-h200-kernels", "two-h200-ranks"],
    }
    rows = {
        name: [row for folder in folders for row in standing.pairs(results / folder)]
        for name, folders in columns.items()
    }
    printed = list(standing.table(rows))
    assert len(printed) == 24
    assert "\n\n" + "\n".join(printed) + "\n\n" in (results / "README.md").read_text()
