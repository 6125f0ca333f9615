"""A check: from a verified bundle and a claim to distances, matrices and a verdict.

The bundle is trusted to be what its signer signed, and nothing more: models, lineup and noise floor are the verifier's own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TypeVar

import msgspec

from fpforensics.common.config import (
    DEFAULT_MODEL,
    Claim,
    ExecutionConfig,
    claim_of,
    config_id,
    parse_claim,
    parse_config,
)
from fpforensics.common.engines.base import EngineStarter, Host, ReplayMode
from fpforensics.common.engines.preflight import check_checkpoint, require_runnable
from fpforensics.common.engines.remote import start_engine
from fpforensics.common.environment import Environment, describe_environment
from fpforensics.common.errors import LimitError, UnknownModelError, UsageError, did_you_mean, shorten
from fpforensics.common.evidence import Row
from fpforensics.common.models import resolve_model, vocab_size, weights_digest
from fpforensics.verifier.coherence import require_coherent
from fpforensics.verifier.collector import ANCHOR_PREFIX, Checked, Collector, MemberReport
from fpforensics.verifier.decision import RowVerdict, Verdict, combine_rows
from fpforensics.verifier.environment_diff import Difference, compare_environments, fields_under_test
from fpforensics.verifier.intake import VerifiedBundle
from fpforensics.verifier.matrix import MatrixReport, build_matrices
from fpforensics.verifier.measured import MeasuredProfile
from fpforensics.verifier.profile import built_in_profile
from fpforensics.verifier.replay import (
    OTHER_KERNELS,
    Member,
    Report,
    anchor_of,
    experts_apart,
    never,
    on_transformers,
    run_lineup,
)
from fpforensics.verifier.row import verdict_on
from fpforensics.verifier.vouch import vouched

# Quantized formats with products of their own, which no other path replaces.
OWN_MATMUL = ("bnb-int8",)
# What the default lineup sets against the claimed config: one change each, skipped with its reason where it cannot run.
ALTERNATIVES = (
    "attn=eager",
    "attn=sdpa",
    "dtype=bf16",
    "dtype=fp16",
    "dtype=fp32",
    "quant=none",
    "quant=bnb-nf4",
    "quant=bnb-int8",
    "quant=torchao-int8",
    "quant=torchao-int4",
)
VLLM_ALTERNATIVES = (
    "attn=vllm_flash_attn_3",
    "attn=vllm_triton",
    "dtype=bf16",
    "dtype=fp16",
    "dtype=fp32",
    "quant=none",
    "quant=bnb-nf4",
    "quant=torchao-int8",
)
# What contradicts a claim about another field; the first that is not what is claimed.
COUNTER_VALUES: Mapping[str, tuple[str, ...]] = {
    "batch_size": ("batch=1", "batch=2"),
    "compile": ("compile=false", "compile=true"),
    "matmul": ("matmul=native", "matmul=fp32-rounded"),
    "tensor_parallel": ("tp=1", "tp=2"),
    "emulate_tensor_parallel": ("emulate_tp=1", "emulate_tp=2"),
    "expert_parallel": ("ep=1", "ep=2"),
    "concurrent_work": ("concurrent=false", "concurrent=true"),
    "backend": ("backend=transformers", "backend=vllm"),
    "kv_cache": ("kv=auto", "kv=fp8"),
    "pipeline_parallel": ("pp=1", "pp=2"),
    "max_batched_tokens": ("chunk=auto", "chunk=64"),
    "cuda_graphs": ("graphs=false", "graphs=true"),
    "batch_invariant": ("invariant=false", "invariant=true"),
}
C = TypeVar("C", bound=Collector)
MAX_LINEUP = 64
MAX_REPLAYED_TOKENS = 1 << 28
"""Tokens, over references, rows, batch and lineup, that one check may be made to compute."""


class CheckPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What to check. An empty ``claim`` checks each row against its own declaration.

    ``lineup`` holds config specs, each a change to the first checked row's claimed config; empty is a default one. ``using`` is a spec of
    how the verifier runs the replays (e.g. ``matmul=fp32-rounded``) and is no part of any claim. ``profile`` is the calibration to
    decide by where it covers a row; the built-in one decides elsewhere.
    """

    claim: str = ""
    lineup: tuple[str, ...] = ()
    mode: ReplayMode = "decode"
    row: str = ""
    using: str = ""
    profile: MeasuredProfile | None = None


class CheckResult(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a verdict statement and a report hold; no NaN, no infinity."""

    bundle_digest: str
    signer: str
    nonce: str
    evidence_created_at: str
    checked_at: str
    tool_version: str
    claim: str
    mode: ReplayMode
    verdict: Verdict
    rows: tuple[RowVerdict, ...]
    references: int
    lineup: tuple[MemberReport, ...]
    kernel_classes: tuple[tuple[str, ...], ...]
    matrices: tuple[MatrixReport, ...]
    environment: tuple[Difference, ...]
    verifier_environment: Environment


def check_bundle(
    bundle: VerifiedBundle,
    plan: CheckPlan,
    host: Host,
    report: Report = lambda _stage, _done, _total: None,
    cancelled: Callable[[], bool] = lambda: False,
    start: EngineStarter = start_engine,
) -> CheckResult:
    """Replay ``bundle`` under a lineup and decide whether its evidence fits the claim.

    Raises:
        UsageError: the claim, lineup or row does not make sense.
        UnknownModelError: evidence about a model, or weights, that this verifier does not hold.
        ReplayError: a config that was asked for cannot run here.
    """
    built_in_profile()  # what cannot be read is said before the replays, not after them
    checked, collected = replay_bundle(bundle, plan, host, Collector, report, cancelled, start, exact=True)
    verifier_environment = describe_environment(host.env)
    lineup = [each for each in collected.reports if not each.id.startswith(ANCHOR_PREFIX)]
    classes = collected.kernel_classes()
    verdicts = tuple(
        vouched(
            verdict_on(each, collected, plan.profile, plan.mode, verifier_environment),
            each,
            lineup,
            named=bool(plan.claim),
        )
        for each in checked
    )
    return CheckResult(
        bundle_digest=bundle.digest,
        signer=bundle.signer.keyid,
        nonce=bundle.evidence.nonce,
        evidence_created_at=bundle.evidence.created_at,
        checked_at=datetime.now(UTC).isoformat(timespec="seconds"),
        tool_version=version("fpforensics"),
        claim=plan.claim,
        mode=plan.mode,
        verdict=combine_rows(verdicts),
        rows=verdicts,
        references=len(bundle.evidence.references),
        lineup=tuple(lineup),
        kernel_classes=classes,
        matrices=tuple(matrix.to_report(classes) for matrix in build_matrices(collected.measurements)),
        environment=compare_environments(
            bundle.evidence.environment,
            checked[0].row.facts,
            verifier_environment,
            collected.claimed_facts(checked[0]),
            mode=plan.mode,
            tested=fields_under_test(
                parse_claim(plan.claim) if plan.claim else None, [member.config for member in lineup]
            ),
        ),
        verifier_environment=verifier_environment,
    )


def replay_bundle(
    bundle: VerifiedBundle,
    plan: CheckPlan,
    host: Host,
    collect: Callable[[VerifiedBundle, Sequence[Checked]], C],
    report: Report = lambda _stage, _done, _total: None,
    cancelled: Callable[[], bool] = lambda: False,
    start: EngineStarter = start_engine,
    exact: bool = False,
) -> tuple[list[Checked], C]:
    """Replay the rows that ``plan`` names under its lineup and their anchors, into a collector that ``collect`` makes.

    ``exact``: a replay that should have the evidence's bits, and has not, is made again.
    Raises like :func:`check_bundle`.
    """
    checked = _rows_to_check(bundle, plan, host)
    members, rows = _plan_replays(checked, plan, host)
    require_runnable(
        (member.runs_as for member in members if not member.optional), host
    )  # before any weights are hashed
    for each in checked:
        _require_known_model(each, plan, host)
    _require_as_stored(checked, members, plan, host)
    _require_bounded(bundle, members, rows, again=[each.config for each in checked] if exact else ())
    require_coherent(bundle, [each.row for each in checked], cancelled)
    members = _pinned(members, host)
    collected = collect(bundle, checked)
    # Anchors first: the others' own noise is measured against them.
    anchors = {each.anchor for each in checked}
    ordered = sorted(members, key=lambda member: member.config not in anchors)
    missed = collected.missed(describe_environment(host.env), plan.mode) if exact else never
    for replay in run_lineup(bundle, ordered, rows, plan.mode, host, report, cancelled, start, missed):
        collected.add(replay)
    collected.in_order([member.id for member in members])
    return checked, collected


def _rows_to_check(bundle: VerifiedBundle, plan: CheckPlan, host: Host) -> list[Checked]:
    """The named row; else, with a claim, the rows that declare it, or all if none does; else every row."""
    rows = list(bundle.evidence.rows)
    if plan.row:
        known = {row.config_id: row for row in rows}
        if plan.row not in known:
            raise UsageError(f"no row {shorten(plan.row)!r} in the bundle", did_you_mean(plan.row, known))
        rows = [known[plan.row]]
    claim = parse_claim(plan.claim) if plan.claim else None
    for spec in (plan.claim, *plan.lineup):
        for field in ("weights_digest", "revision"):
            if spec and field in parse_claim(spec).assertions:
                raise UsageError(
                    f"{shorten(spec)!r} names {field.replace('_digest', '')}", "the verifier compares digests by itself"
                )
    if claim is not None and not plan.row:
        rows = [row for row in rows if claim.holds_for(row.config)] or rows
    checked: list[Checked] = []
    for row in rows:
        own = claim or claim_of(row.config)
        config = _runnable(own.applied_to(_without_identity(row.config)), own)
        base = _naming_base(checked[0].config if checked else config, row.config.model)
        label = config_id(config, base)
        for other in checked:
            if other.label == label:
                raise UsageError(
                    f"rows {shorten(other.row.config_id)!r} and {shorten(row.config_id)!r} are one config under this claim",
                    "check one of them: --row ID",
                )
        checked.append(Checked(row, own, config, label, anchor_of(config, experts=_experts_apart(config, plan, host))))
    return checked


def _runnable(config: ExecutionConfig, claim: Claim | None = None) -> ExecutionConfig:
    """``config`` with products native where rounded ones do not combine with it, and whole where partial ones do not, unless that is claimed."""
    claimed = claim.assertions if claim is not None else {}
    if "matmul" not in claimed and (config.dtype in ("fp32", "fp64") or config.quantization in OWN_MATMUL):
        config = msgspec.structs.replace(config, matmul="native")
    if "emulate_tensor_parallel" not in claimed and config.quantization != "none":
        config = msgspec.structs.replace(config, emulate_tensor_parallel=1)
    return config


def _naming_base(claimed: ExecutionConfig, model: str) -> ExecutionConfig:
    """What names leave out: the defaults, the bundle's model, and the path of products that the first claimed config has."""
    return ExecutionConfig(model=model, matmul=claimed.matmul)


def _without_identity(config: ExecutionConfig) -> ExecutionConfig:
    """The weights are compared by digest; which revision is fetched is this verifier's own choice."""
    return msgspec.structs.replace(config, weights_digest="", revision="")


def _require_known_model(each: Checked, plan: CheckPlan, host: Host) -> None:
    """A bundle must not choose which files a verifier opens or downloads: only models the verifier's user named."""
    for model in {each.config.model, each.row.config.model}:
        if not _holds(model, plan, host):
            raise UnknownModelError(
                f"the bundle is about model {shorten(model)!r}, which this verifier does not hold",
                f"name its checkpoint: --model-path {shorten(model)}=/path/to/checkpoint",
            )
    if each.config.model != each.row.config.model:
        return
    checkpoint = resolve_model(each.config.model, models=host.models)
    held, stated = weights_digest(checkpoint.path), each.row.facts.model.weights_digest
    if each.row.facts.model.vocab_size != vocab_size(checkpoint.path):
        raise UnknownModelError(
            f"the bundle states a vocabulary of {each.row.facts.model.vocab_size} for {shorten(each.config.model)!r}, "
            f"the checkpoint here has {vocab_size(checkpoint.path)}",
            "name the right checkpoint with --model-path",
        )
    if stated != held or each.row.config.weights_digest not in ("", held):
        raise UnknownModelError(
            f"the bundle states weights {shorten(stated, 24)} for {shorten(each.config.model)!r}, "
            f"the checkpoint here is {shorten(held, 24)}",
            "name the right checkpoint with --model-path",
        )


def _require_as_stored(checked: Sequence[Checked], members: Sequence[Member], plan: CheckPlan, host: Host) -> None:
    """What is claimed and what was asked for must be what the checkpoints are, before anything is loaded: an error of theirs, not of
    the anchor that is loaded first. Members that were only offered may be skipped later."""
    claimed = {each.config for each in checked}
    for member in members:
        if member.optional:
            continue
        try:
            check_checkpoint(member.runs_as, resolve_model(member.runs_as.model, models=host.models).path)
        except UsageError as error:
            who = f"claim {shorten(plan.claim)}" if plan.claim and member.config in claimed else member.id
            said = error.message.removeprefix(f"{plan.claim}: ").removeprefix(f"{member.id}: ")
            raise UsageError(f"{who}: {said}", error.hint) from None


def _holds(model: str, plan: CheckPlan, host: Host) -> bool:
    named = {config.model for spec in (plan.claim, *plan.lineup) for config in [parse_config(spec)] if "model=" in spec}
    return model in host.models or model == DEFAULT_MODEL or model in named


def _experts_apart(config: ExecutionConfig, plan: CheckPlan, host: Host) -> bool:
    """Of a config of vLLM and the checkpoint that this side holds, see :func:`fpforensics.verifier.replay.experts_apart`."""
    if config.backend != "vllm" or config.quantization == "none" or not _holds(config.model, plan, host):
        return False
    return experts_apart(config, resolve_model(config.model, models=host.models).path)


def _plan_replays(
    checked: Sequence[Checked], plan: CheckPlan, host: Host
) -> tuple[list[Member], dict[str, Sequence[Row]]]:
    """The lineup (claimed, declared and alternative configs) and the anchors, with the rows that each replays."""
    rows = [each.row for each in checked]
    base = _naming_base(checked[0].config, rows[0].config.model)
    first = checked[0].config
    asked = [_runnable(parse_config(spec, first)) for spec in plan.lineup]
    claimed = [each.config for each in checked]
    declared = [_without_identity(row.config) for row in rows]
    offered = [] if plan.lineup else [_runnable(config) for config in _alternatives(first, plan)]
    members: dict[ExecutionConfig, Member] = {}
    for config in (*claimed, *declared, *asked, *offered):
        optional = config not in claimed and config not in asked
        replay = run_as(config, plan.using, experts=_experts_apart(config, plan, host))
        members.setdefault(config, Member(config_id(config, base), config, replay, optional))
    if len(members) > MAX_LINEUP:
        raise UsageError(f"a lineup of {len(members)} configs", f"at most {MAX_LINEUP}")
    replayed: dict[str, Sequence[Row]] = {member.id: rows for member in members.values()}
    for anchor in dict.fromkeys(each.anchor for each in checked):
        if anchor is None:
            continue
        if anchor in members:
            members[anchor] = dataclasses.replace(members[anchor], optional=False)
        else:
            members[anchor] = Member(ANCHOR_PREFIX + config_id(anchor, base), anchor, anchor)
            replayed[members[anchor].id] = [each.row for each in checked if each.anchor == anchor]
    return list(members.values()), replayed


def _alternatives(first: ExecutionConfig, plan: CheckPlan) -> list[ExecutionConfig]:
    """The default lineup: one change each, and one that contradicts each other field that the claim asserts."""
    specs = VLLM_ALTERNATIVES if first.backend == "vllm" else ALTERNATIVES
    configs = [parse_config(spec, first) for spec in specs]
    for field in parse_claim(plan.claim).assertions if plan.claim else ():
        values = [parse_config(spec, first) for spec in COUNTER_VALUES.get(field, ())]
        if field == "backend" and first.backend == "vllm":
            values = [on_transformers(first)]
        configs += [config for config in values if config != first][:1]
    if (
        first.backend == "vllm" and "backend" not in plan.using
    ):  # the same weights by other kernels: only vLLM tells them apart
        pairs: dict[str, str] = {**OTHER_KERNELS, **{plain: other for other, plain in OTHER_KERNELS.items()}}
        pair = pairs.get(first.quantization)
        configs += [parse_config(f"quant={pair}", first)] if pair else []
    return configs


def _require_bounded(
    bundle: VerifiedBundle,
    members: Sequence[Member],
    rows: Mapping[str, Sequence[Row]],
    again: Sequence[ExecutionConfig],
) -> None:
    """A bundle must not choose how long a verifier computes. Configs of ``again`` may be replayed twice; so may the others where one of
    these does not repeat, which is not counted: at most twice the limit.
    """
    prompts = {entry.id: math.prod(entry.prompt_ids.shape) for entry in bundle.evidence.references}
    tokens = sum(
        (1 + (member.config in again))
        * max(1, member.config.batch_size)
        * (prompts[trace.reference_id] + math.prod(trace.output_ids.shape))
        for member in members
        for row in rows[member.id]
        for trace in row.traces
    )
    if tokens > MAX_REPLAYED_TOKENS:
        raise LimitError(f"replays of {tokens} tokens in all", f"at most {MAX_REPLAYED_TOKENS}: fewer rows or configs")


def _pinned(members: Sequence[Member], host: Host) -> list[Member]:
    """Members whose workers refuse any weights but those that are on disk now."""
    models = {member.runs_as.model for member in members}
    held = {model: weights_digest(resolve_model(model, models=host.models).path) for model in models}
    return [
        dataclasses.replace(
            member, runs_as=msgspec.structs.replace(member.runs_as, weights_digest=held[member.runs_as.model])
        )
        for member in members
    ]


def run_as(config: ExecutionConfig, using: str, *, experts: bool = False) -> ExecutionConfig:
    """``config`` by the verifier's own path: of products (``matmul``), where that combines with it, and of engines (``backend``).

    ``experts``: of a model whose experts vLLM computes by other weights.
    """
    assertions = parse_claim(using).assertions if using else {}
    if assertions.keys() - {"matmul", "backend"} or assertions.get("backend") == "vllm":
        raise UsageError(
            f"--using {shorten(using)!r}",
            "only how replays are computed: matmul=fp32-rounded, matmul=native, backend=transformers",
        )
    if "backend" in assertions:
        config = on_transformers(config, experts=experts)
        if config.backend == "vllm":  # transformers has nothing like it: its own engine replays it, if it is here
            return config
    wanted = msgspec.structs.replace(config, matmul=assertions.get("matmul", config.matmul))
    return config if _runnable(wanted) != wanted else wanted
