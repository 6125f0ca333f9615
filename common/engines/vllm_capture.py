"""Inside vLLM's worker: names the tokens of a job's requests and keeps the wanted rows of each forward.

Nothing here waits for the device between steps, apart from vLLM's own hand-over of sampled tokens and, at a temperature,
the log-probabilities that the draw needs. Rows stay on the device and come to the host once, in :meth:`Recorder.finish`.

The logits that decide a token are vLLM's own product, one row for each request; every other wanted row goes through a product
of its request's own, so that no token and no deciding row depends on what is captured. The log-probabilities are set aside,
and what is asked for taken of many rows together, where no token waits for it: each row's own, in the same order. ``_HELD`` bytes of
them wait, or one step's where these are more; for a while as many are copied, and as many more wait already.

B is the requests of one forward, R its wanted rows, D a width, V the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from fpforensics.common.engines.transformers_capture import log_probabilities, to_numpy
from fpforensics.common.engines.vllm_jobs import Job, Report, Rows, Task
from fpforensics.common.engines.vllm_steps import Run, Step
from fpforensics.common.engines.vllm_taps import Taps
from fpforensics.common.errors import ReplayError
from fpforensics.common.sampling import choose
from fpforensics.common.signals import PHASES, Array, Phase

_HELD = 1 << 27  # bytes of log-probabilities that wait for their top-k
_CHECKED = 1 << 26  # bytes of rows whose numbers are looked at together


class Recorder:
    """One job in one worker. ``product`` computes logits (m, V) of final hidden states (m, D)."""

    def __init__(
        self,
        job: Job,
        taps: Taps,
        product: Callable[[torch.Tensor], torch.Tensor],
        device: torch.device,
        ranks: tuple[int, int],
    ) -> None:
        self._job, self._taps, self._product, self._device, self._ranks = job, taps, product, device, ranks
        self._tasks = {task.key: task for task in job.tasks}
        self._computed = dict.fromkeys(self._tasks, 0)
        self._claimed_RK, self._claimed_row = _claims(job.tasks, device)
        self._steps: list[tuple[int, int]] = []
        self._phases: set[Phase] = set()
        self._failed = self._hint = ""
        self._step: Step | None = None
        self._run: Run | None = None
        self._states: torch.Tensor | None = None
        self._entries: list[tuple[str, int]] = []  # (task, slot) of each kept row, in order
        self._columns: dict[str, list[torch.Tensor]] = {"ids": [], "logprobs": [], "chosen": [], "logits": []}
        self._held: list[_Held] = []
        self._held_bytes = 0
        self._aside = _Aside(device)
        # Chosen log-probabilities in steps of which not every row is kept; 0 of requests that are not measured.
        self._seen: list[torch.Tensor] = []
        self._slots = {
            task.key: dict(zip(task.positions.tolist(), range(len(task.positions)), strict=True)) for task in job.tasks
        }

    def before_forward(self, request_ids: Sequence[str], starts: Array, lengths: Array) -> None:
        """The next forward computes, for each request in order, ``lengths`` positions from ``starts`` on (B,)."""
        self._steps.append((len(request_ids), int(lengths.sum())))
        step = None if self._run is None else self._run.next(request_ids, starts, lengths)
        if step is None:
            self._settle()
            step = self._placed(request_ids, starts, lengths)
            if step.is_steady:
                self._run = Run(request_ids, starts, step, self._claimed_RK is not None)
        else:
            self._phases.add("decode")  # each request had come to its prompt's last position, or beyond
        self._step = step
        self._taps.arm(step.rows_R, step.span)

    def _settle(self) -> None:
        """Write down how far the requests of a run came, and end it."""
        if self._run is not None:
            for (task, _), start in zip(self._run.step.deciding, self._run.starts.tolist(), strict=True):
                assert task is not None
                self._computed[task.key] = start + 1
            self._run = None

    def _placed(self, request_ids: Sequence[str], starts: Array, lengths: Array) -> Step:
        step = Step()
        offset = 0
        for index, (request_id, start, length) in enumerate(zip(request_ids, starts, lengths, strict=True)):
            task = self._tasks[request_id.partition("-")[0]]
            start, length = int(start), int(length)
            self._phases.add("prefill" if start < len(task.fed_ids) else "decode")
            if start != self._computed[task.key] and not self._failed:
                self._failed = f"{task.reference_id} was interrupted at position {self._computed[task.key]}"
                self._hint = "the KV cache is too small for the batch: use fewer or shorter references, or more memory"
            self._computed[task.key] = start + length
            slots = self._slots[task.key] if self._job.capture and not self._failed else {}
            step.place(index, task, start, length, offset, slots)
            offset += length
        step.upload(self._claimed_row, self._device, bool((lengths == 1).all()) and not self._job.capture)
        return step

    def after_forward(self, states: Any) -> None:
        """``states`` (T, D) after the final norm, where this rank has them."""
        step = self._step
        assert step is not None
        self._taps.passed()
        self._entries += step.wanted
        if step.extra and isinstance(states, torch.Tensor):
            self._states = states.index_select(0, step.rows_R[: step.extra])

    def choose_tokens(self, logits_BV: torch.Tensor) -> torch.Tensor:  # noqa: N803
        """The next token of each request (B,) int64; those of requests that are not through their prompt count for nothing."""
        step = self._step
        assert step is not None
        logprobs_BV = log_probabilities(logits_BV)  # noqa: N806
        tokens_B = torch.argmax(logprobs_BV, dim=-1)  # the first, that is the lowest id, among equals # noqa: N806
        named = [self._named(task, number, logprobs_BV, i) for i, (task, number) in enumerate(step.deciding)]
        if any(token >= 0 for token in named):
            named_B = torch.tensor(named, device=self._device)  # noqa: N806
            tokens_B = torch.where(named_B >= 0, named_B, tokens_B)  # noqa: N806
        if self._job.capture:
            self._record(step, logits_BV, logprobs_BV, tokens_B)
        return tokens_B

    def finish(self) -> Report:
        """Everything on the host."""
        pipeline_rank, tensor_rank = self._ranks
        failed, hint = self._failed, self._hint
        self._reduce()
        self._aside.join()
        if not failed and not self._all_finite():
            failed, hint = "the logits are not finite", "the model overflows in this dtype: use dtype=bf16 or fp32"
        if ids := self._columns["ids"]:
            self._columns["ids"] = [torch.cat(ids).to(torch.int32)]
        deal = _Deal(self._job.tasks, self._entries, self._device)
        rows = {task.key: Rows(key=task.key) for task in self._job.tasks if len(task.positions)}
        hidden, keys = self._taps.collect()
        if tensor_rank == 0:
            for name, parts in self._columns.items():
                deal(parts, lambda key, part, name=name: setattr(rows[key], name, part))  # type: ignore[misc]
            for block, parts in hidden.items():
                deal(parts, lambda key, part, block=block: rows[key].hidden.update({block: part}))  # type: ignore[misc]
        for block, parts in keys.items():
            deal(parts, lambda key, part, block=block: rows[key].keys.update({block: part}))  # type: ignore[misc]
        return Report(
            pipeline_rank=pipeline_rank,
            tensor_rank=tensor_rank,
            steps=self._steps,
            phases=[phase for phase in PHASES if phase in self._phases],
            rows=list(rows.values()),
            finite=deal.finite,
            failed=failed,
            hint=hint,
        )

    def _all_finite(self) -> bool:
        chosen = [*self._seen, *self._columns["chosen"]]
        return not chosen or bool(torch.isfinite(torch.cat(chosen)).all())

    def _named(self, task: Task | None, number: int, logprobs_BV: torch.Tensor, index: int) -> int:  # noqa: N803
        """The token of request ``index`` that is not simply the most likely one, or -1."""
        if task is None or task.greedy:
            return -1
        if task.forced_ids is not None:
            return int(task.forced_ids[number])
        if self._job.sampling.temperature == 0.0:
            return -1
        return choose(logprobs_BV[index].cpu().numpy(), self._job.sampling, task.reference_id, number)

    def _record(
        self,
        step: Step,
        logits_BV: torch.Tensor,  # noqa: N803
        logprobs_BV: torch.Tensor,  # noqa: N803
        tokens_B: torch.Tensor,  # noqa: N803
    ) -> None:
        for low, high in step.products:
            assert self._states is not None
            logits_mV = self._product(self._states[low:high])  # noqa: N806
            self._keep_logits(logits_mV)
            self._hold(_Held(step.claims[low:high], log_probabilities(logits_mV), step.next_ids[low:high]))
        self._states = None
        deciding = _Held(step.claims[step.extra :], logprobs_BV, tokens_B)
        if not step.of_every_request:
            self._seen.append(deciding.chosen_m.where(step.measured_B, 0.0))
            if len(step.wanted) == step.extra:
                return
            deciding = deciding.of(step.requests)
            logits_BV = logits_BV.index_select(0, step.requests) if self._job.full_logits else logits_BV  # noqa: N806
        self._keep_logits(logits_BV)
        self._hold(deciding)

    def _hold(self, rows: _Held) -> None:
        if self._held_bytes + rows.logprobs_mV.nbytes > _HELD:
            self._reduce()
        self._held.append(rows)
        self._held_bytes += rows.logprobs_mV.nbytes

    def _reduce(self) -> None:
        """Keep of the rows that are held what was asked for."""
        if not self._held:
            return
        parts, self._held, self._held_bytes = self._held, [], 0
        claimed = [] if self._claimed_RK is None else [self._claimed_RK]
        with self._aside.of([*claimed, *(each for part in parts for each in part)]):
            held = parts[0] if len(parts) == 1 else _Held(*(torch.cat(each) for each in zip(*parts, strict=True)))
            if self._claimed_RK is None:
                values, ids = torch.topk(held.logprobs_mV, min(self._job.top_k, held.logprobs_mV.shape[-1]), dim=-1)
            else:
                ids = self._claimed_RK.index_select(0, held.claims_m)
                values = held.logprobs_mV.gather(-1, ids)
            for name, column in (("ids", ids), ("logprobs", values), ("chosen", held.chosen_m)):
                self._columns[name].append(column)

    def _keep_logits(self, logits_mV: torch.Tensor) -> None:  # noqa: N803
        if self._job.full_logits:
            self._columns["logits"].append(logits_mV.clone())


class _Held(NamedTuple):
    """Wanted rows (m,): which claims they answer, their log-probabilities, and the tokens that follow."""

    claims_m: torch.Tensor
    logprobs_mV: torch.Tensor  # noqa: N815
    tokens_m: torch.Tensor

    @property
    def chosen_m(self) -> torch.Tensor:
        return self.logprobs_mV.gather(-1, self.tokens_m[:, None])[:, 0]

    def of(self, requests: torch.Tensor) -> _Held:
        """Some of a step's rows; the claims are theirs already."""
        return _Held(self.claims_m, *(each.index_select(0, requests) for each in self[1:]))


class _Aside:
    """A line of work of its own on a GPU, which no token waits for."""

    _streams: ClassVar[dict[torch.device, torch.cuda.Stream]] = {}

    def __init__(self, device: torch.device) -> None:
        if device.type == "cuda" and device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        self._stream = self._streams.get(device)

    @contextmanager
    def of(self, given: Iterable[torch.Tensor]) -> Iterator[None]:
        """What is done here comes after all that was done so far; ``given`` is what it reads."""
        if self._stream is None:
            yield
            return
        for each in given:  # its memory is not given to others while this runs, whatever becomes of the job
            each.record_stream(self._stream)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """What follows comes after all that was done aside."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)


class _Deal:
    """Brings kept rows to the host, each task's together in the order of its positions: put in order on the device, so that
    every share is a view of one transfer.
    """

    def __init__(self, tasks: Sequence[Task], entries: Sequence[tuple[str, int]], device: torch.device) -> None:
        self._count = len(entries)
        number = {task.key: index for index, task in enumerate(tasks)}
        owner = np.array([number[key] for key, _ in entries], np.int64)
        slots = np.array([slot for _, slot in entries], np.int64)
        order = np.lexsort((slots, owner)) if entries else owner
        edges = np.searchsorted(owner[order], np.arange(len(tasks) + 1))
        self._shares = {
            task.key: slice(edges[i], edges[i + 1]) for i, task in enumerate(tasks) if edges[i + 1] > edges[i]
        }
        self._finite = [torch.ones((), dtype=torch.bool, device=device)]
        sorted_already = bool((order[1:] > order[:-1]).all())
        self._order = None if sorted_already else torch.from_numpy(order).to(device)

    @property
    def finite(self) -> bool:
        """Whether every number that was given so far is one."""
        return bool(torch.stack(self._finite).all())

    def __call__(self, parts: list[torch.Tensor], give: Callable[[str, Array], None]) -> None:
        """``give`` each task its share of the rows in ``parts``."""
        if not parts:
            return
        rows = torch.cat(parts)
        if len(rows) != self._count:
            raise ReplayError(
                f"{len(rows)} rows were kept of {self._count}", "this is an error of ours: please report it"
            )
        parts.clear()  # the device's memory is nearly all taken
        if rows.dtype.is_floating_point:
            for some in rows.split(max(1, _CHECKED * len(rows) // max(1, rows.nbytes))):
                self._finite.append(torch.isfinite(some).all())
        every = to_numpy(rows if self._order is None else rows.index_select(0, self._order))
        for key, share in self._shares.items():
            give(key, every[share])


def _claims(tasks: Sequence[Task], device: torch.device) -> tuple[torch.Tensor | None, dict[str, int]]:
    """All claimed ids (rows, K) on the device, narrower ones filled up with id 0, and each task's first row in them."""
    first: dict[str, int] = {}
    count = 0
    for task in tasks:
        first[task.key] = count
        count += len(task.positions)
    claimed = [(task.key, task.claimed_ids) for task in tasks if task.claimed_ids is not None]
    if not claimed:
        return None, first
    every = np.zeros((count, max(ids.shape[1] for _, ids in claimed)), np.int64)
    for key, ids in claimed:
        every[first[key] : first[key] + len(ids), : ids.shape[1]] = ids
    return torch.from_numpy(every).to(device), first
