"""From a suite to jobs: each config once on each prover, in the order that changes weights the fewest times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from fpforensics.common.errors import UsageError
from fpforensics.common.signals import Sampling
from fpforensics.prover.session import SessionPlan, check_plan
from fpforensics.verifier.check import run_as
from fpforensics.verifier.suite.model import LOCAL, Experiment, ProverSpec, Suite, Variant

MAX_JOBS = 256


@dataclass(frozen=True)
class Job:
    """One config on one prover, with all of its repetitions. ``experiments`` are those that use it."""

    id: str
    prover: ProverSpec
    variant: Variant
    experiments: tuple[str, ...]
    loads: int
    skip: str = ""


def plan_jobs(suite: Suite) -> tuple[Job, ...]:
    """Every job, the suite's baseline first. Equal configs of several experiments are one job."""
    found: dict[str, tuple[Variant, list[str]]] = {}
    for experiment in suite.experiments:
        if experiment.skip:
            continue
        for variant in (experiment.baseline, *experiment.variants):
            found.setdefault(variant.identity, (variant, []))[1].append(experiment.name)
    found.setdefault(suite.baseline.identity, (suite.baseline, []))
    ordered = _by_weights(suite, [variant for variant, _ in found.values()])
    jobs: list[Job] = []
    for prover in suite.provers:
        names: set[str] = set()
        for variant in ordered:
            name = _unique(f"{prover.name}.{variant.name}", names)
            loads = suite.repetitions if variant.reload else 1
            used = tuple(dict.fromkeys(found[variant.identity][1]))
            jobs.append(Job(name, prover, variant, used, loads, _unfit(prover, variant)))
    if len(jobs) > MAX_JOBS:
        raise UsageError(f"suite {suite.name}: {len(jobs)} jobs", f"at most {MAX_JOBS}: fewer configs or provers")
    return tuple(jobs)


def lanes_of(jobs: Sequence[Job]) -> list[list[Job]]:
    """What runs side by side: the jobs of each machine in order. Local provers share this one; each endpoint, also one of this
    machine's addresses (a tunnel has such), counts as another."""
    lanes: dict[str, list[Job]] = {}
    for job in jobs:
        lanes.setdefault(job.prover.endpoint, []).append(job)
    return list(lanes.values())


def jobs_of(experiment: Experiment, jobs: Sequence[Job], prover: str) -> list[tuple[Variant, Job]]:
    """The experiment's variants, its baseline first, each with the job that runs it on ``prover``."""
    by_identity = {job.variant.identity: job for job in jobs if job.prover.name == prover}
    wanted = (experiment.baseline, *experiment.variants)
    return [(each, by_identity[each.identity]) for each in wanted if each.identity in by_identity]


class VerifiedVariant(msgspec.Struct, frozen=True, kw_only=True):
    """One config to replay, as it is loaded; the jobs whose bundles it is forced through, and the experiments that need it."""

    name: str
    variant: Variant
    jobs: tuple[str, ...]
    experiments: tuple[str, ...]


def plan_replays(suite: Suite) -> tuple[VerifiedVariant, ...]:
    """Each config once, with every job that shares an experiment with it. What this side runs alike is one replay."""
    jobs = plan_jobs(suite)
    found: dict[str, tuple[Variant, dict[str, None], list[str]]] = {}
    for experiment in suite.experiments:
        if experiment.skip:
            continue
        claimed = [job.id for prover in suite.provers for _, job in jobs_of(experiment, jobs, prover.name)]
        for variant in (experiment.baseline, *experiment.variants):
            loaded = replayed_as(suite, variant)
            _, wanted, names = found.setdefault(loaded.arithmetic, (loaded, {}, []))
            wanted.update(dict.fromkeys(claimed))
            names.append(experiment.name)
    taken: set[str] = set()
    planned = []
    for variant, wanted, names in found.values():
        name = variant.name
        while name.lower() in taken:
            name += "_"
        taken.add(name.lower())
        planned.append(
            VerifiedVariant(name=name, variant=variant, jobs=tuple(wanted), experiments=tuple(dict.fromkeys(names)))
        )
    return tuple(planned)


def replayed_as(suite: Suite, variant: Variant) -> Variant:
    """``variant`` with the config that this side loads to replay it."""
    return msgspec.structs.replace(variant, config=run_as(variant.config, suite.replay.using))


def replay_id(name: str) -> str:
    """What the journal calls the replay of a verified config."""
    return f"replay:{name}"


def session_plan(suite: Suite, variant: Variant, nonce: str) -> SessionPlan:
    """What the prover is asked for: one config, and one repetition where each is to have a worker of its own.

    Raises :class:`UsageError` for what makes no sense, whatever the model, and for documents that cannot be read.
    """
    from fpforensics.verifier.fresh import with_texts

    plan = SessionPlan(
        configs=(variant.config,),
        documents=suite.references.documents,
        references=suite.references.count,
        prompt_tokens=suite.references.prompt_tokens,
        instruction=suite.references.instruction,
        capture=suite.capture,
        sampling=Sampling(max_new_tokens=suite.references.new_tokens),
        repetitions=1 if variant.reload else suite.repetitions,
        allow_nondeterminism=variant.nondeterministic,
        nonce=nonce,
        layers_named=suite.layers_named,
    )
    check_plan(plan)
    # The same prompts in every session: the built-in corpus by its name, other documents by their texts.
    return with_texts(plan, fresh=False)


def model_loads(jobs: Sequence[Job]) -> int:
    """How many times a prover loads a model for these jobs."""
    return sum(job.loads for job in jobs if not job.skip)


def _by_weights(suite: Suite, variants: Sequence[Variant]) -> list[Variant]:
    """The baseline, then what has its weights, then each other checkpoint in turn: caches stay warm."""
    weights = [(each.config.model, each.config.quantization) for each in variants]
    first = (suite.baseline.config.model, suite.baseline.config.quantization)
    order = list(dict.fromkeys([first, *weights]))
    own = suite.baseline.identity
    return sorted(
        variants,
        key=lambda each: (each.identity != own, order.index((each.config.model, each.config.quantization))),
    )


def _unfit(prover: ProverSpec, variant: Variant) -> str:
    """Why a prover is not asked to run a variant; empty if it is."""
    if prover.endpoint != LOCAL and (variant.env or variant.python):
        what = "another interpreter" if variant.python else "environment variables"
        return f"{what} for the worker: the operator of a remote prover sets that"
    return ""


def _unique(name: str, taken: set[str]) -> str:
    count, chosen = 2, name
    while chosen.lower() in taken:
        chosen, count = f"{name}_{count}", count + 1
    taken.add(chosen.lower())
    return chosen


def describe(suite: Suite) -> str:
    """The suite's plan for people: what runs, in which order."""
    jobs = plan_jobs(suite)
    references = suite.references
    lines = [
        f"{suite.name}  {suite.title}".rstrip(),
        f"  {references.count} × {references.prompt_tokens} prompt tokens, {references.new_tokens} new tokens, "
        f"{suite.repetitions} repetitions; layers {','.join(suite.capture.layers)}; top {suite.capture.top_k}",
        f"  {len(suite.experiments)} experiments and the reference, {len(jobs)} configs, {model_loads(jobs)} model loads",
        "",
        "experiments",
    ]
    for experiment in suite.experiments:
        names = ", ".join(each.name for each in (experiment.baseline, *experiment.variants))
        lines.append(f"  {experiment.file:<38} {experiment.variable}: {names}")
        if experiment.skip:
            lines.append(f"  {'':<38} skipped: {experiment.skip}")
    lines += ["", "order of work"]
    for number, job in enumerate(jobs, start=1):
        lines.append(f"  {number:>3}  {job.id:<44} {_loads(job)}{f'skipped: {job.skip}' if job.skip else ''}".rstrip())
    return "\n".join(lines) + "\n"


def _loads(job: Job) -> str:
    return "" if job.skip or job.loads == 1 else f"{job.loads} loads"
