"""What tests of the vLLM engine share: tiny checkpoints that its CPU kernels take, and engines opened in this process."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tiny_models import Kind, make_tiny_model

from fpforensics.common.config import parse_config
from fpforensics.common.engines import open_engine
from fpforensics.common.engines.base import Engine, Host
from fpforensics.common.signals import PHASES, CapturePlan, Sampling, Trace

PLAN = CapturePlan(layers=("1", "2", "4", "12", "last"), prefill_positions=5, top_k=8)
GREEDY = Sampling(max_new_tokens=9)
HEAD = 32  # the narrowest head that vLLM's attention for CPUs takes


def tiny(folder: Path, kind: Kind) -> Path:
    """The tiny checkpoint of ``kind`` in ``folder``, made once."""
    path = folder / kind
    return path if path.exists() else make_tiny_model(path, kind, head_dim=HEAD)


@contextmanager
def opened(path: Path, spec: str) -> Iterator[Engine]:
    """An engine in this process."""
    # vLLM collects garbage several times an engine: what is imported by now is not walked each time.
    gc.collect()
    gc.freeze()
    engine = open_engine(parse_config(f"model=tiny,{spec}"), Host(device="cpu", models={"tiny": str(path)}))
    try:
        yield engine
    finally:
        engine.close()


def relative_gap(left: Trace, right: Trace) -> dict[str, float]:
    """For each kind of signal, the largest distance of two rows (L2) over the length of the second; ids must agree."""
    worst: dict[str, float] = {}
    for phase in PHASES:
        ours, theirs = left.phase(phase).tensors(), right.phase(phase).tensors()
        assert ours.keys() == theirs.keys()
        for name, rows in ours.items():
            if name in ("positions", "logprob_ids"):
                assert np.array_equal(rows, theirs[name]), (phase, name)
                continue
            wide, other = (np.atleast_2d(each.astype(np.float64).T).T for each in (rows, theirs[name]))
            gap = np.linalg.norm(wide - other, axis=1) / np.linalg.norm(other, axis=1)
            kind = name.partition("/")[0]
            worst[kind] = max(worst.get(kind, 0.0), float(gap.max()))
    return worst
