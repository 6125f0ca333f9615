"""What concurrent work did to a config: a verdict on its numbers and one on its time, each beside what was measured.

The published finding is that concurrent streams leave the numbers untouched and only slow things down.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import msgspec

from fpforensics.common.engines.base import ConcurrentWork
from fpforensics.common.errors import shorten
from fpforensics.common.signals import Trace
from fpforensics.verifier.analysis import Analysis
from fpforensics.verifier.exact import first_difference
from fpforensics.verifier.intake import VerifiedBundle, open_bundle
from fpforensics.verifier.suite.journal import Entry
from fpforensics.verifier.suite.model import Experiment, Variant
from fpforensics.verifier.suite.plan import Job, jobs_of
from fpforensics.verifier.suite.sessions import Setting
from fpforensics.verifier.suite.timing import Timing, is_finished

NumbersVerdict = Literal["UNTOUCHED", "CHANGED"]
TimeVerdict = Literal["SLOWER", "NOT_SLOWER", "UNRESOLVED"]

TOLERANCE = 0.05
"""A config that may be slower by this share of the baseline's time at most counts as not slower."""
_AMONG_THEMSELVES = "its own repetitions differ"


class Forensics(msgspec.Struct, frozen=True, kw_only=True):
    """One config beside the baseline that it differs from in ``concurrent`` alone.

    ``work`` is what ran beside each repetition. ``distances`` are from the baseline's trace, by ``phase/signal``, as the
    analysis measures them (None where tokens differ); ``first_difference`` is empty where every bit is equal. ``slowdown``
    and ``interval`` are those of :class:`Timing`.
    """

    config: str
    work: tuple[ConcurrentWork, ...]
    numbers: NumbersVerdict
    first_difference: str
    distances: dict[str, float | None]
    time: TimeVerdict
    slowdown: float | None
    interval: tuple[float, float] | None


def judge_numbers(baseline: Sequence[Trace], traces: Sequence[Trace]) -> tuple[NumbersVerdict, str]:
    """UNTOUCHED where the traces of the same prompts are equal in every bit, tokens included; else CHANGED, and where first."""
    difference = first_difference(baseline, traces)
    return ("CHANGED" if difference else "UNTOUCHED"), difference


def judge_time(interval: tuple[float, float] | None) -> TimeVerdict:
    """From the 95 % interval of the slowdown: SLOWER where all of it lies above 1, NOT_SLOWER where none of it lies above
    1 + :data:`TOLERANCE`, UNRESOLVED where it is unbounded or allows both."""
    if interval is None:
        return "UNRESOLVED"
    low, high = interval
    if low > 1:
        return "SLOWER"
    return "NOT_SLOWER" if high <= 1 + TOLERANCE else "UNRESOLVED"


def examine(
    setting: Setting,
    experiment: Experiment,
    jobs: Sequence[Job],
    ended: Mapping[str, Entry],
    timing: Sequence[Timing],
    analysis: Analysis,
) -> Iterator[Forensics]:
    """Every finished config of an experiment that differs from its baseline in concurrent work alone."""
    times = {each.config: each for each in timing}
    for prover in setting.suite.provers:
        (_, base), *others = jobs_of(experiment, jobs, prover.name)
        for variant, job in others:
            if not (_only_accompanied(variant, experiment.baseline) and is_finished(base, ended)):
                continue
            if not is_finished(job, ended):
                continue
            name, entry = f"{prover.name}_{variant.name}", ended[job.id]
            numbers, difference = _numbers(setting, base, job, entry)
            yield Forensics(
                config=name,
                work=entry.concurrent_work,
                numbers=numbers,
                first_difference=difference,
                distances=_distances(analysis, f"{prover.name}_{experiment.baseline.name}", name),
                time=judge_time(times[name].interval),
                slowdown=times[name].slowdown,
                interval=times[name].interval,
            )


def render_forensics(found: Forensics) -> str:
    """Both verdicts in one line, with what they rest on."""
    overlaps = ", ".join(f"{each.overlap:.0%}" for each in found.work)
    largest = max((value for value in found.distances.values() if value is not None), default=None)
    if found.numbers == "UNTOUCHED":
        numbers = "bit-identical"
    else:
        numbers = f"first: {found.first_difference}" + (f", L2 up to {largest:.3g}" if largest is not None else "")
    if found.slowdown is None:
        time = "no slowdown"
    elif found.interval is None:
        time = f"{found.slowdown:.2f}×, no interval"
    else:
        time = f"{found.slowdown:.2f}×, 95 % {found.interval[0]:.2f} to {found.interval[1]:.2f}"
    return f"{found.config}: numbers {found.numbers} ({numbers}); time {found.time} ({time}); overlap {overlaps}"


def _only_accompanied(variant: Variant, baseline: Variant) -> bool:
    alone = msgspec.structs.replace(
        variant, config=msgspec.structs.replace(variant.config, concurrent_work=baseline.config.concurrent_work)
    )
    added = variant.config.concurrent_work and not baseline.config.concurrent_work
    return added and alone.arithmetic == baseline.arithmetic


def _numbers(setting: Setting, base: Job, job: Job, entry: Entry) -> tuple[NumbersVerdict, str]:
    keyring = setting.folder.keyring()
    with (
        open_bundle(setting.folder.bundle(base.id), keyring) as ours,
        open_bundle(setting.folder.bundle(job.id), keyring) as theirs,
    ):
        if not entry.identical:
            where = theirs.evidence.rows[0].repetitions.first_divergence
            return "CHANGED", f"{_AMONG_THEMSELVES}{f', {shorten(where, 160)}' if where else ''}"
        return judge_numbers(_traces(ours), _traces(theirs))


def _traces(bundle: VerifiedBundle) -> list[Trace]:
    row = bundle.evidence.rows[0]
    return [bundle.trace(row, entry.id) for entry in bundle.evidence.references]


def _distances(analysis: Analysis, baseline: str, config: str) -> dict[str, float | None]:
    return {
        f"{phase}/{signal}": cell.matrix[cell.configs.index(baseline)][cell.observed_configs.index(config)]
        for phase, signals in analysis.items()
        for signal, cell in signals.items()
    }
