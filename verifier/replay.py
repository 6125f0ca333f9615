"""Replay: teacher-force a bundle's tokens through every member of a lineup, each in its own worker process."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import msgspec

from fpforensics.common.config import ExecutionConfig, Quantization
from fpforensics.common.engines.base import EngineFacts, EngineStarter, Host, ReplayMode
from fpforensics.common.engines.remote import start_engine
from fpforensics.common.engines.transformers_load import WEIGHT_ONLY
from fpforensics.common.errors import CancelledError, MissingDependencyError, ReplayError, UsageError, shorten
from fpforensics.common.evidence import Row
from fpforensics.common.models import has_experts, narrow_experts
from fpforensics.common.signals import PHASES, CapturePlan, Trace
from fpforensics.verifier.exact import Settled, first_difference, settle
from fpforensics.verifier.intake import VerifiedBundle

Report = Callable[[str, int, int], None]

WIDER: Mapping[str, str] = {"bf16": "fp32", "fp16": "fp32", "fp32": "fp64"}
"""The dtype that the anchor of a config of this dtype is computed in."""

OTHER_KERNELS: Mapping[str, Quantization] = {"awq_marlin": "awq", "gptq_marlin": "gptq"}
"""Quantizations that differ from another one in their kernels alone: the weights of a checkpoint are the same."""

MARLIN_EXPERTS = frozenset({"awq", "awq_marlin", "gptq", "gptq_marlin"})
"""Quantizations whose experts vLLM multiplies by Marlin's kernel."""

MAX_REASON = 500
"""Characters of the reason why a member was skipped: it goes into a signed verdict."""


@dataclass(frozen=True)
class Member:
    """One config of the lineup. ``runs_as`` is what is loaded, if the verifier runs it by another path (see ``using``).

    An ``optional`` member that cannot run here is skipped with its reason; any other ends the check.
    """

    id: str
    config: ExecutionConfig
    runs_as: ExecutionConfig
    optional: bool = False


@dataclass(frozen=True)
class MemberReplay:
    """What one member's worker produced: traces by row id, in the bundle's order of references.

    ``again``: by row id, what a replay that was made again showed.
    """

    member: Member
    traces: Mapping[str, Sequence[Trace]]
    facts: EngineFacts | None
    seconds: float
    skipped: str = ""
    again: Mapping[str, Settled] = field(default_factory=dict)


Missed = Callable[[Member, Row, Sequence[Trace], EngineFacts], bool]
"""Whether a replay should have the row's own bits, and has not. Then it is made once more before anybody is accused."""


def never(_member: Member, _row: Row, _traces: Sequence[Trace], _facts: EngineFacts) -> bool:
    """Nothing is replayed again."""
    return False


def anchor_of(config: ExecutionConfig, *, experts: bool = False) -> ExecutionConfig | None:
    """The claimed config in a wider dtype, by the plainest path: same weights and quantization, little rounding.

    None where nothing wider can be computed: for float64, for quantized weights in float32, for formats that only vLLM's
    kernels multiply, in bf16 or fp16, and where the ``experts`` that a model has are :func:`experts_apart`. The path is that of transformers for a config of vLLM too, which has no float64.
    """
    if config.dtype not in WIDER or (config.dtype == "fp32" and config.quantization != "none"):
        return None
    quantization = OTHER_KERNELS.get(config.quantization, config.quantization)
    if config.backend == "vllm" and (quantization not in WEIGHT_ONLY or _other_weights(config, experts)):
        return None
    return ExecutionConfig(
        model=config.model,
        dtype=WIDER[config.dtype],  # type: ignore[arg-type]
        quantization=quantization,
    )


def on_transformers(config: ExecutionConfig, *, experts: bool = False) -> ExecutionConfig:
    """What transformers runs in place of a config of vLLM: the same weights and dtype, sdpa, ranks as partial sums.

    What is left out (which of vLLM's kernels, batch, graphs) is not told apart by such a replay (:mod:`fpforensics.verifier.vouch`). Formats and KV caches that
    only vLLM has stay as they are, and vLLM replays them where it can.
    """
    quantization = OTHER_KERNELS.get(config.quantization, config.quantization)
    if (
        config.backend != "vllm"
        or quantization not in WEIGHT_ONLY
        or config.kv_cache != "auto"
        or _other_weights(config, experts)
    ):
        return config
    return ExecutionConfig(
        model=config.model,
        revision=config.revision,
        weights_digest=config.weights_digest,
        dtype=config.dtype,
        quantization=quantization,
        emulate_tensor_parallel=config.tensor_parallel if quantization == "none" else 1,
    )


def experts_apart(config: ExecutionConfig, path: Path) -> bool:
    """Whether vLLM multiplies the experts of the checkpoint in ``path`` by other weights than transformers does.

    It rounds those of NF4, which transformers leaves; and of AWQ and GPTQ, Marlin misreads scales where a group is as long as a rank's
    share of an expert is wide (vLLM 0.26; vllm-project/vllm#50196, measured for AWQ: docs/vllm-evidence.md).
    """
    if not has_experts(path):
        return False
    ranks = 1 if config.expert_parallel > 1 else config.tensor_parallel
    return config.quantization == "bnb-nf4" or (config.quantization in MARLIN_EXPERTS and narrow_experts(path, ranks))


def weights_of(config: ExecutionConfig) -> tuple[str, str]:
    """(model, quantization): configs of the same pair multiply by the same numbers."""
    quantization: str = OTHER_KERNELS.get(config.quantization, config.quantization)
    return config.model, f"{quantization} over {config.tensor_parallel} ranks" if _quantized_by_rank(
        config
    ) else quantization


def _other_weights(config: ExecutionConfig, experts: bool) -> bool:
    """Whether transformers would multiply by other weights: it quantizes them whole, and ``experts`` may be :func:`experts_apart`."""
    return _quantized_by_rank(config) or experts


def _quantized_by_rank(config: ExecutionConfig) -> bool:
    """Whether each rank quantized its own share while loading: then scales depend on the number of ranks."""
    return config.tensor_parallel > 1 and config.quantization in ("torchao-int8", "bnb-nf4", "fp8")


def run_lineup(
    bundle: VerifiedBundle,
    members: Sequence[Member],
    rows: Mapping[str, Sequence[Row]],
    mode: ReplayMode,
    host: Host,
    report: Report,
    cancelled: Callable[[], bool] = lambda: False,
    start: EngineStarter = start_engine,
    missed: Missed = never,
) -> Iterator[MemberReplay]:
    """Yield each member's replay of the rows that ``rows[member.id]`` names, one member after the other.

    A replay that is ``missed`` is made again in the same worker (:func:`fpforensics.verifier.exact.settle`).

    Raises :class:`ReplayError` (or its kin) naming the member that could not run.
    """
    references = bundle.references()
    total = sum(len(rows[member.id]) for member in members) * len(references)
    done = 0
    for member in members:
        report(f"{member.id}: starting", done, total)
        started = time.perf_counter()
        try:
            tell = _relay(report, member.id, done, total)
            found = _replay_member(bundle, member, rows[member.id], mode, host, cancelled, tell, start, missed)
        except (ReplayError, MissingDependencyError, UsageError) as error:
            if member.optional and not isinstance(error, CancelledError):
                yield MemberReplay(member, {}, None, 0.0, skipped=shorten(error.diagnostics(), MAX_REASON))
                done += len(rows[member.id]) * len(references)
                continue
            error.message = f"{member.id}: {error.message}"
            raise
        done += len(rows[member.id]) * len(references)
        yield replace(found, seconds=time.perf_counter() - started)


def fingerprint(traces: Sequence[Trace]) -> str:
    """SHA-256 over every tensor of ``traces``: equal for bit-identical replays, so that none has to be kept."""
    sha = hashlib.sha256()
    for trace in traces:
        for phase in PHASES:
            for name, array in sorted(trace.phase(phase).tensors().items()):
                sha.update(f"{trace.reference_id}/{phase}/{name}/{array.dtype}/{array.shape}".encode())
                sha.update(array.tobytes())
    return sha.hexdigest()


def _replay_member(
    bundle: VerifiedBundle,
    member: Member,
    rows: Sequence[Row],
    mode: ReplayMode,
    host: Host,
    cancelled: Callable[[], bool],
    tell: Callable[[int], None],
    start: EngineStarter,
    missed: Missed,
) -> MemberReplay:
    capture = held_layers(bundle.evidence.capture, rows)
    references = bundle.references()
    traces: dict[str, Sequence[Trace]] = {}
    again: dict[str, Settled] = {}
    with start(member.runs_as, host, cancelled) as engine:
        for index, row in enumerate(rows):
            forcings = [bundle.forcing(row, reference.id) for reference in references]
            force = partial(engine.teacher_force, forcings, capture, mode, _counting(tell, index * len(references)))
            traces[row.config_id] = force()
            if missed(member, row, traces[row.config_id], engine.facts()):
                settled = settle(_evidence(bundle, row), traces[row.config_id], force())
                traces[row.config_id], again[row.config_id] = settled.traces, settled
        return MemberReplay(member, traces, engine.facts(), 0.0, again=again)


def departure(bundle: VerifiedBundle, row: Row, traces: Sequence[Trace]) -> str:
    """Where the row's evidence first differs from its replay in any bit; empty where it never does."""
    return first_difference(_evidence(bundle, row), traces)


def _evidence(bundle: VerifiedBundle, row: Row) -> Iterator[Trace]:
    """One trace at a time is read."""
    return (bundle.trace(row, reference.id) for reference in bundle.references())


def held_layers(capture: CapturePlan, rows: Sequence[Row]) -> CapturePlan:
    """What distances need of the plan: layers beyond a model's depth were left out at capture, whole logits are not compared."""
    held = {
        name.partition("/")[2]
        for row in rows
        for entry in row.traces
        for name in (*entry.prefill, *entry.decode)
        if "/" in name
    }
    layers = tuple(layer for layer in capture.layers if layer in held)
    return msgspec.structs.replace(capture, layers=layers, full_logits=False)


def _counting(tell: Callable[[int], None], before: int) -> Callable[[int, int], None]:
    return lambda done, _total: tell(before + done)


def _relay(report: Report, name: str, before: int, total: int) -> Callable[[int], None]:
    return lambda done: report(f"{name}: replay", before + done, total)
