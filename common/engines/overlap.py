"""How much of a generation had concurrent work in flight: arithmetic on spans of time, all on one clock, in seconds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from fpforensics.common.engines.base import ConcurrentWork
from fpforensics.common.errors import OverlapError

MIN_OVERLAP = 0.30
"""A generation that had work beside it for less than this share of its time is no result."""

Span = tuple[float, float]


class Burst(NamedTuple):
    """So many products, from when the first could begin to when the last had ended."""

    start: float
    end: float
    products: int


class Measured(NamedTuple):
    """Shares of a window, 0 to 1: with any work in flight, and with a worker's own, on average; and how many products."""

    overlap: float
    busy: float
    products: int


def measure(workers: Sequence[Sequence[Burst]], window: Span) -> Measured:
    """What the bursts of each worker covered of ``window``; nothing where it is empty."""
    length = window[1] - window[0]
    if length <= 0 or not workers:
        return Measured(0.0, 0.0, 0)
    inside = [[burst for burst in bursts if burst.start < window[1] and burst.end > window[0]] for bursts in workers]
    spans = [[(burst.start, burst.end) for burst in bursts] for bursts in inside]
    overlap = min(1.0, covered((span for each in spans for span in each), window) / length)
    busy = sum(covered(each, window) for each in spans) / len(spans) / length
    return Measured(overlap, min(overlap, busy), sum(burst.products for bursts in inside for burst in bursts))


def covered(spans: Iterable[Span], window: Span) -> float:
    """Seconds of ``window`` that lie in at least one span."""
    total, reached = 0.0, window[0]
    for start, end in sorted(spans):
        start, end = max(start, reached), min(end, window[1])
        if end > start:
            total += end - start
            reached = end
    return total


def require_overlap(work: ConcurrentWork) -> None:
    """Raise :class:`OverlapError` where the work ran beside less than :data:`MIN_OVERLAP` of the time."""
    if not work.overlap >= MIN_OVERLAP:
        raise OverlapError(
            f"concurrent=true: the work beside it overlapped {work.overlap:.1%} of the {work.seconds:.3f} s, "
            f"under the {MIN_OVERLAP:.0%} that make a result",
            "run it where less else runs, or with more tokens",
        )
