"""``matmul="fp32-rounded"``: every weight product in float32, rounded once to the compute dtype.

These are the rounding points of a GPU kernel that accumulates in float32: inputs and weights in the compute
dtype, one rounding at the end (after the bias). On a CPU without bfloat16 instructions it is also several
times faster than the native product. The float32 copies double or triple the memory of the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode


def round_products(model: nn.Module, dtype: torch.dtype) -> int:
    """Replace every weight product of ``model`` in place, the output layer and experts included; returns how
    many modules.

    Weight-only quantized layers are turned back into ``dtype`` by their own library first, then treated the
    same.
    """
    count = 0
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, RoundedLinear(module, dtype))
            count += 1
        elif _multiplies_by_itself(module):
            module.forward = _rounding(module.forward, _RoundedProducts(dtype))
            count += 1
    return count


class RoundedLinear(nn.Module):
    """``y = round(x @ W.T + b)``, computed in float32."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features, self.dtype = linear.in_features, linear.out_features, dtype
        # The weights as the compute dtype holds them, not as float32 could: native products see no more.
        self.register_buffer("weight", _plain_weight(linear).to(dtype).float(), persistent=False)
        bias = None if linear.bias is None else linear.bias.detach().to(dtype).float()
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features), both in the compute dtype."""
        return functional.linear(x.float(), self.weight, self.bias).to(self.dtype)


class _RoundedProducts(TorchFunctionMode):
    """Rounds ``F.linear`` inside modules that hold bare weights (routers, experts); their float32 copies are
    kept.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype
        self._copies: dict[tuple[int, int, torch.Size], torch.Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is functional.linear and not kwargs and len(args) == 2 and args[1].dtype == self._dtype:
            x, weight = args
            key = (weight.untyped_storage().data_ptr(), weight.storage_offset(), weight.shape)
            if key not in self._copies:
                self._copies[key] = weight.detach().float()
            return functional.linear(x.float(), self._copies[key]).to(self._dtype)
        return func(*args, **(kwargs or {}))


def _multiplies_by_itself(module: nn.Module) -> bool:
    if isinstance(module, (nn.Embedding, nn.modules.conv._ConvNd, RoundedLinear)):
        return False
    return any(p.ndim >= 2 and p.is_floating_point() for p in module.parameters(recurse=False))


def _rounding(forward: Callable[..., Any], mode: TorchFunctionMode) -> Callable[..., Any]:
    def rounded(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return forward(*args, **kwargs)

    return rounded


def _plain_weight(linear: nn.Linear) -> torch.Tensor:
    weight = linear.weight.detach()
    if (state := getattr(linear.weight, "quant_state", None)) is not None:
        from bitsandbytes.functional import dequantize_4bit

        plain: torch.Tensor = dequantize_4bit(weight, state)
        return plain
    if hasattr(weight, "dequantize") and type(weight) not in (torch.Tensor, nn.Parameter):
        return weight.dequantize()
    return weight
