"""Rows must be numbers, whatever their dtype."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from fpforensics.common.engines.rows import require_finite
from fpforensics.common.errors import ReplayError
from fpforensics.common.signals import PhaseTrace


def trace(rows: np.ndarray) -> PhaseTrace:
    count = len(rows)
    return PhaseTrace(
        positions=np.arange(10, 10 + count, dtype=np.int32),
        logprob_ids=np.zeros((count, 1), np.int32),
        logprobs=np.zeros((count, 1), np.float32),
        chosen_logprobs=np.zeros(count, np.float32),
        hidden_states={"1": rows},
    )


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_every_bit_pattern_is_told_apart(dtype: type) -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    finite = np.isfinite(every.astype(np.float32))
    require_finite(trace(every[finite][:, None]), "ref_0", "decode")
    for pattern in every[~finite][:: 1 << 4]:
        with pytest.raises(ReplayError, match="hidden_states/1 is not finite at position 11 of ref_0"):
            require_finite(trace(np.array([[1], [pattern], [2]], dtype)), "ref_0", "decode")
