"""Concurrent work on a GPU: a second stream that really overlaps, and no changed bit. Run by name, on a machine with one:

python -m pytest -m gpu tests/unit/common/engines/test_concurrent_cuda.py
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from engine_runs import differences, forcings, references

from fpforensics.common.config import parse_config
from fpforensics.common.engines import open_engine
from fpforensics.common.engines.base import Host
from fpforensics.common.engines.concurrent_work import Accompaniment, load_on
from fpforensics.common.engines.overlap import MIN_OVERLAP
from fpforensics.common.errors import OverlapError
from fpforensics.common.signals import CapturePlan, Sampling

torch = pytest.importorskip("torch", reason="pip install '.[hf]'")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")]

PLAN = CapturePlan(layers=("1", "2", "last"), prefill_positions=3, top_k=5)
GREEDY = Sampling(max_new_tokens=64)
SECONDS = 2.0


def spin(seconds: float = SECONDS) -> float:
    """Keep the thread's own stream busy with small products; returns products a second."""
    a = torch.randn(512, 512, device="cuda")
    count, until = 0, time.perf_counter() + seconds
    while time.perf_counter() < until:
        for _ in range(20):
            a = torch.nn.functional.normalize(a @ a)
        torch.cuda.current_stream().synchronize()
        count += 20
    return count / seconds


def test_about_half_of_the_gpu() -> None:
    beside = Accompaniment(load_on("cuda:0"))
    spin(0.2)
    alone = spin()
    with beside.running():
        together = spin()
    (work,) = beside.done
    assert (work.kind, work.dtype, work.workers) == ("cuda-stream", "bf16", 1)
    assert work.size in (8192, 4096)
    assert 0.4 <= work.overlap <= 0.75
    assert SECONDS <= work.seconds < SECONDS + 1
    assert together < 0.9 * alone  # the GPU was really shared


def test_a_gpu_that_idles_is_overlapped_alike() -> None:
    beside = Accompaniment(load_on("cuda:0"))
    with beside.running():
        time.sleep(1.0)
    assert 0.4 <= beside.done[0].overlap <= 0.6


def test_too_short_a_burst_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from fpforensics.common.engines.concurrent_cuda import StreamProducts

    monkeypatch.setattr(StreamProducts, "duty", 0.05)
    beside = Accompaniment(load_on("cuda:0"))
    with pytest.raises(OverlapError), beside.running():
        time.sleep(1.0)


def test_the_memory_is_given_back() -> None:
    beside = Accompaniment(load_on("cuda:0"))
    with beside.running():
        pass_through = torch.cuda.memory_allocated()
    first = torch.cuda.memory_allocated()
    reserved = torch.cuda.memory_reserved()
    for _ in range(3):
        with beside.running():
            torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == first < pass_through
    assert torch.cuda.memory_reserved() == reserved  # and taken again, not added to


@pytest.mark.parametrize("spec", ["attn=sdpa", "attn=eager", "attn=sdpa_flash,batch=2"])
def test_no_bit_changes(tiny_llama: Path, spec: str) -> None:
    given, host = references(), Host(device="cuda", models={"tiny": str(tiny_llama)})
    engine = open_engine(parse_config(f"model=tiny,{spec}"), host)
    alone = engine.generate(given, GREEDY, PLAN)
    engine.close()
    engine = open_engine(parse_config(f"model=tiny,{spec},concurrent=true"), host)
    try:
        beside = engine.generate(given, GREEDY, PLAN)
        replayed = engine.teacher_force(forcings(given, beside), PLAN, "decode")
        found = engine.facts().concurrent_work
    finally:
        engine.close()
    assert differences(alone, beside) == []
    assert differences(beside, replayed) == []
    assert len(found) == 2
    assert all(each.overlap >= MIN_OVERLAP for each in found)


def test_vllm(tmp_path: Path) -> None:
    """``pip install '.[vllm]'`` first; its GPU build is another one than its CPU build."""
    pytest.importorskip("vllm", reason="pip install '.[vllm]'")
    from vllm_runs import tiny

    from fpforensics.common.engines.remote import start_engine

    given, traces = references(2, length=40), []
    host = Host(device="cuda", models={"tiny": str(tiny(tmp_path, "llama"))})
    for spec in ("backend=vllm", "backend=vllm,concurrent=true"):
        with start_engine(parse_config(f"model=tiny,{spec}"), host) as engine:
            traces.append(engine.generate(given, GREEDY, PLAN))
            found = engine.facts().concurrent_work
    assert differences(*traces) == []
    assert [each.kind for each in found] == ["cuda-stream"]
