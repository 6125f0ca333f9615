"""What tests of engines share: seeded references, the forcing that replays a trace, and the bits of two traces compared."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fpforensics.common.signals import PHASES, Array, Forcing, Reference, Trace, first_divergence

VOCAB = 512


def references(count: int = 2, length: int = 24, seed: int = 0) -> list[Reference]:
    """``count`` references of seeded random token ids, each one token longer than the one before."""
    rng = np.random.default_rng(seed)
    return [Reference(f"ref_{i}", rng.integers(0, VOCAB, length + i).astype(np.int32)) for i in range(count)]


def forcings(originals: Sequence[Reference], traces: Sequence[Trace]) -> list[Forcing]:
    """What replays ``traces``: their tokens, their positions, their ids."""
    return [
        Forcing(
            reference,
            trace.output_ids,
            {phase: trace.phase(phase).positions for phase in PHASES},
            {phase: trace.phase(phase).logprob_ids for phase in PHASES},
        )
        for reference, trace in zip(originals, traces, strict=True)
    ]


def differences(left: Sequence[Trace], right: Sequence[Trace]) -> list[str]:
    """The first divergence of each pair of traces that is not bit-identical."""
    found = [first_divergence(a, b) for a, b in zip(left, right, strict=True)]
    return [str(divergence) for divergence in found if divergence is not None]


def largest_gap(left: Array, right: Array) -> float:
    """The largest absolute difference of two arrays of any float dtype."""
    return float(np.abs(left.astype(np.float64) - right.astype(np.float64)).max())
