"""How int4 checkpoints lay eight levels into an int32, for AWQ, GPTQ and compressed-tensors, and how to read them back.

Sources: AWQ, ``WQLinear_GEMM.from_linear`` of AutoAWQ (``awq/modules/linear/gemm.py``); GPTQ, ``QuantLinear.pack`` of
AutoGPTQ, checkpoint format "gptq" (v1), which stores each zero point less one; compressed-tensors,
``pack_to_int32`` of the package of that name. N outputs, K inputs, groups of G inputs.

=================== =========================== =================================== ==============================
what                AWQ                         GPTQ                                compressed-tensors
=================== =========================== =================================== ==============================
levels              ``qweight`` (K, N/8)        ``qweight`` (K/8, N)                ``weight_packed`` (N, K/8)
order of nibbles    0 2 4 6 1 3 5 7             0 to 7                              0 to 7
zero points         ``qzeros`` (K/G, N/8)       ``qzeros`` (K/G, N/8), less one     none: 8
scales              ``scales`` (K/G, N) f16     ``scales`` (K/G, N) f16             ``weight_scale`` (N, K/G) bf16
besides                                         ``g_idx`` (K,)                      ``weight_shape``: N, K
=================== =========================== =================================== ==============================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from fpforensics.common.signals import Array

Floats = NDArray[np.float32]
Levels = NDArray[np.int32]

IN_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Nibble i, from the lowest, holds column AWQ_ORDER[i] of its eight."""
_MIDDLE = 8


def pack_nibbles(levels: Levels, order: Sequence[int] = IN_ORDER) -> Levels:
    """(…, C) levels from 0 to 15 to (…, C/8) int32."""
    eights = levels.reshape(*levels.shape[:-1], -1, 8)[..., list(order)].astype(np.uint32)
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    packed: Levels = np.bitwise_or.reduce(eights << shifts, axis=-1).view(np.int32)
    return packed


def unpack_nibbles(packed: Levels, order: Sequence[int] = IN_ORDER) -> Levels:
    """(…, C/8) int32 to (…, C) levels from 0 to 15: the inverse of :func:`pack_nibbles`."""
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    nibbles = (np.ascontiguousarray(packed).view(np.uint32)[..., None] >> shifts) & np.uint32(15)
    back: Levels = nibbles[..., np.argsort(order)].astype(np.int32).reshape(*packed.shape[:-1], -1)
    return back


def pack_awq(levels_NK: Levels, zeros_NG: Levels, scales_NG: Floats) -> dict[str, Array]:  # noqa: N803
    """AWQ's tensors for one weight, by the last part of their names."""
    return {
        "qweight": pack_nibbles(levels_NK.T, AWQ_ORDER),
        "qzeros": pack_nibbles(zeros_NG.T, AWQ_ORDER),
        "scales": scales_NG.T.astype(np.float16),
    }


def unpack_awq(tensors: Mapping[str, Array]) -> Floats:
    """The weight (N, K) that AWQ's tensors stand for. Raises :class:`ValueError` where they do not fit each other."""
    levels, scales = unpack_nibbles(tensors["qweight"], AWQ_ORDER).T, tensors["scales"].T
    group_of_input = _even_groups(levels, scales)
    return _dequantize(levels, unpack_nibbles(tensors["qzeros"], AWQ_ORDER).T, scales, group_of_input)


def pack_gptq(levels_NK: Levels, scales_NG: Floats) -> dict[str, Array]:  # noqa: N803
    """GPTQ's tensors for one weight with levels from -8 to 7, by the last part of their names."""
    groups, outputs = scales_NG.T.shape
    stored_zeros = np.full((groups, outputs), _MIDDLE - 1, np.int32)
    return {
        "qweight": pack_nibbles(levels_NK + _MIDDLE).T,
        "qzeros": pack_nibbles(stored_zeros),
        "scales": scales_NG.T.astype(np.float16),
        "g_idx": _even_groups(levels_NK, scales_NG),
    }


def unpack_gptq(tensors: Mapping[str, Array]) -> Floats:
    """The weight (N, K) that GPTQ's tensors stand for, with any order of groups (``desc_act``) and any zero points.

    Raises :class:`ValueError` where they do not fit each other.
    """
    levels = unpack_nibbles(tensors["qweight"].T)
    zeros = (unpack_nibbles(tensors["qzeros"]).T + 1) & 15
    group_of_input, groups = tensors["g_idx"], tensors["scales"].shape[0]
    if group_of_input.shape != (levels.shape[1],):
        raise ValueError(f"g_idx has shape {group_of_input.shape} for {levels.shape[1]} inputs")
    outside = group_of_input[(group_of_input < 0) | (group_of_input >= groups)]
    if outside.size:
        raise ValueError(f"g_idx names group {int(outside[0])}; scales holds {groups} groups")
    return _dequantize(levels, zeros, tensors["scales"].T, group_of_input)


def pack_compressed(levels_NK: Levels, scales_NG: Floats) -> dict[str, Array]:  # noqa: N803
    """compressed-tensors' ``pack-quantized`` tensors for one weight with levels from -8 to 7."""
    return {
        "weight_packed": pack_nibbles(levels_NK + _MIDDLE),
        "weight_scale": scales_NG.astype(ml_dtypes.bfloat16),
        "weight_shape": np.array(levels_NK.shape, np.int64),
    }


def _even_groups(levels_NK: Array, scales_NG: Array) -> Levels:  # noqa: N803
    inputs, groups = levels_NK.shape[1], scales_NG.shape[1]
    if groups == 0 or inputs == 0 or inputs % groups:
        raise ValueError(f"scales holds {groups} groups, which do not divide {inputs} inputs evenly")
    even: Levels = (np.arange(inputs) // (inputs // groups)).astype(np.int32)
    return even


def _dequantize(levels: Levels, zeros: Levels, scales: Array, group_of_input: Levels) -> Floats:
    """(N, K) float32: exact, since a level of four bits times a scale of eleven fits."""
    if zeros.shape != scales.shape or scales.shape[0] != levels.shape[0]:
        raise ValueError(f"qzeros is of shape {zeros.shape}, scales {scales.shape}, for {levels.shape[0]} outputs")
    whole: Floats = (levels - zeros[:, group_of_input]).astype(np.float32)
    whole *= scales.astype(np.float32)[:, group_of_input]
    return whole
