"""Concurrent work on a CPU: products in NumPy's own loops, one core to a worker.

Not in BLAS: its pool of threads would take every core, and torch's is the one that is under test.
"""

from __future__ import annotations

import os
import time
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fpforensics.common.engines.overlap import Burst

SIZE = 512


def worker_count() -> int:
    """Half of the cores that this process may use, at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // 2)


class ThreadProducts:
    """``size`` × ``size`` products in float32, one after the other; a burst is one (about 60 ms on a core of 2.5 GHz)."""

    kind: Literal["cuda-stream", "threads"] = "threads"
    dtype = "fp32"
    duty = 1.0

    def __init__(self, seed: int = 0, size: int = SIZE) -> None:
        self._seed, self._size = seed, size
        self._factors: tuple[NDArray[np.float32], ...] = ()

    @property
    def size(self) -> int:
        """N of the N × N matrices."""
        return self._size

    def prepare(self) -> None:
        """Two factors and room for their product."""
        drawn = np.random.default_rng(self._seed).standard_normal((2, self._size, self._size), np.float32)
        self._factors = (drawn[0], drawn[1], np.empty_like(drawn[0]))

    def burst(self) -> Burst:
        """One product."""
        start = time.perf_counter()
        np.einsum("ij,kj->ik", self._factors[0], self._factors[1], out=self._factors[2])
        return Burst(start, time.perf_counter(), 1)

    def now(self) -> float:
        """What a CPU computes has been computed when it is asked."""
        return time.perf_counter()

    def free(self) -> None:
        """Forget the matrices."""
        self._factors = ()
