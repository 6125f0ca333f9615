"""How far a claimed trace is from a replay: L2 per position in float64, averaged over positions.

Pure NumPy. Shapes: M positions, K canonical token ids, D a vector's width. The published studies define the
distance the same way: L2 over the log-probabilities at the canonical ids, or over the vector; the mean over
positions is a reference's distance; the mean over references is a matrix entry.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from fpforensics.common.errors import EvidenceError, ReplayError, shorten
from fpforensics.common.signals import PHASES, Array, Phase, PhaseTrace, Signal, Trace

Floats = NDArray[np.float64]

POOLED = "pooled"
"""The layer name of the mean over layers of the per-layer distances."""

# Rows converted to float64 at once, so that a long trace is never held twice.
_BLOCK_ROWS = 512
# Values whose distances are computed at once: they stay in a core's cache.
_BLOCK_VALUES = 1 << 18
# The share of the terms that a squared distance must be, lest it lose more than a digit to their rounding.
_CANCELLED = 0.1
# Pairs of a wanted and a listed token id that are compared at once.
_BLOCK_MATCHES = 1 << 24


class SignalKey(msgspec.Struct, frozen=True, order=True):
    """A signal and its layer; ``layer`` is empty for logprobs."""

    signal: Signal
    layer: str = ""


class Cell(msgspec.Struct, frozen=True, order=True):
    """Where a distance is measured: phase, signal and layer (empty for logprobs, or :data:`POOLED`)."""

    phase: Phase
    signal: Signal
    layer: str = ""

    def __str__(self) -> str:
        return "/".join(filter(None, (self.phase, self.signal, self.layer)))


def position_distances(claimed: PhaseTrace, replay: PhaseTrace) -> dict[SignalKey, Floats]:
    """L2 distance at each position, (M,) float64, for logprobs and for every layer of every vector signal.

    The log-probabilities must be at the same ids on both sides (the replay gathers the claimed ids). Raises
    :class:`EvidenceError` if positions, ids, layers or widths differ or a claimed value is not finite, and
    :class:`ReplayError` if a replayed value is not finite.
    """
    _require_same(claimed.positions, replay.positions, "positions")
    _require_same(claimed.logprob_ids, replay.logprob_ids, "canonical token ids")
    distances = {SignalKey("logprobs"): rows_l2(claimed.logprobs, replay.logprobs, "logprobs")}
    layered: tuple[tuple[Signal, Mapping[str, Array], Mapping[str, Array]], ...] = (
        ("key_vectors", claimed.key_vectors, replay.key_vectors),
        ("hidden_states", claimed.hidden_states, replay.hidden_states),
    )
    for signal, ours, theirs in layered:
        if ours.keys() != theirs.keys():
            raise EvidenceError(
                f"{signal}: the claimed trace holds layers {_names(ours)}, the replay {_names(theirs)}",
                "both sides must capture the same layers of the same model",
            )
        for layer in ours:
            name = f"{signal}/{layer}"
            distances[SignalKey(signal, layer)] = rows_l2(ours[layer], theirs[layer], name)
    return distances


def trace_distances(claimed: Trace, replay: Trace) -> dict[Cell, float]:
    """The mean over positions for each cell of both phases: one reference's distances.

    A phase without positions (a single generated token has no decode position) has no cells. Raises
    :class:`EvidenceError` if the two are not traces of the same reference and tokens.
    """
    if claimed.reference_id != replay.reference_id:
        raise EvidenceError(
            f"a trace of {shorten(claimed.reference_id)!r}, a replay of {shorten(replay.reference_id)!r}",
            "compare traces of one reference",
        )
    _require_same(claimed.output_ids, replay.output_ids, f"output ids of {shorten(claimed.reference_id)!r}")
    means: dict[Cell, float] = {}
    for phase in PHASES:
        ours, theirs = claimed.phase(phase), replay.phase(phase)
        if not len(ours.positions) and not len(theirs.positions):
            continue
        for key, rows in position_distances(ours, theirs).items():
            means[Cell(phase, key.signal, key.layer)] = float(rows.mean())
    return means


def with_pooled(distances: Mapping[Cell, float]) -> dict[Cell, float]:
    """``distances`` and, for each phase and vector signal, the mean over layers as layer :data:`POOLED`."""
    layers: dict[Cell, list[float]] = {}
    for cell, distance in distances.items():
        if cell.layer and cell.layer != POOLED:
            layers.setdefault(Cell(cell.phase, cell.signal, POOLED), []).append(distance)
    return dict(distances) | {cell: float(np.mean(values)) for cell, values in layers.items()}


def ranked_distances(claimed: tuple[Array, Array], observed: tuple[Array, Array], canonical_ids: Array) -> Floats:
    """L2 at each position, (M,), between two recorded top-k, over the canonical ids that both sides list.

    For recorded studies, which kept a top-k only (a live replay gathers from its full distribution instead).
    ``claimed`` and ``observed`` are (ids (M, K), log-probabilities (M, K)), short rows padded with id -1;
    ``canonical_ids`` (M, N) likewise. NaN where a position has no canonical id on both sides.
    """
    distances = np.empty(len(canonical_ids), np.float64)
    rows = max(1, _BLOCK_MATCHES // max(1, canonical_ids.shape[1] * max(claimed[0].shape[1], observed[0].shape[1])))
    for start in range(0, len(canonical_ids), rows):
        block = slice(start, start + rows)
        wanted = canonical_ids[block]
        found_claimed, ours = _at_ids(claimed[0][block], claimed[1][block], wanted)
        found_observed, theirs = _at_ids(observed[0][block], observed[1][block], wanted)
        both = found_claimed & found_observed & (wanted >= 0)
        squared = np.where(both, np.square(ours - theirs), 0.0).sum(axis=1)
        distances[block] = np.where(both.any(axis=1), np.sqrt(squared), np.nan)
    return distances


def _at_ids(ids: Array, logprobs: Array, wanted: Array) -> tuple[NDArray[np.bool_], Floats]:
    """(M, N): whether each wanted id is listed at its position, and its log-probability (0 where it is not)."""
    matches = wanted[:, :, None] == ids[:, None, :]  # (M, N, K)
    at = np.arange(len(ids))[:, None], matches.argmax(axis=2)  # where it is listed, if anywhere
    listed: NDArray[np.bool_] = ids[at] == wanted
    return listed, np.where(listed, logprobs[at], 0.0)


def rows_l2(claimed: Array, replay: Array, name: str) -> Floats:
    """L2 of each row in float64: (M, D) twice -> (M,). ``name`` is what errors call them.

    Raises :class:`EvidenceError` for other shapes or a claimed value that is not finite, :class:`ReplayError`
    for a replayed one.
    """
    if claimed.shape != replay.shape or claimed.ndim != 2:
        raise EvidenceError(
            f"{name}: the claimed trace has shape {claimed.shape}, the replay {replay.shape}",
            "another model, or another capture plan",
        )
    distances = np.empty(len(claimed), np.float64)
    for start in range(0, len(claimed), _BLOCK_ROWS):
        block = slice(start, start + _BLOCK_ROWS)
        ours, theirs = claimed[block].astype(np.float64, copy=False), replay[block].astype(np.float64, copy=False)
        if not np.isfinite(ours).all():
            raise EvidenceError(f"{name}: a claimed value is not finite", "evidence holds finite numbers only")
        if not np.isfinite(theirs).all():
            raise ReplayError(f"{name}: a replayed value is not finite", "try a wider dtype or another kernel")
        distances[block] = _norms(ours - theirs)
    return distances


def mean_l2(stack: Sequence[Floats]) -> Floats:
    """The mean over positions of :func:`rows_l2` between every two of n traces, (M, D) float64 each -> (n, n).

    For recorded numbers that are known to be finite. A few positions at a time, so that a long trace passes through the
    processor's cache once, not once for each pair.
    """
    sums = np.zeros((len(stack), len(stack)))
    rows = max(1, _BLOCK_VALUES // (len(stack) * stack[0].shape[1]))
    space = np.empty((min(rows, len(stack[0])), len(stack) - 1, stack[0].shape[1]))
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, len(stack[0]), rows):
            sums += np.sqrt(_squares_between([trace[start : start + rows] for trace in stack], space)).sum(axis=0)
    means: Floats = (sums + sums.T) / len(stack[0])
    return means


def _squares_between(block: Sequence[Floats], space: Floats) -> Floats:
    """Squared distances between every two of n traces, (m, D) each -> (m, n, n), above the diagonal and 0 elsewhere.

    |a - b|² = |a - o|² + |b - o|² - 2 (a - o)·(b - o), where o is the first trace: one matrix product instead of a pass for
    each pair. Where a is so near to b that this cancels, the difference itself is taken: equal traces are at distance 0.
    ``space`` (at least m, n - 1, D) is overwritten.
    """
    from_first = space[: len(block[0])]
    for index, trace in enumerate(block[1:]):
        np.subtract(trace, block[0], out=from_first[:, index])
    own = _squares(from_first)
    added = own[:, :-1, None] + own[:, None, 1:]  # (m, n-2, n-2)
    products = np.matmul(from_first[:, :-1], from_first[:, 1:].transpose(0, 2, 1))
    between = added - 2 * products
    above = ~np.tri(len(block) - 2, k=-1, dtype=bool)
    squares = np.zeros((len(block[0]), len(block), len(block)))
    squares[:, 0, 1:] = own
    squares[:, 1:-1, 2:] = np.where(above, between, 0.0)
    near = above & ~(between > _CANCELLED * added)  # true of NaN, too
    if near.any():
        for i, j in np.argwhere(near.any(axis=0)):
            at = near[:, i, j]
            squares[at, i + 1, j + 2] = _squares(block[i + 1][at] - block[j + 2][at])
    return squares


def _norms(differences: Floats) -> Floats:
    """(M, D) -> (M,)."""
    norms: Floats = np.sqrt(_squares(differences))
    return norms


def _squares(differences: Floats) -> Floats:
    """(…, D) -> (…)."""
    squares: Floats = np.matmul(differences[..., None, :], differences[..., None])[..., 0, 0]  # a BLAS dot product each
    return squares


def _require_same(claimed: NDArray[Any], replay: NDArray[Any], what: str) -> None:
    if claimed.shape != replay.shape:
        raise EvidenceError(
            f"{what} differ: {claimed.shape} in the claimed trace, {replay.shape} in the replay",
            "replay the claimed tokens at the claimed positions",
        )
    differing = np.flatnonzero((claimed != replay).reshape(-1))
    if len(differing):
        at = int(differing[0])
        raise EvidenceError(
            f"{what} differ at index {at}: {claimed.reshape(-1)[at]} in the claimed trace, "
            f"{replay.reshape(-1)[at]} in the replay",
            "replay the claimed tokens at the claimed positions",
        )


def _names(layers: Iterable[str]) -> str:
    return ", ".join(shorten(layer, 20) for layer in layers) or "none"
