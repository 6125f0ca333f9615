"""How far repetitions of one config lie apart, where they are not bit-identical."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from fpforensics.common.signals import PHASES, Array, Trace


def widen(noise: dict[str, float], first: Sequence[Trace], again: Sequence[Trace]) -> None:
    """Raise ``noise[phase/tensor]`` to the mean L2 distance between two repetitions where it is larger.

    Only references whose tokens agree are compared: after a diverging token the inputs differ, not the arithmetic.
    """
    for (a, b), phase in itertools.product(zip(first, again, strict=True), PHASES):
        if phase == "decode" and not np.array_equal(a.output_ids, b.output_ids):
            continue
        left, right = a.phase(phase).tensors(), b.phase(phase).tensors()
        for name in left:
            if name in ("positions", "logprob_ids", "logits") or not len(left[name]):
                continue
            ours, theirs = left[name], right[name]
            if name == "logprobs":
                ours, theirs = _at_same_ids(left, right)
                if not len(ours):
                    continue
            gap = (ours.astype(np.float64) - theirs.astype(np.float64)).reshape(len(ours), -1)
            size = float(np.linalg.norm(gap, axis=1).mean())
            noise[f"{phase}/{name}"] = max(noise.get(f"{phase}/{name}", 0.0), size)


def _at_same_ids(left: Mapping[str, Array], right: Mapping[str, Array]) -> tuple[Array, Array]:
    """Log-probabilities (m, K) by token id, at the positions where both list the same ids: noise swaps neighbours in the order."""
    orders = [np.argsort(side["logprob_ids"], axis=1) for side in (left, right)]
    ids, values = (
        [np.take_along_axis(side[name], order, axis=1) for side, order in zip((left, right), orders, strict=True)]
        for name in ("logprob_ids", "logprobs")
    )
    same = (ids[0] == ids[1]).all(axis=1)
    return values[0][same], values[1][same]
