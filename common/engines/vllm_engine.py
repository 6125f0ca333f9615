"""The vLLM engine: vLLM's own scheduler, kernels and batches; our choice of tokens, and capture.

- Generation and a decode replay are the same steps: who names the tokens is decided after the logits, so on the same kernels
  they agree bit for bit. Always exactly ``max_new_tokens`` tokens; token N is never fed.
- The row of logits that decides a token is vLLM's own product, whatever is captured.
- ``batch_size`` B runs a measured sequence with B - 1 neighbours (rotations of it, continued greedily), all in every forward; with
  ``batch=auto`` all references of a call run together, as vLLM schedules them.
- ``teacher_force(mode="prefill")`` is one forward over prompt and output, cut into chunks only if the config says so.
- Hidden states are the residual stream after a block; keys are those that the attention is given, after RoPE, of all ranks in the
  order of their heads. A quantized KV cache holds them rounded further.
- ``concurrent_work`` runs on every rank, beside generations and replays alike; facts tell of the rank where it overlapped least.
- Prefix caching is off: a cached prefix is not computed again. A request that vLLM interrupted is an error, not evidence.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import msgspec
import numpy as np

from fpforensics.common.config import ExecutionConfig
from fpforensics.common.engines import vllm_compat as compat
from fpforensics.common.engines.base import ConcurrentWork, EngineFacts, Host, Progress, ReplayMode
from fpforensics.common.engines.concurrent_work import Accompaniment
from fpforensics.common.engines.rows import planned_blocks
from fpforensics.common.engines.transformers_batch import (
    check_forcing,
    check_plan,
    check_reference,
    phase_request,
    with_neighbours,
)
from fpforensics.common.engines.vllm_jobs import Job, Report, Task, WorkerFacts, pack, unpack
from fpforensics.common.engines.vllm_load import explained, prepare_imports, start
from fpforensics.common.engines.vllm_results import Schedule, engine_facts, require_kernels, trace_of
from fpforensics.common.engines.vllm_rules import check_checkpoint, check_config, check_host
from fpforensics.common.errors import ReplayError, UnknownModelError, UsageError
from fpforensics.common.models import resolve_model, weights_digest
from fpforensics.common.sampling import check_sampling
from fpforensics.common.signals import Array, CapturePlan, Forcing, Reference, Sampling, Trace, generation_positions


@dataclass(frozen=True)
class _Run:
    """One measured request. ``widths`` are the ids asked for in prefill and decode; None for the top ones."""

    task: Task
    count: int  # tokens that vLLM is to make
    prompt: int  # length of the prompt
    output_ids: Array | None = None
    widths: tuple[int, int] | None = None


@dataclass(frozen=True)
class _RanksLoad:
    """Concurrent work on every rank, driven by vLLM's own calls."""

    call: Callable[[str], list[Any]]

    def begin(self) -> None:
        """As :meth:`Load.begin`."""
        try:
            self.call("evidence_load_begin")
        except BaseException:
            self.abandon()
            raise

    def end(self) -> ConcurrentWork:
        """As :meth:`Load.end`: what the rank says whose overlap was the least."""
        try:
            ranks = [unpack(data, ConcurrentWork) for data in self.call("evidence_load_end")]
        except BaseException:
            self.abandon()
            raise
        return min(ranks, key=lambda each: each.overlap)

    def abandon(self) -> None:
        """As :meth:`Load.abandon`."""
        with contextlib.suppress(Exception):
            self.call("evidence_load_abandon")


class VllmEngine:
    """One execution config, loaded in this process. ``config`` has its weights digest filled in.

    One at a time: vLLM's groups of ranks belong to the process, and whichever engine closes takes them along.
    """

    config: ExecutionConfig
    _open: ClassVar[bool] = False

    def __init__(self, config: ExecutionConfig, host: Host | None = None) -> None:
        host = host or Host()
        if VllmEngine._open:
            raise ReplayError("another vLLM engine is open in this process", "close it, or start each in a worker")
        check_config(config)
        check_host(config, host)
        checkpoint = resolve_model(config.model, config.revision, host.models)
        check_checkpoint(config, checkpoint.path)
        digest = weights_digest(checkpoint.path)
        if config.weights_digest not in ("", digest):
            raise UnknownModelError(
                f"the weights of model {config.model!r} here are {digest}, not {config.weights_digest}",
                "map the name to a folder with those weights",
            )
        self._device = prepare_imports(config, host.device)
        self.config = msgspec.structs.replace(config, weights_digest=digest)
        self._schedule = Schedule()
        self._beside: Accompaniment | None = None
        with explained(config, self._device):
            self._core: Any = start(config, checkpoint.path, self._device)
            VllmEngine._open = True
            try:
                self._ranks = [unpack(data, WorkerFacts) for data in self._core.collective_rpc("evidence_facts")]
                require_kernels(self.config, self._ranks)
            except BaseException:
                self.close()
                raise
        self.vocab_size = self._ranks[0].vocab_size
        self._max_length = int(self._core.vllm_config.model_config.max_model_len)
        self._budget = int(self._core.vllm_config.scheduler_config.max_num_batched_tokens)
        if config.concurrent_work:
            self._beside = Accompaniment(_RanksLoad(self._core.collective_rpc))

    def generate(
        self,
        references: Sequence[Reference],
        sampling: Sampling,
        capture: CapturePlan | None,
        progress: Progress | None = None,
    ) -> list[Trace]:
        """As :meth:`Engine.generate`; ``capture`` None captures nothing at all (for measuring what capture costs)."""
        check_sampling(sampling)
        plan = capture or CapturePlan(layers=())
        check_plan(plan)
        runs: list[_Run] = []
        for number, reference in enumerate(references):
            check_reference(reference, self.vocab_size)
            prompt, count = len(reference.prompt_ids), sampling.max_new_tokens
            wanted = np.concatenate(generation_positions(prompt, count, plan))
            task = Task(
                key=f"r{number}",
                reference_id=reference.id,
                fed_ids=np.array(reference.prompt_ids, np.int32),
                positions=wanted if capture is not None else wanted[:0],
            )
            runs.append(_Run(task, count, prompt))
        return self._run(runs, plan, sampling, progress, steps=True, capture=capture is not None)

    def teacher_force(
        self,
        forcings: Sequence[Forcing],
        capture: CapturePlan,
        mode: ReplayMode,
        progress: Progress | None = None,
    ) -> list[Trace]:
        """As :meth:`Engine.teacher_force`. Of ``capture`` the layers and ``full_logits`` count."""
        check_plan(capture)
        for forcing in forcings:
            check_forcing(forcing, self.vocab_size)
        runs = [_forced(number, forcing, mode) for number, forcing in enumerate(forcings)]
        return self._run(runs, capture, Sampling(), progress, steps=mode == "decode")

    def facts(self) -> EngineFacts:
        """What really ran, up to now: attention kernels and batch sizes are empty before the first forward."""
        self._running()
        facts = engine_facts(self.config, self._device, self._ranks, self._schedule)
        return msgspec.structs.replace(facts, concurrent_work=list(self._beside.done)) if self._beside else facts

    def close(self) -> None:
        """End vLLM: its ranks' processes, and this process's device memory."""
        core, self._core, self._beside = self._core, None, None
        if core is None:
            return
        with contextlib.suppress(Exception):
            core.engine_core.shutdown()
        del core
        VllmEngine._open = False
        gc.collect()
        compat.free(self._device)

    def _run(
        self,
        runs: Sequence[_Run],
        plan: CapturePlan,
        sampling: Sampling,
        progress: Progress | None,
        *,
        steps: bool,
        capture: bool = True,
    ) -> list[Trace]:
        """Run them, with the concurrent work beside them if the config has it. ``steps``: their batches count."""
        self._running()
        for run in runs:
            self._require_room(run)
        with explained(self.config, self._device), self._beside.running() if self._beside else contextlib.nullcontext():
            return self._run_through(runs, plan, sampling, progress, steps=steps, capture=capture)

    def _run_through(
        self,
        runs: Sequence[_Run],
        plan: CapturePlan,
        sampling: Sampling,
        progress: Progress | None,
        *,
        steps: bool,
        capture: bool,
    ) -> list[Trace]:
        """Together with ``batch=auto``, else one after the other, each with its neighbours."""
        blocks = planned_blocks(plan.layers, self._ranks[0].num_layers)
        together = self.config.batch_size == 0
        groups = [list(runs)] if together and runs else [[run] for run in runs]
        traces: list[Trace] = []
        done = 0

        def finished(key: str) -> None:
            nonlocal done
            if key.startswith("r"):
                done += 1
                if progress is not None:
                    progress(done, len(runs))

        for group in groups:
            tasks = [run.task for run in group]
            if not together:
                tasks += self._neighbours(group[0].task)
            job = Job(
                tasks=tasks,
                blocks=sorted(set(blocks.values())),
                top_k=plan.top_k,
                full_logits=plan.full_logits,
                sampling=sampling,
                capture=capture,
            )
            with explained(self.config, self._device):
                outputs, reports = self._drive(job, {task.key: group[0].count for task in tasks}, group, finished)
            self._check(reports, len(tasks), together)
            self._schedule.add(reports[0], steps)
            for run in group:
                output_ids = outputs[run.task.key] if run.output_ids is None else run.output_ids
                traces.append(
                    trace_of(run.task, run.prompt, output_ids, run.widths, plan, blocks, reports, self._ranks)
                )
        return traces

    def _drive(
        self, job: Job, counts: dict[str, int], group: Sequence[_Run], finished: Callable[[str], None]
    ) -> tuple[dict[str, Array], list[Report]]:
        """Feed the job's requests to vLLM and step until all are through: output ids by key, and each rank's report."""
        counts = counts | {run.task.key: run.count for run in group}
        core = self._core
        core.collective_rpc("evidence_begin", args=(pack(job),))
        try:
            for task in job.tasks:
                prompt = compat.token_prompt(task.fed_ids.tolist())
                core.add_request(task.key, prompt, compat.request_parameters(counts[task.key]))
            outputs: dict[str, Array] = {}
            while core.has_unfinished_requests():
                for output in core.step():
                    if output.finished:
                        outputs[output.request_id] = np.array(output.outputs[0].token_ids, dtype=np.int32)
                        finished(output.request_id)
            alone = len(self._ranks) == 1
            reports = core.collective_rpc("evidence_finish", args=(alone,))
            return outputs, reports if alone else [unpack(data, Report) for data in reports]
        except BaseException:
            with contextlib.suppress(Exception):
                core.abort_request([task.key for task in job.tasks])
                core.collective_rpc("evidence_abandon")
            raise

    def _neighbours(self, task: Task) -> list[Task]:
        rows = with_neighbours(task.fed_ids, self.config.batch_size, self.vocab_size)[1:]
        none = np.zeros(0, np.int32)
        return [
            Task(key=f"n{i}", reference_id="", fed_ids=row.astype(np.int32), positions=none, greedy=True)
            for i, row in enumerate(rows)
        ]

    def _require_room(self, run: _Run) -> None:
        length, batch = len(run.task.fed_ids), self.config.batch_size
        if length + run.count > self._max_length:
            raise UsageError(
                f"{run.task.reference_id}: {length} tokens and {run.count} new ones are more than the {self._max_length} "
                "that vLLM was loaded for",
                "use shorter references",
            )
        whole = batch > 1 or (batch == 1 and not self.config.max_batched_tokens)
        if whole and batch * length > self._budget:
            raise UsageError(
                f"{run.task.reference_id}: {batch} sequences of {length} tokens do not fit one forward of {self._budget} tokens",
                "use a smaller batch, shorter references, or chunk=N with batch=1",
            )

    def _check(self, reports: Sequence[Report], batch: int, together: bool) -> None:
        for report in reports:
            if report.failed:
                raise ReplayError(report.failed, report.hint)
            if not together and any(requests != batch for requests, _ in report.steps):
                sizes = sorted({requests for requests, _ in report.steps})
                raise ReplayError(
                    f"vLLM ran batches of {', '.join(map(str, sizes))} where batch={batch} was asked for",
                    "use a smaller batch or shorter references",
                )

    def _running(self) -> None:
        if self._core is None:
            raise ReplayError("the engine is closed", "open another one")


def _forced(number: int, forcing: Forcing, mode: ReplayMode) -> _Run:
    """What replays a forcing: generation's own steps, or one forward over prompt and output."""
    reference = forcing.reference
    output_ids = np.array(forcing.output_ids, dtype=np.int32)
    requests = [phase_request(forcing, phase) for phase in ("prefill", "decode")]
    positions = np.concatenate([where for where, _ in requests]).astype(np.int32)
    widths = tuple(ids.shape[1] for _, ids in requests)
    claimed = np.zeros((len(positions), max(widths)), np.int32)
    start = 0
    for where, ids in requests:
        claimed[start : start + len(where), : ids.shape[1]] = ids
        start += len(where)
    prompt_ids = np.array(reference.prompt_ids, np.int32)
    at_once = mode == "prefill"
    task = Task(
        key=f"r{number}",
        reference_id=reference.id,
        fed_ids=np.concatenate([prompt_ids, output_ids[:-1]]) if at_once else prompt_ids,
        positions=positions,
        forced_ids=output_ids[-1:] if at_once else output_ids,
        claimed_ids=claimed,
    )
    return _Run(task, 1 if at_once else len(output_ids), len(prompt_ids), output_ids, (widths[0], widths[1]))
