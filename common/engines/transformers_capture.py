"""Keeps the wanted rows of a forward pass on the device and turns them into traces at the end.

Nothing here waits for the device until :meth:`PhaseRecorder.finish`. M is captured positions, m those of one
forward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import nn

from fpforensics.common.engines.rows import require_finite
from fpforensics.common.errors import ReplayError
from fpforensics.common.signals import Array, CapturePlan, Phase, PhaseTrace
from fpforensics.common.words import counted

_ROWS_AT_ONCE = 64
_MOST_LOCKED = 1 << 28
"""Bytes of one array that may lie in page-locked memory: it is the host's, cannot be swapped, and stays so while the array lives."""


def decoder_blocks(model: nn.Module, depth: int) -> nn.ModuleList:
    """The list of decoder blocks: the outermost module list as long as the model is deep."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ReplayError(f"{type(model).__name__} has no list of {depth} decoder blocks", "capture needs one")


class BlockTaps:
    """Forward hooks on decoder blocks that keep chosen rows of the measured sequence's (batch row 0) outputs."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        self._blocks = blocks
        self._handles: list[Any] = []
        self._rows: torch.Tensor | None = None
        self._kept: dict[int, torch.Tensor] = {}

    def plant(self, wanted: Sequence[int]) -> None:
        """Listen to these blocks (0-based) and no others."""
        self.remove()
        self._handles = [self._blocks[i].register_forward_hook(self._hook(i)) for i in sorted(set(wanted))]

    def arm(self, rows: torch.Tensor | None) -> None:
        """Keep these rows (m,) of the sequence dimension in the next forward; None keeps nothing."""
        self._rows = rows

    def take(self) -> dict[int, torch.Tensor]:
        """What the last forward left: block -> (m, D)."""
        kept, self._kept = self._kept, {}
        return kept

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _hook(self, block: int) -> Any:
        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            if self._rows is not None:
                states_BTD = output[0] if isinstance(output, tuple) else output  # noqa: N806
                self._kept[block] = states_BTD[0].index_select(0, self._rows)

        return keep


def cached_keys(cache: Any, blocks: Sequence[int], positions: torch.Tensor, first: int) -> dict[int, torch.Tensor]:
    """The keys of batch row 0 at absolute ``positions`` (m,): block -> (m, heads * head_dim), as the cache
    holds them.

    ``first`` is the lowest position: a sliding window may have dropped it. Blocks without a key cache are
    left out.
    """
    found: dict[int, torch.Tensor] = {}
    for block in blocks:
        keys_BHLD = _keys_of(cache, block)  # noqa: N806
        if keys_BHLD is None:
            continue
        dropped = cache.layers[block].get_seq_length() - keys_BHLD.shape[2]
        if first < dropped:
            raise ReplayError(
                f"block {block + 1} keeps a sliding window: its key at position {first} is gone",
                "replay in decode mode, or capture fewer prefill positions",
            )
        rows_HmD = keys_BHLD[0].index_select(1, positions - dropped)  # noqa: N806
        found[block] = rows_HmD.transpose(0, 1).reshape(len(positions), -1)
    return found


def last_keys(cache: Any, blocks: Sequence[int]) -> dict[int, torch.Tensor]:
    """The keys of batch row 0 at the newest position: block -> (1, heads * head_dim)."""
    found: dict[int, torch.Tensor] = {}
    for block in blocks:
        keys_BHLD = _keys_of(cache, block)  # noqa: N806
        if keys_BHLD is not None:
            found[block] = keys_BHLD[0, :, -1].clone().reshape(1, -1)  # a clone lets go of the rest of the cache
    return found


def _keys_of(cache: Any, block: int) -> torch.Tensor | None:
    keys = getattr(cache.layers[block], "keys", None) if block < len(cache.layers) else None
    return keys if isinstance(keys, torch.Tensor) and keys.ndim == 4 else None


def log_probabilities(logits_mV: torch.Tensor) -> torch.Tensor:  # noqa: N803
    """Natural log-probabilities (m, V) float32 over the whole vocabulary, computed in float32 (float64 for
    float64 logits).
    """
    wide = logits_mV if logits_mV.dtype == torch.float64 else logits_mV.float()
    return torch.log_softmax(wide, dim=-1).float()


class PhaseRecorder:
    """Collects one reference's rows of one phase.

    ``claimed_MK`` are the ids to report at each position; None reports the top ``plan.top_k``.
    """

    def __init__(
        self,
        phase: Phase,
        positions: Array,
        plan: CapturePlan,
        blocks: Mapping[str, int],
        device: torch.device,
        claimed_MK: Array | None = None,  # noqa: N803
    ) -> None:
        self.phase, self.positions, self._plan, self._blocks = phase, positions, plan, blocks
        self._claimed_MK = None if claimed_MK is None else _ids_on(claimed_MK, device)
        self._done = 0
        self._columns: dict[str, list[torch.Tensor]] = {"ids": [], "logprobs": [], "chosen": [], "logits": []}
        self._hidden: dict[int, list[torch.Tensor]] = {}
        self._keys: dict[int, list[torch.Tensor]] = {}

    def wants(self, position: int) -> bool:
        """Whether the next row to record is this position (rows come in order)."""
        return self._done < len(self.positions) and int(self.positions[self._done]) == position

    def add(
        self,
        logits_mV: torch.Tensor,  # noqa: N803
        logprobs_mV: torch.Tensor,  # noqa: N803
        next_ids_m: torch.Tensor,
        hidden: Mapping[int, torch.Tensor],
        keys: Mapping[int, torch.Tensor],
    ) -> None:
        """Record the next m positions. ``next_ids_m`` are the tokens that follow them."""
        count = len(logits_mV)
        if self._claimed_MK is None:
            top = torch.topk(logprobs_mV, min(self._plan.top_k, logprobs_mV.shape[-1]), dim=-1)
            ids, values = top.indices, top.values
        else:
            ids = self._claimed_MK[self._done : self._done + count]
            values = logprobs_mV.gather(-1, ids)
        self._columns["ids"].append(ids)
        self._columns["logprobs"].append(values)
        self._columns["chosen"].append(logprobs_mV.gather(-1, next_ids_m[:, None])[:, 0])
        if self._plan.full_logits:
            self._columns["logits"].append(logits_mV.clone())
        for block, rows in hidden.items():
            self._hidden.setdefault(block, []).append(rows)
        for block, rows in keys.items():
            self._keys.setdefault(block, []).append(rows)
        self._done += count

    def finish(self, reference_id: str) -> PhaseTrace:
        """Everything on the host. Raises :class:`ReplayError` naming the first row that is not finite."""
        if self._done != len(self.positions):
            raise ReplayError(
                f"{reference_id}: {self._done} of {counted(len(self.positions), f'{self.phase} position')} ran", ""
            )
        hidden = {block: to_numpy(torch.cat(rows)) for block, rows in self._hidden.items()}
        keys = {block: to_numpy(torch.cat(rows)) for block, rows in self._keys.items()}
        empty = np.zeros((0, self._plan.top_k if self._claimed_MK is None else self._claimed_MK.shape[1]))
        columns = {name: to_numpy(torch.cat(rows)) if rows else empty for name, rows in self._columns.items()}
        trace = PhaseTrace(
            positions=self.positions.astype(np.int32),
            logprob_ids=columns["ids"].astype(np.int32),
            logprobs=columns["logprobs"].astype(np.float32),
            chosen_logprobs=columns["chosen"].reshape(self._done).astype(np.float32),
            hidden_states={layer: hidden[block] for layer, block in self._blocks.items() if block in hidden},
            key_vectors={layer: keys[block] for layer, block in self._blocks.items() if block in keys},
            logits=columns["logits"] if self._plan.full_logits and self._done else None,
        )
        require_finite(trace, reference_id, self.phase)
        return trace


def record_rows(
    recorders: Sequence[PhaseRecorder],
    logits_mV: torch.Tensor,  # noqa: N803
    next_ids_m: torch.Tensor,
    hidden: Mapping[int, torch.Tensor],
    keys: Mapping[int, torch.Tensor],
) -> None:
    """Hand the rows of one forward to the recorders in turn, a bounded number of log-softmax rows at once."""
    start = 0
    for recorder in recorders:
        end = start + len(recorder.positions)
        for low in range(start, end, _ROWS_AT_ONCE):
            part = slice(low, min(low + _ROWS_AT_ONCE, end))
            recorder.add(
                logits_mV[part],
                log_probabilities(logits_mV[part]),
                next_ids_m[part],
                {block: rows[part] for block, rows in hidden.items()},
                {block: rows[part] for block, rows in keys.items()},
            )
        start = end


def _ids_on(ids: Array, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(ids, dtype=np.int64)).to(device)


def to_numpy(rows: torch.Tensor) -> Array:
    """The same bits on the host; bfloat16 becomes ``ml_dtypes.bfloat16``. From a GPU through page-locked memory, at several times the speed."""
    rows = rows.detach()
    host = _page_locked(rows) if rows.is_cuda and rows.nbytes <= _MOST_LOCKED else None
    host = rows.cpu().contiguous() if host is None else host.copy_(rows)
    if host.dtype == torch.bfloat16:
        bits: Array = host.view(torch.uint16).numpy()
        return bits.view(ml_dtypes.bfloat16)
    array: Array = host.numpy()
    return array


def _page_locked(rows: torch.Tensor) -> torch.Tensor | None:
    """Memory of the host for a copy of ``rows``; None where no more can be locked."""
    try:
        return torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
    except RuntimeError:
        return None
