"""Numbers and time under concurrent work: an honest run, one whose numbers it changes, and one beside which too little ran."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_engine import WORK, FakeEngine, disturbed_engine, starter
from page_parser import Page
from suite_world import TOML, Starts, make, opened, run
from synthetic import Size, trace

from fpforensics.common.errors import OverlapError
from fpforensics.verifier.suite.forensics import TOLERANCE, judge_numbers, judge_time
from fpforensics.verifier.suite.journal import read_journal
from fpforensics.verifier.suite.suite import render_states


def forensics(folder: Path) -> dict[str, Any]:
    experiments = {each["name"]: each for each in json.loads((folder / "experiments.json").read_text())}
    assert all(each["forensics"] == [] for name, each in experiments.items() if name != "concurrent_streams")
    (found,) = experiments["concurrent_streams"]["forensics"]
    assert isinstance(found, dict)
    return found


def test_equal_traces_are_untouched() -> None:
    ours = [trace(Size(references=2), 0, reference) for reference in range(2)]
    again = [trace(Size(references=2), 0, reference) for reference in range(2)]
    assert judge_numbers(ours, again) == ("UNTOUCHED", "")


@pytest.mark.parametrize("name", ["logprobs", "chosen_logprobs", "hidden_states", "key_vectors", "logprob_ids"])
def test_one_bit_is_a_change(name: str) -> None:
    size = Size(references=2)
    ours = [trace(size, 0, reference) for reference in range(2)]
    changed = ours[1].decode
    rows = getattr(changed, name)
    last = rows[max(rows)] if isinstance(rows, dict) else rows
    bits = last.copy()
    bits.view(np.uint8).reshape(-1)[0] ^= 1
    value = {**rows, max(rows): bits} if isinstance(rows, dict) else bits
    theirs = [ours[0], replace(ours[1], decode=replace(changed, **{name: value}))]
    verdict, where = judge_numbers(ours, theirs)
    assert verdict == "CHANGED"
    assert where.startswith("ref_1, decode, position ")
    assert name in where


def test_another_token_is_a_change() -> None:
    ours = trace(Size(), 0, 0)
    other = replace(ours, output_ids=np.append(ours.output_ids[:-1], ours.output_ids[-1] + 1).astype(np.int32))
    verdict, where = judge_numbers([ours], [other])
    assert (verdict, "output_ids" in where) == ("CHANGED", True)


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((1.2, 1.9), "SLOWER"),
        ((1.001, 1.01), "SLOWER"),
        ((1.0, 1.2), "UNRESOLVED"),
        ((0.9, 1.2), "UNRESOLVED"),
        ((0.9, 1 + TOLERANCE), "NOT_SLOWER"),
        ((0.5, 0.7), "NOT_SLOWER"),
        (None, "UNRESOLVED"),
    ],
)
def test_time(interval: tuple[float, float] | None, verdict: str) -> None:
    assert judge_time(interval) == verdict


def test_honest_work_leaves_the_numbers(unbroken: Path) -> None:
    found = forensics(unbroken)
    assert found["config"] == "local_concurrent=true"
    assert (found["numbers"], found["first_difference"]) == ("UNTOUCHED", "")
    assert set(found["distances"].values()) == {0.0}
    assert len(found["distances"]) == 6
    assert [each["overlap"] for each in found["work"]] == [WORK.overlap] * 2
    assert found["time"] == judge_time(found["interval"] and tuple(found["interval"]))
    page = Page((unbroken / "report.html").read_text())
    assert "Numbers and time under concurrent work" in page.text
    assert "UNTOUCHED: bit-identical" in page.text
    assert "75 %, 75 %" in page.text


def test_work_that_changes_the_numbers_is_caught(tiny: Path, tmp_path: Path) -> None:
    written = run(make(tmp_path / "run", tiny, start=Starts(engine=disturbed_engine)))
    found = forensics(tmp_path / "run")
    assert found["numbers"] == "CHANGED"
    assert re.match(r"ref_0, prefill, position \d+, ", found["first_difference"])
    assert found["distances"]["prefill/hidden_states"] > 0
    said = render_states(written)
    assert "local_concurrent=true: numbers CHANGED (first: ref_0, prefill" in said
    assert "overlap 75%, 75%" in said


def test_numbers_that_no_longer_repeat_are_changed(tiny: Path, tmp_path: Path) -> None:
    drifting = starter(lambda config, host: FakeEngine(config, host, drift=1000 if config.concurrent_work else 0))
    toml = TOML.replace('["concurrent=true"]', '["concurrent=true"]\nnondeterministic = true')
    run(make(tmp_path / "run", tiny, toml, start=Starts(engine=drifting)))
    found = forensics(tmp_path / "run")
    assert found["numbers"] == "CHANGED"
    assert found["first_difference"].startswith("its own repetitions differ, ref_0, prefill")


def test_a_worker_for_each_repetition(tiny: Path, tmp_path: Path) -> None:
    """With ``reload`` each repetition has a bundle of its own, of which the last is kept: what ran beside each is noted."""
    toml = TOML.replace('["concurrent=true"]', '["concurrent=true"]\nreload = true')
    run(make(tmp_path / "run", tiny, toml))
    found = forensics(tmp_path / "run")
    assert len(found["work"]) == 2
    # The baseline's repetitions share a worker: what is slower about the others is not the concurrent work alone.
    assert (found["numbers"], found["time"]) == ("UNTOUCHED", "UNRESOLVED")


def test_only_a_change_of_concurrent_work_is_judged(tiny: Path, tmp_path: Path) -> None:
    toml = TOML.replace('["concurrent=true"]', '["concurrent=true", "concurrent=true,attn=sdpa_math"]')
    run(make(tmp_path / "run", tiny, toml))
    assert forensics(tmp_path / "run")["config"] == "local_concurrent=true"


def test_too_little_beside_it_is_no_result(tiny: Path, tmp_path: Path) -> None:
    class Idle(FakeEngine):
        def generate(self, references: Any, sampling: Any, capture: Any, progress: Any = None) -> Any:
            super().generate(references, sampling, capture, progress)
            raise OverlapError("concurrent=true: the work beside it overlapped 12.0% of the 0.500 s", "more tokens")

    idle = starter(lambda config, host: (Idle if config.concurrent_work else FakeEngine)(config, host))
    folder = tmp_path / "run"
    run(make(folder, tiny, start=Starts(engine=idle)))
    ended = {each.job: each for each in read_journal(folder / "journal.jsonl")}
    assert ended["local.concurrent=true"].event == "failed"
    assert "overlapped 12.0%" in ended["local.concurrent=true"].reason
    assert not (folder / "bundles" / "local.concurrent=true.msgpack").exists()
    assert "overlapped 12.0%" in (folder / "report.html").read_text()
    run(opened(folder))  # another try, as for all work that failed
    assert forensics(folder)["numbers"] == "UNTOUCHED"


def test_work_that_nobody_measured_is_no_result(tiny: Path, tmp_path: Path) -> None:
    class Silent(FakeEngine):
        def facts(self) -> Any:
            self._work.clear()
            return super().facts()

    run(make(tmp_path / "run", tiny, start=Starts(engine=starter(Silent))))
    ended = {each.job: each for each in read_journal(tmp_path / "run" / "journal.jsonl")}
    assert ended["local.concurrent=true"].event == "failed"
    assert "the engine measured 0 of 1 repetition" in ended["local.concurrent=true"].reason
