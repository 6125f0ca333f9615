"""Hooks on vLLM's decoder layers that keep chosen rows: the residual stream after a block, and the keys it caches.

A decoder layer returns two tensors whose sum is the residual stream; the sum is taken on the chosen rows alone, and rounds as
the next layer's fused addition does. Keys are the second argument of the attention itself: after RoPE, a rank's own heads.

Under ``torch.compile`` and CUDA graphs a hook's Python runs once, while the graph is made. There each hook is an operator of ours
in the model's graph, in every block, whether its rows are wanted or not: capture then changes no graph. Where compiled code calls
the operator, it keeps rows as a hook does. In a CUDA graph it copies rows into a fixed buffer: two fixed lists name them and where
they go, and are right before each replay. So the rows of many steps gather there, and are taken out of it together. All of that is
made ready for a step like the last one while the device still computes that: then nothing is left to do before the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

Kept = dict[int, torch.Tensor]
Gathered = dict[int, list[torch.Tensor]]
_STATES, _KEYS = 0, 1
_SINK = "evidence_rows"
_ROWS, _BYTES = 512, 1 << 28  # of a sink, and of all of them, where the largest graph does not need more


class Taps:
    """Hooks on the decoder layers of ``model``; of a pipeline stage, on those that it holds."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self._blocks = blocks
        self._handles: list[Any] = []
        self._wanted: frozenset[int] = frozenset()
        self._armed: torch.Tensor | None = None  # (R,) the rows of the coming forward, or of the last
        self._span: slice | None = None
        self._kept: tuple[Kept, Kept] = ({}, {})  # what the last forward left
        self._rows: tuple[Gathered, Gathered] = ({}, {})  # what all forwards did
        self._capacity = 0
        self._listed: torch.Tensor | None = None  # (capacity,) the rows that a CUDA graph copies,
        self._places: torch.Tensor | None = None  # (capacity,) and their places in the sinks
        self._every_place: torch.Tensor | None = None
        self._sinks: tuple[Kept, Kept] = ({}, {})
        self._room = self._used = 0  # rows of a sink; one more takes what nobody wants
        self._first = -1  # the place that the first of the armed rows has

    def build_in(self, capacity: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        """Make the hooks a part of the model's graph, once and for all. ``capacity`` is the largest CUDA graph's tokens."""
        global _current
        _current = self
        taps: list[tuple[int, int, Any, int]] = []
        for index, block in self._own():
            taps.append((_STATES, index, block, width))
            if (attention := key_source(block)) is not None:
                heads: Any = attention
                taps.append((_KEYS, index, attention, heads.num_kv_heads * heads.head_size))
        a_row = sum(size for *_, size in taps) * dtype.itemsize
        self._capacity = max(1, capacity)
        self._room = max(self._capacity, min(_ROWS, _BYTES // max(1, a_row))) if capacity else 1
        self._every_place = torch.arange(self._room, device=device)
        self._listed = torch.zeros(self._capacity, dtype=torch.int64, device=device)
        self._places = torch.full_like(self._listed, self._room)
        for kind, index, module, size in taps:
            sink = torch.empty((self._room + 1, size), dtype=dtype, device=device)
            module.register_buffer(_SINK, sink, persistent=False)
            self._sinks[kind][index] = sink
            if kind == _STATES:
                module.register_forward_hook(_state_operator(index))
            else:
                module.register_forward_pre_hook(_key_operator(index), with_kwargs=True)

    def _own(self) -> Iterator[tuple[int, nn.Module]]:
        """The blocks that this pipeline stage holds."""
        for index, block in enumerate(self._blocks):
            if any(True for _ in block.parameters()):
                yield index, block

    @property
    def is_idle(self) -> bool:
        """Whether no job is on. What a graph's copy does then is forgotten when one begins."""
        return self._armed is None

    def plant(self, wanted: Sequence[int]) -> None:
        """Listen to these blocks (0-based) and no others, from nothing on."""
        self.remove()
        self._wanted = frozenset(wanted)
        if self._listed is not None:
            self._forget(self._room)
            return
        for index in sorted(self._wanted):
            block = self._blocks[index]
            self._handles.append(block.register_forward_hook(self._state_hook(index)))
            attention = key_source(block)
            if attention is not None:
                self._handles.append(attention.register_forward_pre_hook(self._key_hook(index), with_kwargs=True))

    def arm(self, rows_R: torch.Tensor, span: slice | None = None) -> None:  # noqa: N803
        """Keep these rows (R,) of the next forward; ``span`` where they are neighbours, which saves their selection.

        Between the forwards of a job there are no others: a CUDA graph that ran unarmed would write to the next one's places.
        """
        count = len(rows_R)
        if self._listed is not None and count <= self._capacity:
            if rows_R is not self._armed:
                # Every entry, so that none points beyond a smaller graph's rows, or to a place that is taken.
                assert self._places is not None
                self._listed.zero_()
                self._listed[:count] = rows_R
                self._places[count:] = self._room
                self._first = -1
            self._make_room(count)
        self._armed, self._span, self._kept = rows_R, span, ({}, {})

    def _make_room(self, count: int) -> None:
        """The next rows' places are the first that are free."""
        assert self._places is not None and self._every_place is not None
        if self._used + count > self._room:
            self._empty()
        if count and self._first != self._used:
            self._places[:count] = self._every_place[self._used : self._used + count]
            self._first = self._used

    def passed(self) -> None:
        """The armed forward is through: its rows follow those of the forwards before it."""
        count = 0 if self._armed is None else len(self._armed)
        kept, self._kept = self._kept, ({}, {})
        if not count:
            return
        if not any(kept) and count <= self._capacity:  # no operator saw anything: it was a CUDA graph
            self._used += count
            self._make_room(count)
            return
        # A layer without keys of its own leaves what no graph wrote.
        others = [
            {i: self._written(sinks[i], count) for i in self._wanted & sinks.keys() if i not in found}
            for found, sinks in zip(kept, self._sinks, strict=True)
        ]
        written = self._used + count if any(others) else 0
        self._empty()
        self._forget(min(written, self._room))
        for found, other, rows in zip(kept, others, self._rows, strict=True):
            for index, own in (found | other).items():
                rows.setdefault(index, []).append(own)

    def collect(self) -> tuple[Gathered, Gathered]:
        """All that was kept since :meth:`plant`, in order: block -> parts (R, D) of the hidden states, and of the keys (R, heads * head_dim)."""
        self._empty()
        rows, self._rows = self._rows, ({}, {})
        return rows

    def remove(self) -> None:
        """Take the hooks off and forget what they kept; those that are built in fall silent, and a graph's read nothing."""
        self._wanted = frozenset()
        self._armed, self._used, self._first = None, 0, -1
        self._kept, self._rows = ({}, {}), ({}, {})
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._listed is not None and self._places is not None:
            with torch.inference_mode():
                self._listed.zero_()
                self._places.fill_(self._room)

    def _empty(self) -> None:
        """Take the rows that CUDA graphs wrote out of the sinks."""
        if not self._used:
            return
        for sinks, rows in zip(self._sinks, self._rows, strict=True):
            for index in self._wanted & sinks.keys():
                rows.setdefault(index, []).append(sinks[index][: self._used].clone())
        self._forget(self._used)
        self._used = 0

    def _written(self, sink: torch.Tensor, count: int) -> torch.Tensor:
        if count > self._capacity:
            return sink.new_full((count, sink.shape[1]), torch.nan)
        return sink[self._used : self._used + count].clone()

    def _forget(self, count: int) -> None:
        """Not numbers: rows that no graph wrote must not pass for captured ones."""
        if not count:
            return
        for sinks in self._sinks:
            for index in self._wanted & sinks.keys():
                sinks[index][:count].fill_(torch.nan)

    def keep(self, kind: int, index: int, rows_TD: torch.Tensor, more_TD: torch.Tensor | None) -> None:  # noqa: N803
        """Keep the armed rows of what a block computed: the sum of both parts."""
        armed, span = self._armed, self._span
        if armed is None or not len(armed) or index not in self._wanted:
            return
        if span is None:
            kept = rows_TD.index_select(0, armed)
            if more_TD is not None:
                kept = kept + more_TD.index_select(0, armed)
        elif len(armed) == len(rows_TD):  # never a view: vLLM writes over its buffers
            kept = rows_TD.clone() if more_TD is None else rows_TD + more_TD
        else:
            kept = rows_TD[span].clone() if more_TD is None else rows_TD[span] + more_TD[span]
        self._kept[kind][index] = kept if kept.dim() == 2 else kept.reshape(len(kept), -1)

    def copy(self, sink: torch.Tensor, rows_TD: torch.Tensor, more_TD: torch.Tensor | None) -> None:  # noqa: N803
        """What a CUDA graph does in :meth:`keep`'s place, each time it runs."""
        assert self._listed is not None and self._places is not None
        count = min(len(rows_TD), self._capacity)
        listed, places = self._listed[:count], self._places[:count]
        rows, more = rows_TD.reshape(len(rows_TD), -1), None if more_TD is None else more_TD.reshape(len(rows_TD), -1)
        if sink.is_cuda:
            from fpforensics.common.engines.vllm_tap_kernel import copy_rows

            copy_rows(sink, rows, more, listed, places)
            return
        kept = rows.index_select(0, listed)
        sink.index_copy_(0, places, kept if more is None else kept + more.index_select(0, listed))

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
    capturing = rows.is_cuda and torch.cuda.is_current_stream_capturing()
    # vLLM runs everything once before it makes graphs: a kernel cannot be compiled while one is made.
    if capturing or (rows.is_cuda and _current.is_idle):
        _current.copy(sink, rows, more)
    else:
        _current.keep(kind, index, rows, more)


_library = torch.library.Library("fpforensics", "FRAGMENT")
_library.define("tap(Tensor(a!) sink, Tensor rows, Tensor? more, int index, int kind) -> ()")
_library.impl("tap", _tap, "CPU")
_library.impl("tap", _tap, "CUDA")
_library._register_fake("tap", lambda sink, rows, more, index, kind: None)
