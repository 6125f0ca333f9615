"""The formats: which tensors a projection's weight becomes, and what ``quantization_config`` says of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from fpforensics.common.errors import UsageError, did_you_mean, shorten
from fpforensics.common.int4 import Floats, pack_awq, pack_compressed, pack_gptq
from fpforensics.common.signals import Array
from fpforensics.prover.checkpoint.rounding import (
    round_asymmetric,
    round_rows_fp8,
    round_rows_int8,
    round_symmetric,
)

GROUPS = (128, 64, 32)
"""Group sizes that kernels take, the usual one first."""


@dataclass(frozen=True)
class Format:
    """``pack`` turns a weight (N, K) into tensors named by what replaces ``weight`` in its name; ``declare`` writes
    ``quantization_config``; both take the group size, which is 0 for formats without groups. Where ``library`` is named, that
    package writes the checkpoint instead.

    ``dtype`` is what ``config.json`` gives as the dtype to compute in, empty for the source's.
    """

    name: str
    about: str
    grouped: bool = False
    pack: Callable[[Floats, int], dict[str, Array]] | None = None
    declare: Callable[[int], dict[str, Any]] | None = None
    library: str = ""
    dtype: str = ""


def find_format(name: str) -> Format:
    """The format of that name, or :class:`UsageError` with the nearest."""
    if name not in FORMATS:
        raise UsageError(f"unknown format {shorten(name)!r}", did_you_mean(name, FORMATS))
    return FORMATS[name]


def _awq(weights: Floats, group: int) -> dict[str, Array]:
    return pack_awq(*round_asymmetric(weights, group))


def _gptq(weights: Floats, group: int) -> dict[str, Array]:
    return pack_gptq(*round_symmetric(weights, group))


def _w4a16(weights: Floats, group: int) -> dict[str, Array]:
    return pack_compressed(*round_symmetric(weights, group))


def _w8a8(weights: Floats, _group: int) -> dict[str, Array]:
    levels, scales = round_rows_int8(weights)
    return {"weight": levels, "weight_scale": scales.astype(ml_dtypes.bfloat16)}


def _fp8(weights: Floats, _group: int) -> dict[str, Array]:
    values, scales = round_rows_fp8(weights)
    return {"weight": values, "weight_scale": scales.astype(ml_dtypes.bfloat16)}


def _declare_awq(group: int) -> dict[str, Any]:
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    }


def _declare_gptq(group: int) -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": group,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
        "checkpoint_format": "gptq",
    }


def _declare_compressed(
    layout: str, weights: Mapping[str, Any], activations: Mapping[str, Any] | None
) -> dict[str, Any]:
    fixed = {"symmetric": True, "dynamic": False, "observer": "minmax"}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**fixed, **weights},
                "input_activations": None
                if activations is None
                else {"symmetric": True, "dynamic": True, **activations},
                "output_activations": None,
            }
        },
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


def _declare_w4a16(group: int) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": group}
    return _declare_compressed("pack-quantized", weights, None)


def _declare_w8a8(_group: int) -> dict[str, Any]:
    eight = {"num_bits": 8, "type": "int"}
    return _declare_compressed("int-quantized", {**eight, "strategy": "channel"}, {**eight, "strategy": "token"})


def _declare_fp8(_group: int) -> dict[str, Any]:
    eight = {"num_bits": 8, "type": "float"}
    return _declare_compressed("float-quantized", {**eight, "strategy": "channel"}, {**eight, "strategy": "token"})


FORMATS: Mapping[str, Format] = {
    made.name: made
    for made in (
        Format("none", "as it is, for --pad"),
        Format("awq", "AWQ, 4 bits, zero points", True, _awq, _declare_awq, dtype="float16"),
        Format("gptq", "GPTQ, 4 bits, symmetric", True, _gptq, _declare_gptq, dtype="float16"),
        Format("w4a16", "compressed-tensors, int4 weights", True, _w4a16, _declare_w4a16),
        Format("w8a8-int8", "compressed-tensors, int8 weights and activations", False, _w8a8, _declare_w8a8),
        Format("fp8-dynamic", "compressed-tensors, float8 weights and activations", False, _fp8, _declare_fp8),
        Format("torchao-int8", "torchao, int8 weights", library="torchao"),
        Format("bnb-nf4", "bitsandbytes, 4-bit NormalFloat weights", library="bitsandbytes"),
    )
}


def choose_group(asked: int | None, widths: set[int]) -> int:
    """The group size asked for, else the largest usual one that divides every width in ``widths``."""
    sizes = GROUPS if asked is None else (asked,)
    for size in sizes:
        if size > 0 and all(width % size == 0 for width in widths):
            return size
    wide = ", ".join(str(width) for width in sorted(widths))
    what = f"group size {asked} does not divide" if asked is not None else "none of 128, 64 and 32 divides"
    raise UsageError(
        f"{what} all of the inputs' widths {wide}", "choose another --group-size, or pad the model (--pad)"
    )


def is_projection(name: str) -> bool:
    """Whether the tensor ``name`` is a weight that formats round: a projection inside a block."""
    return ".layers." in name and name.endswith("_proj.weight")


def as_float32(weights: Array) -> Floats:
    """Weights of any floating dtype, exactly."""
    return np.ascontiguousarray(weights, dtype=np.float32)
