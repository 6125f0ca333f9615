"""A prover session: generate under each config, repeat, check that repetitions are bit-identical, write one signed bundle.

Each config runs in its own worker process. Nothing is left behind unless the whole session succeeds.
"""

from __future__ import annotations

import re
import secrets
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import msgspec

from fpforensics.common.bundle import BundleWriter
from fpforensics.common.config import ExecutionConfig, config_id
from fpforensics.common.engines.base import Engine, EngineStarter, Host
from fpforensics.common.engines.preflight import check_checkpoint, require_runnable
from fpforensics.common.engines.remote import start_engine
from fpforensics.common.environment import describe_environment
from fpforensics.common.errors import CancelledError, NondeterminismError, OverlapError, UsageError, shorten
from fpforensics.common.evidence import Evidence, Repetitions, Row
from fpforensics.common.keys import PrivateKey
from fpforensics.common.models import context_length, load_tokenizer, num_layers, resolve_model, vocab_size
from fpforensics.common.prompts import DEFAULT_INSTRUCTION, build_references, read_documents
from fpforensics.common.sampling import check_sampling
from fpforensics.common.signals import (
    LAST,
    CapturePlan,
    Divergence,
    Reference,
    Sampling,
    Trace,
    first_divergence,
)
from fpforensics.common.strict import Limits
from fpforensics.common.words import counted
from fpforensics.prover.noise import widen

MAX_REPETITIONS = 100
MAX_TEMPERATURE = 1000
MAX_NONCE_DIGITS = 128


class SessionPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What to run. ``documents`` are ``builtin`` or files; ``nonce`` is the verifier's challenge (hex) or empty.

    ``texts`` are (name, text) pairs given inline, used instead of ``documents`` when there are any. A layer of ``capture``
    beyond the model's depth is an error, unless it is one of the default ones and nobody named them (``layers_named``).
    """

    configs: tuple[ExecutionConfig, ...]
    documents: tuple[str, ...] = ("builtin",)
    texts: tuple[tuple[str, str], ...] = ()
    references: int = 4
    prompt_tokens: int = 256
    instruction: str = DEFAULT_INSTRUCTION
    capture: CapturePlan = CapturePlan()
    sampling: Sampling = Sampling()
    repetitions: int = 3
    allow_nondeterminism: bool = False
    nonce: str = ""
    layers_named: bool = False


@dataclass(frozen=True)
class SessionProgress:
    """``done`` of ``total`` generated references over the whole session, and what is happening now."""

    stage: str
    done: int
    total: int


ProgressCallback = Callable[[SessionProgress], None]


def run_session(
    plan: SessionPlan,
    host: Host,
    key: PrivateKey,
    output: Path,
    progress: ProgressCallback | None = None,
    cancelled: Callable[[], bool] = lambda: False,
    start: EngineStarter = start_engine,
) -> str:
    """Run ``plan`` and write the signed bundle to ``output``. Returns the bundle's digest (``sha256:<hex>`` of its manifest).

    Raises:
        UsageError: the plan does not fit together.
        NondeterminismError: repetitions differed and the plan does not allow it.
        ReplayError: a config could not run here.
        CancelledError: ``cancelled()`` became true.
    """
    check_plan(plan)
    require_runnable(plan.configs, host)
    checkpoint = resolve_model(plan.configs[0].model, plan.configs[0].revision, host.models)
    check_fit(plan, checkpoint.path)
    references = make_references(plan, checkpoint.path)
    total = len(plan.configs) * plan.repetitions * len(references)
    with BundleWriter(output) as writer:
        entries = tuple(writer.add_reference(reference) for reference in references)
        rows: list[Row] = []
        for index, config in enumerate(plan.configs):
            name = _row_name(config, plan.configs, index)
            before = index * plan.repetitions * len(references)
            tell = _teller(progress, before, total, cancelled)
            tell(f"{name}: starting", 0)
            with start(config, host, cancelled) as engine:
                repetitions, traces = _repeat(engine, references, plan, name, tell)
                facts = engine.facts()
            digest = facts.model.weights_digest
            rows.append(
                Row(
                    config_id=name,
                    config=msgspec.structs.replace(config, weights_digest=digest),
                    facts=facts,
                    repetitions=repetitions,
                    traces=tuple(writer.add_trace(trace) for trace in traces),
                )
            )
        evidence = Evidence(
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            session_id=secrets.token_hex(16),
            nonce=plan.nonce,
            tool_version=version("fpforensics"),
            environment=describe_environment(host.env),
            capture=plan.capture,
            sampling=plan.sampling,
            references=entries,
            rows=tuple(rows),
        )
        return writer.finish(evidence, key)


def make_references(plan: SessionPlan, checkpoint: Path) -> list[Reference]:
    """The plan's prompts as token ids, with the tokenizer in the folder ``checkpoint``.

    Raises :class:`UsageError` where a prompt leaves no room for the new tokens in the model's context.
    """
    from fpforensics.common.prompts import Document

    documents = [Document(name=name, text=text) for name, text in plan.texts] or read_documents(plan.documents)
    references = build_references(
        documents,
        load_tokenizer(checkpoint),
        count=plan.references,
        prompt_tokens=plan.prompt_tokens,
        instruction=plan.instruction,
    )
    longest = max(references, key=lambda reference: len(reference.prompt_ids))
    _require_context(len(longest.prompt_ids), f"the prompt of {longest.id}", plan, checkpoint)
    return references


def check_fit(plan: SessionPlan, checkpoint: Path) -> None:
    """Raise :class:`UsageError` for what the model in the folder ``checkpoint`` cannot do, by its ``config.json``."""
    for config in plan.configs:
        check_checkpoint(config, checkpoint)
    layers = plan.capture.layers
    if plan.layers_named or layers != CapturePlan().layers:
        require_depth(layers, num_layers(checkpoint))
    if plan.capture.top_k > vocab_size(checkpoint):
        raise UsageError(
            f"top-k {plan.capture.top_k}: the model's vocabulary has {vocab_size(checkpoint)} tokens", "ask for fewer"
        )
    _require_context(plan.prompt_tokens, "the prompt", plan, checkpoint)


def require_depth(layers: Sequence[str], depth: int | None, whose: str = "the model") -> None:
    """Raise :class:`UsageError` for a layer that a model of ``depth`` blocks has not; None is a depth that nobody knows."""
    deepest = max((int(layer) for layer in layers if layer != LAST), default=0)
    if depth is not None and deepest > depth:
        raise UsageError(
            f"layer {deepest}: {whose} has {counted(depth, 'block')}", f"name blocks from 1 to {depth}, or {LAST!r}"
        )


def _require_context(prompt: int, what: str, plan: SessionPlan, checkpoint: Path) -> None:
    context, new = context_length(checkpoint), plan.sampling.max_new_tokens
    if context is not None and prompt + new > context:
        raise UsageError(
            f"{counted(prompt, 'token')} in {what} and {counted(new, 'new token')} are more than the {context} that the model takes",
            "ask for fewer of either",
        )


def check_plan(plan: SessionPlan) -> None:
    """Raise :class:`UsageError` for a plan that no model could carry out, or that no bundle could hold."""
    if not plan.configs:
        raise UsageError("a session without configs", "give at least one, e.g. --config attn=sdpa")
    if len(set(plan.configs)) < len(plan.configs):
        raise UsageError("a session names the same config twice", "give each config once")
    models = sorted({config.model for config in plan.configs})
    if len(models) > 1:
        raise UsageError(f"a session over several models: {', '.join(models)}", "run one session for each model")
    limits = Limits()
    for name, value, least, most in (
        ("configs", len(plan.configs), 1, limits.rows),
        ("references", plan.references, 1, limits.references),
        ("prompt tokens", plan.prompt_tokens, 1, limits.prompt_tokens),
        ("new tokens", plan.sampling.max_new_tokens, 1, limits.output_tokens),
        ("temperature", plan.sampling.temperature, 0, MAX_TEMPERATURE),
        ("seed", plan.sampling.seed, 0, (1 << 64) - 1),
        ("top-k", plan.capture.top_k, 1, limits.width),
        ("prefill positions", plan.capture.prefill_positions, 0, limits.prompt_tokens),
        ("decode positions", plan.capture.decode_positions, 0, limits.output_tokens),
        ("repetitions", plan.repetitions, 1, MAX_REPETITIONS),
    ):
        if not least <= value <= most:
            raise UsageError(f"{name} {value}", f"from {least} to {most}")
    check_sampling(plan.sampling)
    if not re.fullmatch(r"([0-9a-f]{2})*", plan.nonce) or len(plan.nonce) > MAX_NONCE_DIGITS:
        raise UsageError(f"nonce {shorten(plan.nonce)!r}", f"an even number of hex digits, at most {MAX_NONCE_DIGITS}")
    layers = plan.capture.layers
    for layer in layers:
        if layer != LAST and (not re.fullmatch(r"[1-9][0-9]{0,3}", layer) or int(layer) > limits.layers):
            raise UsageError(f"layer {shorten(layer)!r}", f"a block number from 1 to {limits.layers}, or {LAST!r}")
    if len(set(layers)) < len(layers):
        raise UsageError(f"layers {','.join(layers)} name one twice", "give each once")


def _row_name(config: ExecutionConfig, configs: Sequence[ExecutionConfig], index: int) -> str:
    """Short and unique: what differs from the defaults, the model aside (one session has one model)."""
    name = config_id(config, ExecutionConfig(model=config.model))
    earlier = {config_id(other, ExecutionConfig(model=other.model)) for other in configs[:index]}
    return f"{name}#{index}" if name in earlier else name


Tell = Callable[[str, int], None]


def _teller(progress: ProgressCallback | None, before: int, total: int, cancelled: Callable[[], bool]) -> Tell:
    def tell(stage: str, done: int) -> None:
        if cancelled():
            raise CancelledError(stage)
        if progress is not None:
            progress(SessionProgress(stage, before + done, total))

    return tell


def _outside_seconds(engine: Engine, repetition: int) -> float:
    """What starting and ending the concurrent work took: the repetitions without any have no such part."""
    entries = engine.facts().concurrent_work
    if len(entries) != repetition + 1:
        raise OverlapError(
            f"concurrent=true: the engine measured {len(entries)} of {counted(repetition + 1, 'repetition')}",
            "what ran beside them is not known: run it with an engine that measures it",
        )
    return entries[-1].outside_seconds


def _repeat(
    engine: Engine, references: Sequence[Reference], plan: SessionPlan, name: str, tell: Tell
) -> tuple[Repetitions, list[Trace]]:
    """Generate ``plan.repetitions`` times; returns what the repetitions showed and the last repetition's traces."""
    wall: list[float] = []
    noise: dict[str, float] = {}
    divergence: Divergence | None = None
    first: list[Trace] | None = None
    traces: list[Trace] = []
    for repetition in range(plan.repetitions):
        stage = f"{name}: repetition {repetition + 1} of {plan.repetitions}"
        base = repetition * len(references)
        tell(stage, base)
        started = time.perf_counter()
        traces = engine.generate(
            references,
            plan.sampling,
            plan.capture,
            lambda done, _, base=base, stage=stage: tell(stage, base + done),  # type: ignore[misc]
        )
        took = time.perf_counter() - started
        if engine.config.concurrent_work:
            took -= _outside_seconds(engine, repetition)
        wall.append(took)
        if first is None:
            first = traces
            continue
        differing = [d for a, b in zip(first, traces, strict=True) if (d := first_divergence(a, b)) is not None]
        if differing and not plan.allow_nondeterminism:
            raise NondeterminismError(
                f"{name}: repetition {repetition + 1} differs from the first at {differing[0]}",
                "find the cause, or record the noise with --allow-nondeterminism",
            )
        if differing:
            divergence = divergence or differing[0]
            widen(noise, first, traces)
    return (
        Repetitions(
            count=plan.repetitions,
            bit_identical=divergence is None,
            wall_seconds=tuple(wall),
            wall_mean=statistics.fmean(wall),
            wall_variance=statistics.variance(wall) if len(wall) > 1 else 0.0,
            first_divergence=str(divergence) if divergence else "",
            noise=noise,
        ),
        traces,
    )
