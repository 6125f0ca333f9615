"""How well a score separates lies from honest evidence: AUC, TPR at an FPR, and bootstrap intervals over prompts.

Scores come as (P, B): B batches of each of P prompts, higher meaning more suspect. The prompt is the independent unit: it is
resampled whole, with all its batches, honest ones and lies together (both are about the same prompts).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
FPR = 0.01


@dataclass(frozen=True)
class Interval:
    """A figure and the 95 % interval of its bootstrap."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Separation:
    """``tpr`` at a threshold that at most :data:`FPR` of the honest batches exceed; ``honest`` is how many there were."""

    auc: Interval
    tpr: Interval
    honest: int


def separation(honest_PB: Floats, lies_PB: Floats, replicates: int = 1000, seed: int = 0) -> Separation:  # noqa: N803
    """Compare honest scores with those of lies, (P, B) each."""
    rng = np.random.default_rng(seed)
    prompts = len(honest_PB)
    resampled = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=replicates).astype(np.float64)
    weights = np.vstack([np.ones(prompts), resampled])  # whole numbers, so that sums of them are exact
    aucs = _aucs(honest_PB, lies_PB, weights)
    tprs = _tprs(honest_PB, lies_PB, weights)
    return Separation(_interval(aucs), _interval(tprs), honest_PB.size)


def auc(honest_PB: Floats, lies_PB: Floats) -> float:  # noqa: N803
    """The share of pairs in which the lie scores higher; a tie counts half (Mann and Whitney)."""
    return float(_aucs(honest_PB, lies_PB, np.ones((1, len(honest_PB))))[0])


def _aucs(honest: Floats, lies: Floats, weights: Floats) -> Floats:
    """For each row of ``weights`` (R, P), the AUC with every prompt counted so often."""
    ordered = np.sort(honest, axis=1)
    wins = np.empty((len(honest), len(lies)))
    for row, batches in enumerate(ordered):
        below = np.searchsorted(batches, lies, side="left")
        upto = np.searchsorted(batches, lies, side="right")
        wins[row] = (below + upto).sum(axis=1)
    found: Floats = np.einsum("ri,ij,rj->r", weights, wins, weights) / (2 * honest[0].size * lies[0].size)
    return found / np.square(weights.sum(axis=1))


def _tprs(honest: Floats, lies: Floats, weights: Floats) -> Floats:
    """The threshold is the smallest honest score that at most :data:`FPR` of the honest batches, as weighted, exceed."""
    values, above = _shares_above(honest, weights)
    # values ascend, so the share above falls along a row: the first that is small enough is the threshold.
    thresholds = values[np.argmax(above <= FPR + 1e-12, axis=1)]
    lie_values, lie_above = _shares_above(lies, weights)
    at = np.searchsorted(lie_values, thresholds, side="right") - 1
    found: Floats = np.where(at < 0, 1.0, lie_above[np.arange(len(weights)), np.maximum(at, 0)])
    return found


def _shares_above(scores: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """The distinct scores ascending, (U,), and the weighted share of batches above each, (R, U)."""
    values, place = np.unique(scores, return_inverse=True)
    counts: Any = np.zeros((len(scores), len(values)))
    np.add.at(counts, (np.arange(scores.size) // scores.shape[1], place.reshape(-1)), 1)
    upto = np.cumsum(weights @ counts, axis=1)
    return values, 1 - upto / upto[:, -1:]


def _interval(values: Floats) -> Interval:
    """The first value, and the percentiles of the others."""
    low, high = np.percentile(values[1:], [2.5, 97.5])
    return Interval(float(values[0]), float(low), float(high))
