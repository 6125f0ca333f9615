"""AWQ and GPTQ checkpoints for the Transformers engine: every weight is dequantized once, at load.

The integers and scales are those of the checkpoint; products are then the compute dtype's own, on every device. A server's
int4 kernels dequantize inside the product instead, to the same weights and in another order of sums. No package is
needed; GPTQModel, which transformers would ask for, pins a NumPy that does not fit beside the rest.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fpforensics.common.errors import UsageError, shorten
from fpforensics.common.int4 import unpack_awq, unpack_gptq
from fpforensics.common.models import ANOTHER
from fpforensics.common.signals import Array
from fpforensics.common.weights import stored_tensors, weight_files

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

STORED_INT4 = frozenset({"awq", "gptq"})
_PARTS = ("qweight", "qzeros", "scales", "g_idx")
# What the format's loaders take where the checkpoint does not say.
_LAYOUTS = {"awq": ("version", "gemm"), "gptq": ("checkpoint_format", "gptq")}


def check_layout(path: Path, declared: dict[str, Any]) -> None:
    """Raise :class:`UsageError` for a checkpoint whose ``quantization_config`` is of a layout that is not read here."""
    method = declared["quant_method"]
    key, known = _LAYOUTS[method]
    bits, layout = declared.get("bits", declared.get("w_bit", 4)), str(declared.get(key) or known).lower()
    if bits != 4 or layout != known or declared.get("dynamic"):
        what = "mixed widths" if declared.get("dynamic") else f"bits={bits}, {key}={shorten(layout)}"
        raise UsageError(
            f"the {method} checkpoint in {path} has {what}; the transformers engine reads bits=4, {key}={known}",
            ANOTHER,
        )


def dequantized_state(path: Path, method: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors, with each quantized weight (N, K) as one of ``dtype`` instead of its parts."""
    import torch
    from safetensors import safe_open

    state: dict[str, torch.Tensor] = {}
    parts: dict[str, dict[str, Array]] = {}
    for file in weight_files(path):
        with safe_open(file, framework="pt") as held:
            for name in held.keys():  # noqa: SIM118
                module, _, kind = name.rpartition(".")
                if kind in _PARTS:
                    parts.setdefault(module, {})[kind] = held.get_tensor(name).numpy()
                else:
                    state[name] = held.get_tensor(name)
    unpack = {"awq": unpack_awq, "gptq": unpack_gptq}[method]
    for module in sorted(parts):
        try:
            weight = unpack(parts.pop(module))
        except (KeyError, ValueError, IndexError) as error:
            raise UsageError(
                f"the {method} weight {shorten(module)!r} in {path} is incomplete or malformed: {shorten(repr(error), 160)}",
                "fetch the checkpoint again",
            ) from error
        state[f"{module}.weight"] = torch.from_numpy(weight).to(dtype)
    return state


def mark_dequantized(model: PreTrainedModel, path: Path) -> None:
    """Note on each module whose weight was dequantized that it was, for the engine's facts."""
    stored = {
        tensor.name.removesuffix(".qweight") for tensor in stored_tensors(path) if tensor.name.endswith(".qweight")
    }
    fused = {name.partition(".experts.")[0] + ".experts" for name in stored if ".experts." in name}
    for name, module in model.named_modules():
        if name in stored or (name in fused and next(module.parameters(recurse=False), None) is not None):
            module.dequantized = True
