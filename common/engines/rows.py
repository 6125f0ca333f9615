"""What engines share about captured rows: which blocks a plan means, and that rows must be numbers."""

from __future__ import annotations

from collections.abc import Sequence

import ml_dtypes
import numpy as np

from fpforensics.common.errors import ReplayError, UsageError
from fpforensics.common.signals import LAST, Array, Phase, PhaseTrace


def planned_blocks(layers: Sequence[str], depth: int) -> dict[str, int]:
    """Layer names of a plan to 0-based blocks, those beyond ``depth`` left out; ``last`` and its number are
    both kept.
    """
    blocks: dict[str, int] = {}
    for layer in layers:
        if layer != LAST and not (layer.isascii() and layer.isdigit() and int(layer[:9]) >= 1):
            raise UsageError(f"layer {layer[:20]!r} is neither a block number from 1 nor {LAST!r}", "e.g. 1,2,4,last")
        block = depth - 1 if layer == LAST else int(layer[:9]) - 1
        if block < depth:
            blocks[layer] = block
    return blocks


def require_finite(trace: PhaseTrace, reference_id: str, phase: Phase) -> None:
    """Raise :class:`ReplayError` naming the first row that is not finite."""
    for name, rows in sorted(trace.tensors().items(), key=lambda item: _depth(item[0])):
        if name in ("positions", "logprob_ids"):
            continue
        finite = _finite(rows)
        if not finite.all():
            bad = np.flatnonzero(~finite.all(axis=tuple(range(1, rows.ndim))))
            position = int(trace.positions[bad[0]])
            raise ReplayError(
                f"{name} is not finite at position {position} of {reference_id} ({phase})",
                "the model overflows in this dtype: use dtype=bf16 or fp32",
            )


def _finite(rows: Array) -> Array:
    """Elementwise; of bfloat16 by its exponent's bits, since numpy knows no such numbers and takes them one by one."""
    exponent = np.uint16(0x7F80)
    finite: Array = (
        (rows.view(np.uint16) & exponent) != exponent if rows.dtype == ml_dtypes.bfloat16 else np.isfinite(rows)
    )
    return finite


def _depth(name: str) -> tuple[int, str]:
    """Earlier blocks first: the first layer that overflows is the one to name."""
    layer = name.partition("/")[2]
    return (int(layer) if layer.isdigit() else 10**9 if layer else 10**9 + 1), name
