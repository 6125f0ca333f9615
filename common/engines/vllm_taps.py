"""Hooks on vLLM's decoder layers that keep chosen rows: the residual stream after a block, and the keys it caches.

A decoder layer returns two tensors whose sum is the residual stream; the sum is taken on the chosen rows alone, and rounds as
the next layer's fused addition does. Keys are the second argument of the attention itself: after RoPE, a rank's own heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

Kept = dict[int, torch.Tensor]


class Taps:
    """Hooks on the decoder layers of ``model``; of a pipeline stage, on those that it holds."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self._blocks = blocks
        self._handles: list[Any] = []
        self._rows_R: torch.Tensor | None = None
        self._hidden: Kept = {}
        self._keys: Kept = {}

    def plant(self, wanted: Sequence[int]) -> None:
        """Listen to these blocks (0-based) and no others."""
        self.remove()
        for index in sorted(set(wanted)):
            block = self._blocks[index]
            self._handles.append(block.register_forward_hook(self._state_hook(index)))
            attention = key_source(block)
            if attention is not None:
                self._handles.append(attention.register_forward_pre_hook(self._key_hook(index)))

    def arm(self, rows_R: torch.Tensor) -> None:  # noqa: N803
        """Keep these rows (R,) of the next forward."""
        self._rows_R = rows_R if len(rows_R) else None

    def take(self) -> tuple[Kept, Kept]:
        """What the last forward left: block -> hidden states (R, D), and block -> keys (R, heads * head_dim)."""
        hidden, keys = self._hidden, self._keys
        self._rows_R, self._hidden, self._keys = None, {}, {}
        return hidden, keys

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _state_hook(self, index: int) -> Any:
        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            if self._rows_R is None:
                return
            parts = output if isinstance(output, tuple) else (output,)
            kept = parts[0].index_select(0, self._rows_R)
            if len(parts) > 1 and parts[1] is not None:
                kept = kept + parts[1].index_select(0, self._rows_R)
            self._hidden[index] = kept

        return keep

    def _key_hook(self, index: int) -> Any:
        def keep(_module: nn.Module, args: Any) -> None:
            if self._rows_R is not None and len(args) > 1 and args[1] is not None:
                rows = args[1].index_select(0, self._rows_R)
                self._keys[index] = rows.reshape(len(rows), -1)

        return keep


def key_source(block: nn.Module) -> nn.Module | None:
    """The one attention of a block whose second argument is its keys; None for latent attention and state-space layers."""
    found = [
        module
        for module in block.modules()
        if hasattr(module, "impl") and hasattr(module, "num_kv_heads") and hasattr(module, "kv_cache_dtype")
    ]
    plain = [module for module in found if not hasattr(module, "kv_lora_rank")]
    return plain[0] if len(plain) == 1 else None
