"""What vLLM's ranks recorded, put together: traces and facts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import groupby

import numpy as np

from fpforensics.common.config import ExecutionConfig
from fpforensics.common.engines.base import EngineFacts, ModelFacts
from fpforensics.common.engines.rows import require_finite
from fpforensics.common.engines.vllm_jobs import Report, Rows, Task, WorkerFacts
from fpforensics.common.environment import installed_versions
from fpforensics.common.errors import ReplayError
from fpforensics.common.signals import Array, CapturePlan, Phase, PhaseTrace, Trace

_MOST_CHARACTERS = 1000
_ATTENTION = {
    "vllm_flash_attn_2": "FLASH_ATTN (version 2",
    "vllm_flash_attn_3": "FLASH_ATTN (version 3",
    "vllm_triton": "TRITON_ATTN",
    "vllm_flex": "FLEX_ATTENTION",
    "vllm_cpu": "CPU_ATTN",
}


class Schedule:
    """The batches that ran: their sizes, whether prefill and decode were among them, and the last steps in short."""

    def __init__(self) -> None:
        self.batch_sizes: set[int] = set()
        self.phases: set[Phase] = set()
        self.last = ""

    def add(self, report: Report, remember: bool) -> None:
        """One job's forwards; ``remember``: they are the last steps now."""
        self.batch_sizes |= {requests for requests, _ in report.steps}
        self.phases |= set(report.phases)
        if remember:
            runs = [(step, len(list(same))) for step, same in groupby(report.steps)]
            text = ", ".join(
                f"{requests}/{tokens}" + (f" x{count}" if count > 1 else "") for (requests, tokens), count in runs
            )
            self.last = _shortened(text)


def _shortened(text: str) -> str:
    """``text``, or its start and the digest of the whole: what differs anywhere stays different."""
    if len(text) <= _MOST_CHARACTERS:
        return text
    end = f"... sha256:{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    return text[: _MOST_CHARACTERS - len(end)] + end


def trace_of(
    task: Task,
    prompt: int,
    output_ids: Array,
    widths: tuple[int, int] | None,
    plan: CapturePlan,
    blocks: Mapping[str, int],
    reports: Sequence[Report],
    ranks: Sequence[WorkerFacts],
) -> Trace:
    """One reference's trace from what all ranks recorded of it. Raises :class:`ReplayError` where a row is not finite."""
    held = [(report, rows) for report in reports for rows in report.rows if rows.key == task.key]
    first = int(np.searchsorted(task.positions, prompt))
    phases: list[PhaseTrace] = []
    for number, (phase, part) in enumerate((("prefill", slice(0, first)), ("decode", slice(first, None)))):
        width = None if widths is None else widths[number]
        trace = _phase(task.positions[part], part, width, plan, blocks, held, ranks)
        if not all(report.finite for report in reports):
            require_finite(trace, task.reference_id, phase)  # type: ignore[arg-type]
        phases.append(trace)
    return Trace(task.reference_id, output_ids, phases[0], phases[1])


def _phase(
    positions: Array,
    part: slice,
    width: int | None,
    plan: CapturePlan,
    blocks: Mapping[str, int],
    held: Sequence[tuple[Report, Rows]],
    ranks: Sequence[WorkerFacts],
) -> PhaseTrace:
    count = len(positions)
    columns = next((rows for _, rows in held if rows.ids is not None), None)
    hidden = {block: rows for _, each in held for block, rows in each.hidden.items()}
    keys = _whole_keys(held, ranks)
    if columns is None or not count:
        none = np.zeros((0, plan.top_k if width is None else width))
        return PhaseTrace(
            positions.astype(np.int32),
            none.astype(np.int32),
            none.astype(np.float32),
            none[:, 0].astype(np.float32) if none.shape[1] else np.zeros(0, np.float32),
        )
    assert columns.ids is not None and columns.logprobs is not None and columns.chosen is not None
    whole = columns.logits is not None and plan.full_logits
    return PhaseTrace(
        positions=positions.astype(np.int32),
        logprob_ids=columns.ids[part, :width].astype(np.int32),
        logprobs=columns.logprobs[part, :width].astype(np.float32),
        chosen_logprobs=columns.chosen[part].astype(np.float32),
        hidden_states={layer: hidden[block][part] for layer, block in blocks.items() if block in hidden},
        key_vectors={layer: keys[block][part] for layer, block in blocks.items() if block in keys},
        logits=columns.logits[part] if whole and columns.logits is not None else None,
    )


def _whole_keys(held: Sequence[tuple[Report, Rows]], ranks: Sequence[WorkerFacts]) -> dict[int, Array]:
    """block -> (M, all KV heads * head_dim): the ranks' heads in order, copies left out where there are more ranks than heads."""
    parts: dict[int, list[tuple[int, Array]]] = {}
    for report, recorded in held:
        for block, own in recorded.keys.items():
            parts.setdefault(block, []).append((report.tensor_rank, own))
    copies = {(rank.pipeline_rank, rank.tensor_rank): rank for rank in ranks}[0, 0]
    whole: dict[int, Array] = {}
    for block, found in parts.items():
        ordered = [rows for _, rows in sorted(found, key=lambda each: each[0])]
        repeated = max(1, copies.key_heads * len(ordered) // max(1, copies.total_key_heads))
        heads = ordered[::repeated]
        whole[block] = heads[0] if len(heads) == 1 else np.concatenate(heads, axis=1)
    return whole


def require_kernels(config: ExecutionConfig, ranks: Sequence[WorkerFacts]) -> None:
    """Raise :class:`ReplayError` where vLLM took other kernels than those that ``config`` names: nothing falls back in silence."""
    attention = sorted({name for rank in ranks for name in rank.attention})
    expected = _ATTENTION.get(config.attention, "")
    if attention and not all(name.startswith(expected) for name in attention):
        raise ReplayError(f"attn={config.attention}: vLLM took {', '.join(attention)}", "use attn=auto, or name that")
    quantized = sorted({name for rank in ranks for name in (*rank.quantization, *rank.experts)})
    marlin = any("marlin" in name.partition("Method")[2].lower() for name in quantized)  # the kernel, after the method
    if config.quantization in ("awq", "gptq", "awq_marlin", "gptq_marlin") and marlin != config.quantization.endswith(
        "marlin"
    ):
        raise ReplayError(
            f"quant={config.quantization}: vLLM took {', '.join(quantized) or 'unquantized products'}",
            "name the quantization that ran",
        )


def engine_facts(config: ExecutionConfig, device: str, ranks: Sequence[WorkerFacts], schedule: Schedule) -> EngineFacts:
    """What the ranks resolved and what ran, as the protocol's facts."""
    model = ranks[0]
    attention = sorted({name for rank in ranks for name in rank.attention})
    experts = sorted({name for rank in ranks for name in rank.experts})
    numerics = dict(model.numerics)
    numerics["matmul_operators"] = ", ".join(model.products)
    if experts:
        numerics["experts"] = ", ".join(experts)
    if schedule.last:
        numerics["batch_schedule"] = schedule.last
    return EngineFacts(
        device=device,
        gpu=model.gpu,
        attention_kernels={phase: list(attention) for phase in ("prefill", "decode") if phase in schedule.phases},
        quantization_kernel="; ".join(sorted({name for rank in ranks for name in rank.quantization})),
        batch_sizes=sorted(schedule.batch_sizes),
        versions=installed_versions(),
        numerics=numerics,
        model=ModelFacts(
            name=config.model,
            architecture=model.architecture,
            weights_digest=config.weights_digest,
            vocab_size=model.vocab_size,
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            key_width=model.total_key_heads * model.head_dim,
        ),
    )
