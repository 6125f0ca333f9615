"""Concurrent work on a CPU: it runs before what it accompanies and is gone after it, however that ends, and changes no bit."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_runs import differences, forcings, references

from fpforensics.common.config import parse_config
from fpforensics.common.engines import open_engine
from fpforensics.common.engines.base import ConcurrentWork, Engine, Host
from fpforensics.common.engines.concurrent_threads import ThreadProducts, worker_count
from fpforensics.common.engines.concurrent_work import Accompaniment, ThreadedLoad
from fpforensics.common.engines.overlap import MIN_OVERLAP, Burst
from fpforensics.common.engines.remote import start_engine
from fpforensics.common.errors import CancelledError, OverlapError, ReplayError
from fpforensics.common.signals import CapturePlan, Sampling

PLAN = CapturePlan(layers=("1", "2", "last"), prefill_positions=3, top_k=5)
GREEDY = Sampling(max_new_tokens=7)


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "concurrent-work"]


class Scripted(ThreadProducts):
    """Bursts at given times, by a clock of the test's own."""

    def __init__(self, bursts: list[Burst], moments: list[float]) -> None:
        super().__init__(size=2)
        self._bursts, self._moments = bursts, moments
        self.ran_out = threading.Event()

    def burst(self) -> Burst:
        if len(self._bursts) == 1:
            self.ran_out.set()
            return self._bursts[0]
        return self._bursts.pop(0)

    def now(self) -> float:
        assert self.ran_out.wait(30)
        return self._moments.pop(0)


def test_it_runs_before_and_is_gone_after() -> None:
    load = ThreadedLoad([ThreadProducts(seed, size=64) for seed in range(2)])
    beside = Accompaniment(load)
    with beside.running():
        assert len(workers()) == 2
        until = time.perf_counter() + 0.05
        while time.perf_counter() < until:
            np.ones(10).sum()
    assert workers() == []
    (work,) = beside.done
    assert (work.kind, work.size, work.dtype, work.workers) == ("threads", 64, "fp32", 2)
    assert work.overlap >= MIN_OVERLAP
    assert work.products > 2
    assert 0.05 <= work.seconds < 30
    assert 0 < work.outside_seconds < 30


@pytest.mark.parametrize("error", [CancelledError("stop"), KeyboardInterrupt(), OSError("the parent is gone")])
def test_it_is_gone_after_an_error(error: BaseException) -> None:
    beside = Accompaniment(ThreadedLoad([ThreadProducts(size=16)]))
    with pytest.raises(type(error)), beside.running():
        assert len(workers()) == 1
        raise error
    assert workers() == []
    assert beside.done == []


def test_what_was_measured_is_the_window_alone() -> None:
    bursts = [Burst(0.0, 2.0, 1), Burst(5.0, 6.0, 1), Burst(8.0, 30.0, 1)]
    beside = Accompaniment(
        ThreadedLoad([Scripted(bursts, [1.0, 11.0])]), clock=iter([100.0, 103.0, 110.0, 110.5]).__next__
    )
    with beside.running():
        pass
    (work,) = beside.done
    assert (work.seconds, work.overlap, work.busy) == (10.0, 0.5, 0.5)
    assert work.outside_seconds == 3.5


def test_too_little_beside_it_is_refused() -> None:
    beside = Accompaniment(ThreadedLoad([Scripted([Burst(0.0, 1.0, 1), Burst(9.0, 11.0, 1)], [0.0, 10.0])]))
    with pytest.raises(OverlapError, match=r"overlapped 20\.0% of the 10\.000 s"), beside.running():
        pass
    assert workers() == []
    assert beside.done == []


class Failing(ThreadProducts):
    """Fails while it prepares, in its first product, in a later one, or when its memory is freed."""

    def __init__(self, at: str) -> None:
        super().__init__(size=4)
        self._at, self._count = at, 0
        self.failed = threading.Event()

    def prepare(self) -> None:
        self._fail("prepare")
        super().prepare()

    def burst(self) -> Burst:
        self._count += 1
        self._fail("first" if self._count == 1 else "later")
        return super().burst()

    def free(self) -> None:
        self._fail("free")
        super().free()

    def _fail(self, here: str) -> None:
        if here == self._at:
            self.failed.set()
            raise RuntimeError("CUDA out of memory\nTried to allocate")


@pytest.mark.parametrize("at", ["prepare", "first", "later", "free"])
def test_work_that_fails_is_an_error_in_one_line(at: str) -> None:
    products = Failing(at)
    beside = Accompaniment(ThreadedLoad([ThreadProducts(size=4), products]))
    with pytest.raises(ReplayError) as failed, beside.running():
        assert at == "free" or products.failed.wait(30)
    assert (
        "concurrent=true: the work beside generation failed: RuntimeError: CUDA out of memory" in failed.value.message
    )
    assert "\n" not in failed.value.diagnostics()
    assert workers() == []
    assert beside.done == []


def test_half_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, expected in ((1, 1), (2, 1), (3, 1), (16, 8)):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, cores=cores: set(range(cores)), raising=False)
        assert worker_count() == expected


@contextmanager
def opened(path: Path, spec: str) -> Iterator[Engine]:
    engine = open_engine(parse_config(f"model=tiny,{spec}"), Host(device="cpu", models={"tiny": str(path)}))
    try:
        yield engine
    finally:
        engine.close()


@pytest.mark.parametrize("spec", ["attn=sdpa", "attn=eager,batch=2,matmul=fp32-rounded"])
def test_no_bit_of_an_engine_changes(tiny_llama: Path, spec: str) -> None:
    pytest.importorskip("transformers", reason="pip install '.[hf]'")
    given = references()
    with opened(tiny_llama, spec) as engine:
        alone = engine.generate(given, GREEDY, PLAN)
        assert engine.facts().concurrent_work == []
    with opened(tiny_llama, f"{spec},concurrent=true") as engine:
        beside = engine.generate(given, GREEDY, PLAN)
        replayed = engine.teacher_force(forcings(given, beside), PLAN, "decode")
        engine.teacher_force(forcings(given, beside), PLAN, "prefill")
        found = engine.facts().concurrent_work
    assert differences(alone, beside) == []
    assert differences(beside, replayed) == []
    assert len(found) == 3  # replays are accompanied too
    assert all(each.overlap >= MIN_OVERLAP and each.size == 512 for each in found)
    assert workers() == []


def test_a_change_would_be_seen(tiny_llama: Path) -> None:
    """The control of the test above: the same comparison tells two kernels apart."""
    pytest.importorskip("transformers", reason="pip install '.[hf]'")
    with opened(tiny_llama, "attn=sdpa") as ours, opened(tiny_llama, "attn=eager,concurrent=true") as theirs:
        assert differences(ours.generate(references(), GREEDY, PLAN), theirs.generate(references(), GREEDY, PLAN))


def test_an_abandoned_generation_leaves_nothing(tiny_llama: Path) -> None:
    pytest.importorskip("transformers", reason="pip install '.[hf]'")

    def cancel(_done: int, _total: int) -> None:
        raise CancelledError("stop")

    with opened(tiny_llama, "concurrent=true") as engine:
        with pytest.raises(CancelledError):
            engine.generate(references(), GREEDY, PLAN, cancel)
        assert workers() == []
        engine.generate(references(), GREEDY, PLAN)
        assert len(engine.facts().concurrent_work) == 1


def test_a_worker_tells_what_ran_beside_it(tiny_llama: Path) -> None:
    pytest.importorskip("transformers", reason="pip install '.[hf]'")
    host = Host(device="cpu", models={"tiny": str(tiny_llama)})
    with start_engine(parse_config("model=tiny,concurrent=true"), host) as engine:
        engine.generate(references(1), GREEDY, PLAN)
        (work,) = engine.facts().concurrent_work
    assert work.workers == worker_count()


def test_too_little_fails_across_the_wire(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine refuses its own generation, and the error keeps its kind on its way."""
    pytest.importorskip("transformers", reason="pip install '.[hf]'")
    from fpforensics.common.engines import wire

    def short(load: Any) -> ConcurrentWork:
        load.abandon()
        return ConcurrentWork(
            kind="threads", size=4, dtype="fp32", workers=1, products=1, seconds=1.0, overlap=0.1, busy=0.1, outside_seconds=0.0
        )  # fmt: skip

    monkeypatch.setattr(ThreadedLoad, "end", short)
    with opened(tiny_llama, "concurrent=true") as engine, pytest.raises(OverlapError) as refused:
        engine.generate(references(1), GREEDY, PLAN)
    assert isinstance(wire.Failed.of(refused.value).error(), OverlapError)
