"""The exact median of more numbers than fit in memory, in two passes over them.

The bits of non-negative floats order as the floats do. The first pass counts the upper 16 bits of each number, which
says in which bin the middle lies; the second counts the lower 16 bits of those that lie there.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fpforensics.common.errors import Error

Float32s = NDArray[np.float32]
Counts = NDArray[np.int64]

_HALF = 16
_LOW_BITS = np.uint32((1 << _HALF) - 1)


class MedianSearch:
    """Show it every number with :meth:`count`, then every one again with :meth:`refine`, in any order and grouping.

    Numbers are finite, non-negative float32. Memory is half a MiB, or one where the two middle numbers of an even
    count lie in different bins.
    """

    def __init__(self) -> None:
        self._high: Counts = np.zeros(1 << (_HALF - 1), np.int64)  # the sign bit is never set
        self._low: dict[int, Counts] | None = None

    def count(self, values: Float32s) -> None:
        """First pass, over ``values`` of any shape."""
        high = np.bincount(_bits(values) >> _HALF, minlength=len(self._high))
        if len(high) > len(self._high):
            raise Error("a median of negative numbers", "give absolute values")
        self._high += high

    def refine(self, values: Float32s) -> None:
        """Second pass, over the same numbers."""
        if self._low is None:
            self._low = {bin_: np.zeros(1 << _HALF, np.int64) for bin_, _ in self._middle()}
        bits = _bits(values)
        high = bits >> _HALF
        for bin_, low in self._low.items():
            low += np.bincount(bits[high == bin_] & _LOW_BITS, minlength=len(low))

    def median(self) -> float:
        """The middle number, or the mean of the two in the middle. Raises :class:`Error` where there is none."""
        found: list[float] = []
        for bin_, rank in self._middle():
            low = (self._low or {}).get(bin_)
            if low is None or int(low.sum()) != int(self._high[bin_]):
                raise Error("a median whose two passes saw different numbers", "show both passes the same")
            bits = np.array((bin_ << _HALF) + _at_rank(low, rank), np.uint32)
            found.append(float(bits.view(np.float32)))
        return (found[0] + found[1]) / 2

    def _middle(self) -> list[tuple[int, int]]:
        """The bin of each of the two middle numbers (twice the same for an odd count), and its rank in there, from 0."""
        total = int(self._high.sum())
        if total == 0:
            raise Error("a median of no numbers", "count some first")
        ranks = ((total - 1) // 2, total // 2)
        bins = [_at_rank(self._high, rank) for rank in ranks]
        return [(bin_, rank - int(self._high[:bin_].sum())) for bin_, rank in zip(bins, ranks, strict=True)]


def _at_rank(counts: Counts, rank: int) -> int:
    """The index whose numbers hold the one of ``rank``, from 0."""
    return int(np.searchsorted(np.cumsum(counts), rank, side="right"))


def _bits(values: Float32s) -> NDArray[np.uint32]:
    return np.ascontiguousarray(values, np.float32).reshape(-1).view(np.uint32)
