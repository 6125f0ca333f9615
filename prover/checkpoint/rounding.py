"""Round to nearest: weights to the integers or floats of a format, and back.

Weights are (N, K) float32: N outputs, K inputs. Groups of G consecutive inputs share a scale, so scales are (N, K/G).
Scales are rounded to bfloat16 before anything is divided by them, and are no smaller than float16's least normal
number: such a scale is the same number in float16, bfloat16 and float32, so that a checkpoint holds one set of weights
whichever dtype a kernel computes in.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from fpforensics.common.int4 import Floats, Levels

_LEAST_SCALE = np.float32(2.0**-14)
# Below float16's range a scale of whole rows may lie: only bfloat16 holds those.
_LEAST_ROW_SCALE = np.float32(2.0**-100)
FP8_MAX = np.float32(448.0)


def round_symmetric(weights_NK: Floats, group: int, bits: int = 4) -> tuple[Levels, Floats]:  # noqa: N803
    """Levels (N, K) from -2^(bits-1) to 2^(bits-1)-1, and scales (N, K/G): weight = level * scale.

    scale = 2 max|w| / (2^bits - 1), as GPTQ's and compressed-tensors' quantizers have it.
    """
    grouped = _grouped(weights_NK, group)
    half = 2 ** (bits - 1)
    scales = _storable(2 * np.abs(grouped).max(axis=2) / (2 * half - 1), _LEAST_SCALE)
    levels = np.clip(np.rint(grouped / scales[:, :, None]), -half, half - 1)
    return levels.reshape(weights_NK.shape).astype(np.int32), scales


def round_asymmetric(weights_NK: Floats, group: int) -> tuple[Levels, Levels, Floats]:  # noqa: N803
    """Levels (N, K) from 0 to 15, zeros (N, K/G) from 0 to 15, scales (N, K/G): weight = (level - zero) * scale.

    As AutoAWQ's ``pseudo_quantize_tensor`` has it, over a range that always holds 0.
    """
    grouped = _grouped(weights_NK, group)
    low, high = np.minimum(grouped.min(axis=2), 0), np.maximum(grouped.max(axis=2), 0)
    scales = _storable((high - low) / np.float32(15), _LEAST_SCALE)
    zeros = np.clip(-np.rint(low / scales), 0, 15)
    levels = np.clip(np.rint(grouped / scales[:, :, None]) + zeros[:, :, None], 0, 15)
    return levels.reshape(weights_NK.shape).astype(np.int32), zeros.astype(np.int32), scales


def round_rows_int8(weights_NK: Floats) -> tuple[NDArray[np.int8], Floats]:  # noqa: N803
    """One scale for each output: int8 levels (N, K), scales (N, 1)."""
    scales = _storable(2 * np.abs(weights_NK).max(axis=1, keepdims=True) / np.float32(255), _LEAST_ROW_SCALE)
    return np.clip(np.rint(weights_NK / scales), -128, 127).astype(np.int8), scales


def round_rows_fp8(weights_NK: Floats) -> tuple[NDArray[ml_dtypes.float8_e4m3fn], Floats]:  # noqa: N803
    """One scale for each output: float8 e4m3 (N, K), scales (N, 1)."""
    scales = _storable(np.abs(weights_NK).max(axis=1, keepdims=True) / FP8_MAX, _LEAST_ROW_SCALE)
    return np.clip(weights_NK / scales, -FP8_MAX, FP8_MAX).astype(ml_dtypes.float8_e4m3fn), scales


def _grouped(weights: Floats, group: int) -> Floats:
    rows, columns = weights.shape
    return weights.reshape(rows, columns // group, group)


def _storable(scales: Floats, least: np.float32) -> Floats:
    return np.maximum(scales, least).astype(ml_dtypes.bfloat16).astype(np.float32)
