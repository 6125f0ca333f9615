"""What the elements of evidence must be: finite numbers, log-probabilities, token ids, positions.

Works on any run of a tensor's elements, so that a tensor larger than memory can be checked piece by piece;
``positions`` and ``top_ids`` are about order and rows and need the whole (they are small).
"""

from __future__ import annotations

import numpy as np

from fpforensics.common.errors import EvidenceError
from fpforensics.common.manifest import Rule
from fpforensics.common.signals import Array, dtype_name

WHOLE = frozenset({"positions", "top_ids"})
LOGPROB_SLACK = 1e-3
"""How far above 0 a log-probability may round."""

# By our dtype names: the integer that holds the bits, and the bits of +infinity. What lies at or beyond it,
# sign aside, is not finite; added to, it reaches the sign's bit. Only and, add and or: NumPy's kernels for
# max or isfinite use AVX-512, and a core that just did hashes a fifth slower.
_BITS = {
    "bf16": (np.uint16, 0x7F80),
    "f16": (np.uint16, 0x7C00),
    "f32": (np.uint32, 0x7F800000),
    "f64": (np.uint64, 0x7FF0000000000000),
}


def is_finite(array: Array) -> bool:
    """Whether a contiguous array of one of our float dtypes holds no NaN and no infinity."""
    integer, infinity = _BITS[dtype_name(array)]
    sign = 1 << (8 * array.itemsize - 1)
    bits = array.view(integer) & integer(sign - 1)
    bits += integer(sign - infinity)
    return not int(np.bitwise_or.reduce(bits, axis=None)) & sign


def check_elements(array: Array, rule: Rule, where: str, start: int = 0) -> None:
    """Raise :class:`EvidenceError` for the first element that breaks ``rule``.

    ``array`` is contiguous and begins at element ``start`` of the tensor that ``where`` names.
    """
    if array.size == 0:
        return
    if rule.kind in ("ids", "top_ids"):
        if int(array.min()) < rule.low or int(array.max()) > rule.high:
            _complain(array, (array < rule.low) | (array > rule.high), where, start, f"{rule.low} to {rule.high}")
        if rule.kind == "top_ids" and (np.diff(np.sort(array, axis=-1), axis=-1) == 0).any():
            raise EvidenceError(f"{where} repeats a token id at one position", "the top k are distinct")
    elif rule.kind == "positions":
        if (np.diff(array) <= 0).any():
            raise EvidenceError(f"{where} do not increase strictly", "each position is stored once, in order")
        if int(array[0]) < rule.low or int(array[-1]) > rule.high:
            _complain(array, (array < rule.low) | (array > rule.high), where, start, f"{rule.low} to {rule.high}")
    else:
        if not is_finite(array):
            _complain(array, ~np.isfinite(array.astype(np.float64)), where, start, "finite numbers")
        if rule.kind == "logprobs" and float(array.max()) > LOGPROB_SLACK:
            _complain(array, array > LOGPROB_SLACK, where, start, "log-probabilities, at most 0")


def _complain(array: Array, wrong: Array, where: str, start: int, expected: str) -> None:
    index = int(np.flatnonzero(wrong)[0])
    raise EvidenceError(f"{where} holds {array.flat[index]} at element {start + index}", f"{expected} are allowed")
