"""Replays on the verifier: each config is loaded once and forced through every bundle that it is compared with.

What a config's replays measured is one file, whole or not there: the distances from each claimed trace, and a fingerprint
that says which configs' replays were bit-identical.
"""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import msgspec

from fpforensics.common.cache import write_atomically
from fpforensics.common.engines.base import EngineFacts
from fpforensics.common.engines.preflight import require_runnable
from fpforensics.common.errors import (
    CancelledError,
    MissingDependencyError,
    ReplayError,
    UnknownModelError,
    UsageError,
    shorten,
)
from fpforensics.common.models import resolve_model, weights_digest
from fpforensics.verifier.coherence import require_coherent
from fpforensics.verifier.distance import Cell, trace_distances
from fpforensics.verifier.intake import VerifiedBundle, open_bundle
from fpforensics.verifier.matrix import MatrixReport, Measurement, build_matrices, kernel_classes
from fpforensics.verifier.replay import experts_apart, fingerprint, held_layers
from fpforensics.verifier.suite.folder import is_full
from fpforensics.verifier.suite.journal import Entry, Journal
from fpforensics.verifier.suite.left import Left
from fpforensics.verifier.suite.model import Experiment, Variant
from fpforensics.verifier.suite.plan import jobs_of, plan_jobs, plan_replays, replay_id, replayed_as
from fpforensics.verifier.suite.sessions import Loads, Report, Setting

MAX_REASON = 600


class Distance(msgspec.Struct, frozen=True):
    """The distance of one reference in one cell."""

    cell: Cell
    value: float


class Replayed(msgspec.Struct, frozen=True, kw_only=True):
    """One claimed bundle's replay: its digest, distances by reference, and the fingerprint of the replay's own bits."""

    digest: str
    distances: dict[str, list[Distance]]
    fingerprint: str


class ReplayFile(msgspec.Struct, frozen=True, kw_only=True):
    """What one verified config's worker measured, by the id of the job that is claimed."""

    facts: EngineFacts
    seconds: float
    claimed: dict[str, Replayed]


def run_replays(
    setting: Setting,
    journal: Journal,
    report: Report = lambda _stage, _done, _total: None,
    *,
    again: bool = False,
) -> None:
    """Make every replay that is missing. A config that cannot be replayed here is skipped with its reason."""
    if not setting.suite.replay.enabled:
        return
    finished = journal.latest("finished")
    planned, left = plan_replays(setting.suite), Left(setting, journal)
    for number, each in enumerate(planned, start=1):
        wanted = {job: finished[job].digest for job in each.jobs if job in finished}
        known = read_replay(setting.folder.replay(each.name))
        if not wanted or (
            known and {job: found.digest for job, found in known.claimed.items()}.items() >= wanted.items()
        ):
            continue
        name = replay_id(each.name)
        last = journal.latest().get(name)
        if last is not None and last.event == "skipped" and not again:
            continue
        place = f"replay {number} of {len(planned)}{left}"
        where = f"{', '.join(each.experiments[:2])}: {each.name} ({place})"

        def tell(stage: str, done: int, total: int, where: str = where) -> None:
            report(f"{where}: {stage}", done, total)

        loads = Loads(setting.start)
        journal.add(Entry(event="started", job=name, at=time.time()))
        try:
            measured = _replay(replace(setting, start=loads), each.variant, wanted, tell)
        except CancelledError:
            raise
        except (UsageError, MissingDependencyError, ReplayError) as error:
            if is_full(error):
                raise
            reason = shorten(error.diagnostics(), MAX_REASON)
            skipped = Entry(event="skipped", job=name, at=time.time(), reason=reason)
            journal.add(msgspec.structs.replace(skipped, loads=loads.count, load_seconds=loads.seconds))
            continue
        write_atomically(setting.folder.replay(each.name), msgspec.json.encode(measured))
        journal.add(
            Entry(
                event="finished",
                job=name,
                at=time.time(),
                seconds=measured.seconds,
                loads=loads.count,
                load_seconds=loads.seconds,
            )
        )


def read_replay(path: Path) -> ReplayFile | None:
    """What was measured, or None where nothing was."""
    if not path.exists():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=ReplayFile)
    except (msgspec.DecodeError, msgspec.ValidationError):
        return None


def claimed_verified(setting: Setting, experiment: Experiment, prover: str) -> tuple[MatrixReport, ...]:
    """The matrices claimed × verified of one experiment on one prover; none where nothing was replayed."""
    jobs = jobs_of(experiment, plan_jobs(setting.suite), prover)
    replays = {each.variant.arithmetic: each.name for each in plan_replays(setting.suite)}
    measurements: list[Measurement] = []
    prints: dict[str, dict[str, str]] = {}
    for variant, _ in jobs:
        loaded = replayed_as(setting.suite, variant)
        measured = read_replay(setting.folder.replay(replays[loaded.arithmetic]))
        for claimed, job in jobs:
            found = measured.claimed.get(job.id) if measured else None
            if found is None or not setting.folder.bundle(job.id).exists():
                continue
            prints.setdefault(variant.name, {})[claimed.name] = found.fingerprint
            measurements += [
                Measurement(
                    row=claimed.name,
                    column=variant.name,
                    reference_id=reference,
                    distances={each.cell: each.value for each in distances},
                )
                for reference, distances in found.distances.items()
            ]
    if not measurements:
        return ()
    classes = kernel_classes((a, b) for a, b in combinations(prints, 2) if prints[a] == prints[b])
    return tuple(_pairs_that_ran(matrix.to_report(classes)) for matrix in build_matrices(measurements))


def _pairs_that_ran(report: MatrixReport) -> MatrixReport:
    """Nothing is decided about a config that left no evidence: its replay is a column, beside what did run."""
    ran = frozenset(report.rows)
    pairs = tuple(pair for pair in report.pairwise if {pair.a, pair.b} <= ran)
    return msgspec.structs.replace(report, pairwise=pairs)


def _replay(setting: Setting, variant: Variant, wanted: dict[str, str], tell: Report) -> ReplayFile:
    settings = setting.suite.replay
    host = setting.replay_host(variant)
    config = variant.config
    require_runnable([config], host)
    path = resolve_model(config.model, config.revision, setting.models).path
    if "backend=transformers" in settings.using and experts_apart(config, path):
        raise ReplayError(
            f"quant={config.quantization} of a mixture of experts: transformers and vLLM multiply the experts by other weights",
            "replay it by vLLM: no backend in using",
        )
    held = weights_digest(path)
    keyring = setting.folder.keyring()
    started = time.perf_counter()
    found: dict[str, Replayed] = {}
    tell("starting", 0, len(wanted))
    with setting.start(msgspec.structs.replace(config, weights_digest=held), host, setting.stop) as engine:
        for done, job in enumerate(wanted):
            tell(job, done, len(wanted))
            with open_bundle(setting.folder.bundle(job), keyring) as bundle:
                row = bundle.evidence.rows[0]
                _require_same_weights(bundle, variant, held)
                require_coherent(bundle, [row])
                forcings = [bundle.forcing(row, entry.reference_id) for entry in row.traces]
                capture = held_layers(bundle.evidence.capture, [row])
                traces = engine.teacher_force(forcings, capture, settings.mode)
                found[job] = Replayed(
                    digest=bundle.digest,
                    fingerprint=fingerprint(traces),
                    distances={
                        trace.reference_id: [
                            Distance(cell, value)
                            for cell, value in trace_distances(bundle.trace(row, trace.reference_id), trace).items()
                        ]
                        for trace in traces
                    },
                )
        facts = engine.facts()
    return ReplayFile(facts=facts, seconds=time.perf_counter() - started, claimed=found)


def _require_same_weights(bundle: VerifiedBundle, variant: Variant, held: str) -> None:
    """A bundle about the very checkpoint that is loaded here must state its digest."""
    row = bundle.evidence.rows[0]
    stated = row.facts.model.weights_digest
    if row.config.model == variant.config.model and stated != held:
        raise UnknownModelError(
            f"the bundle states weights {shorten(stated, 24)} for {shorten(row.config.model)!r}, "
            f"the checkpoint here is {shorten(held, 24)}",
            "both sides must hold the same checkpoint: name it with --model-path",
        )
