"""The files that a run leaves: uniform JSON of each experiment, its analyses, the summary table, and what ran how long."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import msgspec

from fpforensics.common.errors import Error
from fpforensics.common.lab.reader import open_experiment
from fpforensics.common.lab.run import Run, RunInfo
from fpforensics.common.lab.writer import RunDetails, write_experiment
from fpforensics.verifier.analysis import Analysis, Canonical, analyze
from fpforensics.verifier.analysis.environment import FieldComparison, compare_configurations
from fpforensics.verifier.analysis.summary import SummaryRow, failed, summarize
from fpforensics.verifier.export import configuration_of, metadata_of, run_of
from fpforensics.verifier.intake import VerifiedBundle, open_bundle
from fpforensics.verifier.matrix import MatrixReport
from fpforensics.verifier.suite.folder import publish
from fpforensics.verifier.suite.forensics import Forensics, examine
from fpforensics.verifier.suite.journal import Entry
from fpforensics.verifier.suite.model import Experiment, ProverSpec, Variant
from fpforensics.verifier.suite.plan import Job, jobs_of, plan_jobs, plan_replays, replay_id, replayed_as
from fpforensics.verifier.suite.replays import claimed_verified
from fpforensics.verifier.suite.sessions import Report, Setting
from fpforensics.verifier.suite.timing import Timing, counted, is_finished, timings

REFERENCE_FILE = "reference_baseline.json"


class ConfigStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How one job ended: ``finished``, ``skipped``, ``blocked`` by another, ``failed``, ``stopped`` or ``open``, and why."""

    prover: str
    config: str
    state: str
    reason: str = ""


class ExperimentReport(msgspec.Struct, frozen=True, kw_only=True):
    """One experiment: what ran, how long, what was measured. ``matrices`` are claimed × verified, by prover; ``forensics``
    are about configs that differ from the baseline in their concurrent work alone."""

    name: str
    variable: str
    file: str
    skipped: str
    configs: tuple[ConfigStatus, ...]
    timing: tuple[Timing, ...] = ()
    forensics: tuple[Forensics, ...] = ()
    environment: tuple[FieldComparison, ...] = ()
    matrices: dict[str, tuple[MatrixReport, ...]] = {}
    replays_skipped: dict[str, str] = {}
    error: str = ""


@dataclass
class Written:
    """Everything that the page shows."""

    experiments: list[ExperimentReport] = field(default_factory=list)
    analyses: dict[str, Analysis] = field(default_factory=dict)
    summary: list[SummaryRow] = field(default_factory=list)


def write_files(setting: Setting, ended: dict[str, Entry], report: Report = lambda _s, _d, _t: None) -> Written:
    """Write every file anew from the bundles and replays that there are; each whole or not at all."""
    suite, folder = setting.suite, setting.folder
    jobs = plan_jobs(suite)
    written = Written()
    reference = Experiment(name="reference", variable="config", baseline=suite.baseline)
    _experiment_file(setting, reference, jobs, ended, folder.path / REFERENCE_FILE)
    for done, experiment in enumerate(suite.experiments):
        report(f"writing {experiment.file}", done, len(suite.experiments))
        made = _one(setting, experiment, jobs, ended, written)
        written.experiments.append(made)
    _json(folder.path / "analysis_reports.json", written.analyses)
    _json(folder.path / "summary.json", written.summary)
    _json(folder.path / "experiments.json", written.experiments)
    return written


def _one(
    setting: Setting, experiment: Experiment, jobs: Sequence[Job], ended: dict[str, Entry], written: Written
) -> ExperimentReport:
    path = setting.folder.path / experiment.file
    ran = [] if experiment.skip else _experiment_file(setting, experiment, jobs, ended, path)
    report = ExperimentReport(
        name=experiment.name,
        variable=experiment.variable,
        file=experiment.file if ran else "",
        skipped=experiment.skip,
        configs=tuple(_states(setting, experiment, jobs, ended)),
    )
    if not ran:
        return report
    compare = setting.suite.compare
    try:
        with open_experiment(path) as source:
            analysis = analyze(source, canonical=cast(Canonical, compare.canonical), top=compare.top)
            written.analyses[experiment.name] = analysis
            written.summary += summarize(source, analysis, experiment.file)
            environment = compare_configurations(source)
    except Error as error:
        written.summary.append(failed(experiment.file, error))
        return msgspec.structs.replace(report, error=error.diagnostics())
    found = {each.name: claimed_verified(setting, experiment, each.name) for each in setting.suite.provers}
    wanted = {replayed_as(setting.suite, each).arithmetic for each in (experiment.baseline, *experiment.variants)}
    timing = tuple(timings(setting, experiment, jobs, ended))
    return msgspec.structs.replace(
        report,
        environment=environment,
        timing=timing,
        forensics=tuple(examine(setting, experiment, jobs, ended, timing, analysis)),
        matrices={name: matrices for name, matrices in found.items() if matrices},
        replays_skipped={
            each.name: ended[replay_id(each.name)].reason
            for each in plan_replays(setting.suite)
            if each.variant.arithmetic in wanted and ended.get(replay_id(each.name), _NONE).event == "skipped"
        },
    )


_NONE = Entry(event="started", job="")


def _experiment_file(
    setting: Setting, experiment: Experiment, jobs: Sequence[Job], ended: dict[str, Entry], path: Path
) -> list[str]:
    """Write one experiment's uniform JSON; the ids of its configs, the baselines first. None without a finished baseline."""
    members: list[tuple[ProverSpec, Variant, Job]] = []
    for prover in setting.suite.provers:
        own = [
            (prover, variant, job) for variant, job in jobs_of(experiment, jobs, prover.name) if is_finished(job, ended)
        ]
        if own and own[0][1].identity == experiment.baseline.identity:
            members += own
    if not members:
        path.unlink(missing_ok=True)
        return []
    keyring = setting.folder.keyring()
    with ExitStack() as stack:
        opened = [
            (each, stack.enter_context(open_bundle(setting.folder.bundle(each[2].id), keyring))) for each in members
        ]
        first = opened[0][1].evidence
        metadata = metadata_of(first, "") | {
            "experiment_type": experiment.name,
            "variable_tested": experiment.variable,
        }
        configurations = [_configuration(prover, variant, bundle) for (prover, variant, _), bundle in opened]
        write_experiment(path, metadata, configurations, _runs(setting, opened, ended))
    return [configuration["config_id"] for configuration in configurations]


def _configuration(prover: ProverSpec, variant: Variant, bundle: VerifiedBundle) -> dict[str, Any]:
    row = bundle.evidence.rows[0]
    found = configuration_of(bundle.evidence, row, "")
    worker = {"worker_env": " ".join(f"{name}={value}" for name, value in sorted(variant.env.items()))}
    return found | {
        "config_id": f"{prover.name}_{variant.name}",
        "hardware": prover.labels.get("gpu") or found["hardware"],
        "variable_value": variant.value if variant.value != "" else variant.name,
        "fixed_params": found["fixed_params"] | (worker if variant.env else {}),
    }


def _runs(
    setting: Setting,
    opened: Sequence[tuple[tuple[ProverSpec, Variant, Job], VerifiedBundle]],
    ended: dict[str, Entry],
) -> Iterator[tuple[Run, RunDetails]]:
    index = 0
    for (prover, variant, job), bundle in opened:
        evidence, row = bundle.evidence, bundle.evidence.rows[0]
        prompts = {entry.id: entry.prompt_ids for entry in evidence.references}
        seconds = counted(ended[job.id].wall_seconds or row.repetitions.wall_seconds, variant)
        for entry in row.traces:
            trace = bundle.trace(row, entry.reference_id)
            info = RunInfo(
                index,
                f"{prover.name}_{variant.name}",
                entry.reference_id,
                setting.suite.repetitions - 1,
                tuple(int(token) for token in trace.output_ids),
                prompts[entry.reference_id].sha256,
            )
            details = {
                "timestamp": evidence.created_at,
                "runtime_seconds": seconds[-1],
                "runtime_mean_seconds": statistics.fmean(seconds),
                "runtime_variance": statistics.variance(seconds) if len(seconds) > 1 else 0.0,
                "repetitions": {"count": setting.suite.repetitions, "bit_identical": ended[job.id].identical},
            }
            yield run_of(trace, prompts[entry.reference_id].shape[0], row.facts.model.num_layers, info), details
            index += 1


def _states(
    setting: Setting, experiment: Experiment, jobs: Sequence[Job], ended: dict[str, Entry]
) -> Iterator[ConfigStatus]:
    for prover in setting.suite.provers:
        for variant, job in [] if experiment.skip else jobs_of(experiment, jobs, prover.name):
            entry = ended.get(job.id)
            state = "open" if entry is None else str(entry.event)
            reason = entry.reason if entry else "not run (`verifier suite resume` goes on)"
            yield ConfigStatus(prover=prover.name, config=variant.name, state=state, reason=reason)


def _json(path: Path, value: object) -> None:
    publish(path, msgspec.json.format(msgspec.json.encode(value)))
