"""How long each config's repetitions took, and by how much that is slower than the baseline's."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence

import msgspec

from fpforensics.verifier.suite.journal import Entry
from fpforensics.verifier.suite.model import Experiment, Variant
from fpforensics.verifier.suite.plan import Job, jobs_of
from fpforensics.verifier.suite.sessions import Setting


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """How long a config's repetitions took. ``slowdown`` is the mean over the baseline's, with a 95 % interval.

    ``seconds`` are those of all repetitions, ``mean`` and ``variance`` of those that :func:`counted` leaves, and the slowdown is made of
    those that :func:`compared` leaves; ``cold`` says that these are the first of each worker. The interval is Fieller's for a ratio of
    means of unequal variance, with Welch's degrees of freedom; None where there are too few repetitions, or where it is unbounded.
    """

    config: str
    seconds: tuple[float, ...]
    mean: float
    variance: float
    slowdown: float | None = None
    interval: tuple[float, float] | None = None
    cold: bool = False


def is_finished(job: Job, ended: Mapping[str, Entry]) -> bool:
    """Whether there is a bundle of this job."""
    return job.id in ended and ended[job.id].event == "finished"


def timings(
    setting: Setting, experiment: Experiment, jobs: Sequence[Job], ended: Mapping[str, Entry]
) -> Iterator[Timing]:
    """Every finished config of an experiment, prover by prover, its baseline first; none of a prover without one."""
    for prover in setting.suite.provers:
        found = jobs_of(experiment, jobs, prover.name)
        _, base_job = found[0]
        for variant, job in found:
            if not (is_finished(job, ended) and is_finished(base_job, ended)):
                continue
            every, own = ended[job.id].wall_seconds, job is base_job
            seconds = counted(every, variant)
            ours, theirs = compared(every, variant, ended[base_job.id].wall_seconds)
            yield Timing(
                config=f"{prover.name}_{variant.name}",
                seconds=every,
                mean=statistics.fmean(seconds),
                variance=statistics.variance(seconds) if len(seconds) > 1 else 0.0,
                slowdown=None if own or not any(theirs) else statistics.fmean(ours) / statistics.fmean(theirs),
                interval=None if own else slowdown_interval(ours, theirs),
                cold=variant.reload,
            )


def counted(seconds: tuple[float, ...], variant: Variant) -> tuple[float, ...]:
    """Without the first of three or more repetitions in one worker: a GPU's kernels are loaded and compiled in it."""
    return seconds if variant.reload or len(seconds) < 3 else seconds[1:]


def compared(
    seconds: tuple[float, ...], variant: Variant, base_seconds: tuple[float, ...]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The repetitions of a config and of its baseline that a slowdown is made of: those counted; of a config with a worker for each
    repetition all of them, against the first of the baseline's one worker."""
    if variant.reload:
        return seconds, base_seconds[:1]
    return counted(seconds, variant), counted(base_seconds, variant)


def slowdown_interval(seconds: Sequence[float], base: Sequence[float]) -> tuple[float, float] | None:
    """A 95 % confidence interval of the ratio of two means (Fieller 1954); None where there is none that is bounded."""
    if min(len(seconds), len(base)) < 2 or not any(base):
        return None
    a, b = statistics.fmean(seconds), statistics.fmean(base)
    va, vb = statistics.variance(seconds) / len(seconds), statistics.variance(base) / len(base)
    if va + vb == 0:
        return a / b, a / b
    freedom = (va + vb) ** 2 / (va**2 / (len(seconds) - 1) + vb**2 / (len(base) - 1))
    t = _t_quantile(freedom)
    g = t * t * vb / (b * b)
    if g >= 1:
        return None
    centre = a / b / (1 - g)
    half = t / (b * (1 - g)) * math.sqrt((1 - g) * va + (a / b) ** 2 * vb)
    return centre - half, centre + half


_T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def _t_quantile(freedom: float) -> float:
    """Student's t at 0.975, for the whole degrees of freedom below: never too narrow."""
    whole = max(1, int(freedom))
    return _T975[whole - 1] if whole <= len(_T975) else _T975[-1]
