"""Hooks on vLLM's decoder layers that keep chosen rows: the residual stream after a block, and the keys it caches.

A decoder layer returns two tensors whose sum is the residual stream; the sum is taken on the chosen rows alone, and rounds as
the next layer's fused addition does. Keys are the second argument of the attention itself: after RoPE, a rank's own heads.

Under ``torch.compile`` and CUDA graphs a hook's Python runs once, while the graph is made. There each hook is an operator of ours
in the model's graph, in every block, whether its rows are wanted or not: capture then changes no graph. Where compiled code calls
the operator, it keeps rows as a hook does. In a CUDA graph it copies the rows that a fixed list names into a fixed buffer, and the
list is written before each replay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

Kept = dict[int, torch.Tensor]
_STATES, _KEYS = 0, 1
_SINK = "evidence_rows"


class Taps:
    """Hooks on the decoder layers of ``model``; of a pipeline stage, on those that it holds."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self._blocks = blocks
        self._handles: list[Any] = []
        self._wanted: frozenset[int] = frozenset()
        self._count = 0
        self._rows_R: torch.Tensor | None = None
        self._span: slice | None = None
        self._kept: tuple[Kept, Kept] = ({}, {})
        self._listed: torch.Tensor | None = None  # (capacity,) what a CUDA graph copies
        self._sinks: tuple[Kept, Kept] = ({}, {})

    def build_in(self, capacity: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        """Make the hooks a part of the model's graph, once and for all. ``capacity`` is the largest CUDA graph's tokens."""
        global _current
        _current = self
        self._listed = torch.zeros(max(1, capacity), dtype=torch.int64, device=device)
        for index, block in enumerate(self._blocks):
            if not any(True for _ in block.parameters()):
                continue  # another stage's
            sources: list[tuple[int, Any, int]] = [(_STATES, block, width)]
            if (attention := key_source(block)) is not None:
                heads: Any = attention
                sources.append((_KEYS, attention, heads.num_kv_heads * heads.head_size))
            for kind, module, size in sources:
                # Not numbers: rows that no graph ever wrote must not pass for captured ones.
                sink = torch.full((max(1, capacity), size), torch.nan, dtype=dtype, device=device)
                module.register_buffer(_SINK, sink, persistent=False)
                self._sinks[kind][index] = sink
            block.register_forward_hook(_state_operator(index))
            if attention is not None:
                attention.register_forward_pre_hook(_key_operator(index), with_kwargs=True)

    def plant(self, wanted: Sequence[int]) -> None:
        """Listen to these blocks (0-based) and no others."""
        self.remove()
        self._wanted = frozenset(wanted)
        if self._listed is not None:
            return
        for index in sorted(self._wanted):
            block = self._blocks[index]
            self._handles.append(block.register_forward_hook(self._state_hook(index)))
            attention = key_source(block)
            if attention is not None:
                self._handles.append(attention.register_forward_pre_hook(self._key_hook(index), with_kwargs=True))

    def arm(self, rows_R: torch.Tensor, span: slice | None = None) -> None:  # noqa: N803
        """Keep these rows (R,) of the next forward; ``span`` where they are neighbours, which saves their selection."""
        self._count, self._span = len(rows_R), span
        self._rows_R = rows_R if self._count else None
        if self._listed is not None and self._count <= len(self._listed):
            # Every entry, so that none points beyond a smaller graph's rows.
            self._listed.zero_()
            self._listed[: self._count] = rows_R

    def take(self) -> tuple[Kept, Kept]:
        """What the last forward left: block -> hidden states (R, D), and block -> keys (R, heads * head_dim)."""
        kept, self._rows_R, self._kept = self._kept, None, ({}, {})
        if self._count:
            for found, sinks in zip(kept, self._sinks, strict=True):
                # What no operator saw came out of a CUDA graph.
                found.update(
                    {i: sinks[i][: self._count].clone() for i in self._wanted if i in sinks and i not in found}
                )
        return kept

    def remove(self) -> None:
        """Take the hooks off; those that are built in fall silent."""
        self._wanted = frozenset()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def keep(self, kind: int, index: int, rows_TD: torch.Tensor, more_TD: torch.Tensor | None) -> None:  # noqa: N803
        """Keep the armed rows of what a block computed: the sum of both parts."""
        if self._rows_R is None or index not in self._wanted:
            return
        if self._span is not None:
            rows, more = rows_TD[self._span], None if more_TD is None else more_TD[self._span]
            kept = rows.clone() if more is None else rows + more  # never a view: vLLM writes over its buffers
        else:
            kept = rows_TD.index_select(0, self._rows_R)
            if more_TD is not None:
                kept = kept + more_TD.index_select(0, self._rows_R)
        self._kept[kind][index] = kept.reshape(len(kept), -1)

    def copy(self, sink: torch.Tensor, rows_TD: torch.Tensor, more_TD: torch.Tensor | None) -> None:  # noqa: N803
        """What a CUDA graph does in :meth:`keep`'s place, each time it runs."""
        assert self._listed is not None
        count = min(len(rows_TD), len(self._listed))
        listed = self._listed[:count]
        kept = rows_TD.index_select(0, listed).reshape(count, -1)
        if more_TD is not None:
            kept = kept + more_TD.index_select(0, listed).reshape(count, -1)
        sink[:count].copy_(kept)

    def _state_hook(self, index: int) -> Any:
        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            self.keep(_STATES, index, *_parts(output))

        return keep

    def _key_hook(self, index: int) -> Any:
        def keep(_module: nn.Module, args: Any, named: dict[str, Any]) -> None:
            if (keys := _keys_of(args, named)) is not None:
                self.keep(_KEYS, index, keys, None)

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


_current: Taps | None = None
"""The built-in taps of this process: an operator has no closure."""


def _parts(output: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    parts = output if isinstance(output, tuple) else (output,)
    return parts[0], parts[1] if len(parts) > 1 else None


def _keys_of(args: Any, named: dict[str, Any]) -> torch.Tensor | None:
    """The keys that an attention is called with, by place or by name; None where a layer shares another's."""
    keys: torch.Tensor | None = args[1] if len(args) > 1 else named.get("key")
    return keys


def _state_operator(index: int) -> Any:
    def keep(module: Any, _args: Any, output: Any) -> None:
        rows, more = _parts(output)
        torch.ops.fpforensics.tap(getattr(module, _SINK), rows, more, index, _STATES)

    return keep


def _key_operator(index: int) -> Any:
    def keep(module: Any, args: Any, named: dict[str, Any]) -> None:
        if (keys := _keys_of(args, named)) is not None:
            torch.ops.fpforensics.tap(getattr(module, _SINK), keys, None, index, _KEYS)

    return keep


def _tap(sink: torch.Tensor, rows: torch.Tensor, more: torch.Tensor | None, index: int, kind: int) -> None:
    if _current is None:
        return
    if rows.is_cuda and torch.cuda.is_current_stream_capturing():
        _current.copy(sink, rows, more)
    else:
        _current.keep(kind, index, rows, more)


_library = torch.library.Library("fpforensics", "FRAGMENT")
_library.define("tap(Tensor(a!) sink, Tensor rows, Tensor? more, int index, int kind) -> ()")
_library.impl("tap", _tap, "CPU")
_library.impl("tap", _tap, "CUDA")
_library._register_fake("tap", lambda sink, rows, more, index, kind: None)
