"""How far two runs' full logits lie apart at the same positions: as numbers, on the chosen token, as distributions.

Pure NumPy. A is the baseline. Shapes: M positions, m those of one block, V the vocabulary. The quantities, and their
names in print, are those of the published comparison of TP=1 with TP=4 logits; its chosen token is the argmax of the
baseline, and its standard deviation divides by n - 1. Everything is computed in float64 from the logits' own dtype, in
blocks of rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from fpforensics.common.errors import EvidenceError, UsageError
from fpforensics.common.signals import Array
from fpforensics.common.words import counted
from fpforensics.verifier.compare.result import (
    ChosenTokenError,
    DistributionDivergence,
    LogitDifference,
    PositionComparison,
    ShareAbove,
    Summary,
    TokenAgreement,
)
from fpforensics.verifier.distance import Floats

Ints = NDArray[np.int64]

THRESHOLDS = (1e-4, 1e-2)
"""Absolute logit differences above which elements are counted."""
TOP = 5
"""How many of the likeliest tokens are compared besides the first."""

# Elements converted to float64 at once: a handful of such arrays stay in a core's cache.
_BLOCK_ELEMENTS = 1 << 18
# No model computes such logits; beyond it squares and differences would leave float64, or differences float32.
_LARGEST = 1e30


@dataclass(frozen=True)
class RowMeasures:
    """What was measured at each position: columns of length M; see :class:`PositionComparison`."""

    positions: Ints  # (M,)
    max_abs: Floats  # (M,)
    mean_abs: Floats  # (M,)
    above: Ints  # (M, len(THRESHOLDS)) elements
    cosine: Floats  # (M,), NaN where undefined
    top1_match: NDArray[np.bool_]  # (M,)
    top5_shared: Ints  # (M,)
    tokens: Ints  # (M,)
    logp_a: Floats  # (M,)
    logp_b: Floats  # (M,)
    kl_ab: Floats  # (M,)
    kl_ba: Floats  # (M,)
    total_variation: Floats  # (M,)


def measure(positions: Array, logits_a: Array, logits_b: Array) -> RowMeasures:
    """Every position's figures, from logits (M, V) of any float dtypes at ``positions`` (M,).

    Raises :class:`UsageError` unless there is at least one position and the shapes agree, and
    :class:`EvidenceError` for logits that are not finite, or beyond ±1e30.
    """
    if logits_a.shape != logits_b.shape or logits_a.ndim != 2 or 0 in logits_a.shape:
        raise UsageError(f"logits of shapes {logits_a.shape} and {logits_b.shape}", "two of (M, V) are compared")
    if positions.shape != logits_a.shape[:1]:
        raise UsageError(
            f"{counted(len(positions), 'position')} for {counted(len(logits_a), 'row')} of logits",
            "give one for each row",
        )
    return join(
        [_measure_block(positions[block], logits_a[block], logits_b[block]) for block in _blocks(logits_a.shape)]
    )


def join(parts: Sequence[RowMeasures]) -> RowMeasures:
    """The rows of at least one part, one part after the other."""
    return RowMeasures(
        **{each.name: np.concatenate([getattr(part, each.name) for part in parts]) for each in fields(RowMeasures)}
    )


def absolute_gaps(logits_a: Array, logits_b: Array) -> Iterator[NDArray[np.float32]]:
    """|A - B| of logits (M, V), rounded to float32, in blocks (m, V): for a median over all of them."""
    for block in _blocks(logits_a.shape):
        yield np.abs(_wide(logits_a[block], "A") - _wide(logits_b[block], "B")).astype(np.float32)


def summarize(rows: RowMeasures, vocab_size: int, median_abs: float) -> Summary:
    """The figures over all of ``rows``. ``median_abs`` is over their M * V elements, which only the caller can see."""
    count = len(rows.positions)
    elements = count * vocab_size
    slots = count * min(TOP, vocab_size)
    cosines = rows.cosine[~np.isnan(rows.cosine)]
    above = rows.above.sum(axis=0)
    return Summary(
        positions=count,
        logits=LogitDifference(
            elements=elements,
            max_abs=float(rows.max_abs.max()),
            mean_abs=float(rows.mean_abs.mean()),
            median_abs=median_abs,
            shares_above=tuple(
                ShareAbove(threshold=threshold, share=int(over) / elements)
                for threshold, over in zip(THRESHOLDS, above, strict=True)
            ),
            cosine_min=float(cosines.min()) if len(cosines) else None,
            cosine_mean=float(cosines.mean()) if len(cosines) else None,
        ),
        chosen=chosen_token_error(rows.logp_a, rows.logp_b),
        divergence=DistributionDivergence(
            kl_ab_mean=float(rows.kl_ab.mean()),
            kl_ab_max=float(rows.kl_ab.max()),
            kl_ba_mean=float(rows.kl_ba.mean()),
            kl_ba_max=float(rows.kl_ba.max()),
            total_variation_mean=float(rows.total_variation.mean()),
            total_variation_max=float(rows.total_variation.max()),
        ),
        agreement=TokenAgreement(
            top1_matches=int(rows.top1_match.sum()),
            top1_share=float(rows.top1_match.mean()),
            top5_shared=int(rows.top5_shared.sum()),
            top5_slots=slots,
            top5_share=int(rows.top5_shared.sum()) / slots,
        ),
    )


def chosen_token_error(logp_a: Array, logp_b: Array) -> ChosenTokenError:
    """The errors of the chosen tokens' log-probabilities, natural, (M,) each.

    Raises :class:`UsageError` unless both are vectors of one length, at least 1, of finite numbers.
    """
    if logp_a.shape != logp_b.shape or logp_a.ndim != 1 or not len(logp_a):
        raise UsageError(f"log-probabilities of shapes {logp_a.shape} and {logp_b.shape}", "two of (M,) are compared")
    delta = logp_a.astype(np.float64) - logp_b.astype(np.float64)
    if not np.isfinite(delta).all():
        raise UsageError("a log-probability is not finite", "the chosen token has a positive probability on both sides")
    with np.errstate(over="ignore"):
        ratio = float(np.exp(np.abs(delta)).mean())
    return ChosenTokenError(
        mean_abs=float(np.abs(delta).mean()),
        max_abs=float(np.abs(delta).max()),
        signed_mean=float(delta.mean()),
        std=float(delta.std(ddof=1)) if len(delta) > 1 else None,
        token_mult_prob_error=_number(ratio),
    )


def by_position(rows: RowMeasures) -> tuple[PositionComparison, ...]:
    """Each row as a value of its own, ready for JSON."""
    delta = rows.logp_a - rows.logp_b
    with np.errstate(over="ignore"):
        ratio = np.exp(np.abs(delta))
    return tuple(
        PositionComparison(
            position=int(rows.positions[i]),
            max_abs=float(rows.max_abs[i]),
            mean_abs=float(rows.mean_abs[i]),
            cosine=_number(float(rows.cosine[i])),
            top1_match=bool(rows.top1_match[i]),
            top5_shared=int(rows.top5_shared[i]),
            token=int(rows.tokens[i]),
            logp_a=float(rows.logp_a[i]),
            logp_b=float(rows.logp_b[i]),
            delta=float(delta[i]),
            ratio=_number(float(ratio[i])),
            kl_ab=float(rows.kl_ab[i]),
            kl_ba=float(rows.kl_ba[i]),
            total_variation=float(rows.total_variation[i]),
        )
        for i in range(len(rows.positions))
    )


def _measure_block(positions: Array, raw_a: Array, raw_b: Array) -> RowMeasures:
    a, b = _wide(raw_a, "A"), _wide(raw_b, "B")  # (m, V)
    gaps = np.abs(a - b)
    tokens = a.argmax(axis=1)  # the first of equals
    log_a, log_b = _log_softmax(a), _log_softmax(b)
    p, q = np.exp(log_a), np.exp(log_b)
    log_ratio = log_a - log_b
    each = np.arange(len(a))
    return RowMeasures(
        positions=positions.astype(np.int64),
        max_abs=gaps.max(axis=1),
        mean_abs=gaps.mean(axis=1),
        above=np.stack([(gaps > threshold).sum(axis=1) for threshold in THRESHOLDS], axis=1).astype(np.int64),
        cosine=_cosines(a, b),
        top1_match=tokens == b.argmax(axis=1),
        top5_shared=np.array([len(np.intersect1d(_top(x), _top(y))) for x, y in zip(a, b, strict=True)], np.int64),
        tokens=tokens.astype(np.int64),
        logp_a=log_a[each, tokens],
        logp_b=log_b[each, tokens],
        # Never negative; the sum may round to -1e-17.
        kl_ab=np.maximum((p * log_ratio).sum(axis=1), 0.0),
        kl_ba=np.maximum(-(q * log_ratio).sum(axis=1), 0.0),
        total_variation=np.abs(p - q).sum(axis=1) / 2,
    )


def _blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    rows = max(1, _BLOCK_ELEMENTS // shape[1])
    return (slice(start, start + rows) for start in range(0, shape[0], rows))


def _wide(logits: Array, side: str) -> Floats:
    wide = logits.astype(np.float64)
    if not (np.abs(wide) <= _LARGEST).all():  # a NaN is not
        raise EvidenceError(f"logits of {side} are not finite, or beyond ±{_LARGEST:g}", "no model computes such")
    return wide


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(axis=1, keepdims=True)
    normalized: Floats = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return normalized


def _cosines(a: Floats, b: Floats) -> Floats:
    """(m, V) twice -> (m,); NaN where a row is all 0."""
    with np.errstate(invalid="ignore"):
        a, b = (x / np.abs(x).max(axis=1, keepdims=True) for x in (a, b))  # squares of tiny numbers would be 0
        dot, aa, bb = (np.einsum("mv,mv->m", x, y) for x, y in ((a, b), (a, a), (b, b)))
        cosines: Floats = np.clip(dot / np.sqrt(aa * bb), -1.0, 1.0)
    return cosines


def _top(row: Floats) -> Ints:
    """The ids of the largest :data:`TOP` of (V,), the lowest ids of equals."""
    if len(row) <= TOP:
        return np.arange(len(row))
    candidates = np.flatnonzero(row >= np.partition(row, -TOP)[-TOP])
    return candidates[np.argsort(-row[candidates], kind="stable")[:TOP]]


def _number(value: float) -> float | None:
    return value if np.isfinite(value) else None
