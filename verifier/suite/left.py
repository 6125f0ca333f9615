"""How long a run still takes, from what is finished: sessions of provers side by side, then replays one after the other.

What is known to be skipped takes no time.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping
from functools import cached_property

from fpforensics.verifier.suite.journal import DONE, Entry, Journal
from fpforensics.verifier.suite.model import Suite
from fpforensics.verifier.suite.plan import Job, lanes_of, plan_jobs, plan_replays, replay_id
from fpforensics.verifier.suite.sessions import Setting
from fpforensics.verifier.suite.skips import finder, known_skips


class Left:
    """Says of one run how long it still takes."""

    def __init__(self, setting: Setting, journal: Journal) -> None:
        self._setting, self._journal = setting, journal

    def __str__(self) -> str:
        """Words for a line of progress; none where it is not known."""
        suite, ended = self._setting.suite, self._journal.latest(*DONE, "blocked")
        if not any(entry.event == "finished" for entry in ended.values()):
            return ""
        seconds = seconds_left(suite, ended, self._skipped)
        if seconds is None:
            return ""
        return f", about {seconds / 60:.0f} min left" if seconds >= 90 else f", about {seconds:.0f} s left"

    @cached_property
    def _skipped(self) -> frozenset[str]:
        return frozenset(known_skips(self._setting, finder(self._setting.models)))


def seconds_left(suite: Suite, ended: Mapping[str, Entry], skipped: Collection[str] = ()) -> float | None:
    """Seconds for the sessions and replays that have not ended; None before any session has finished.

    ``skipped`` are ids of those that will not run.
    """
    jobs = plan_jobs(suite)
    finished = [ended[job.id] for job in jobs if _has_finished(job, ended)]
    if not finished:
        return None
    mean = statistics.fmean(entry.seconds for entry in finished)
    over = {*ended, *skipped}
    sessions = max(_lane_seconds(lane, ended, over, mean) for lane in lanes_of(jobs))
    return sessions + _replay_seconds(suite, jobs, ended, over, finished)


def _has_finished(job: Job, ended: Mapping[str, Entry]) -> bool:
    return job.id in ended and ended[job.id].event == "finished"


def _lane_seconds(lane: list[Job], ended: Mapping[str, Entry], over: Collection[str], mean: float) -> float:
    """``mean`` is every prover's; a prover's own is taken where it has finished something."""
    own = [ended[job.id].seconds for job in lane if _has_finished(job, ended)]
    return (statistics.fmean(own) if own else mean) * sum(job.id not in over for job in lane)


def _replay_seconds(
    suite: Suite, jobs: tuple[Job, ...], ended: Mapping[str, Entry], over: Collection[str], finished: list[Entry]
) -> float:
    if not suite.replay.enabled:
        return 0.0
    lost = {job.id for job in jobs if job.id in over and not _has_finished(job, ended)}
    sizes = {replay_id(each.name): len(set(each.jobs) - lost) for each in plan_replays(suite)}
    opened = [size for name, size in sizes.items() if size and name not in over]
    measured = [name for name in sizes if name in ended and ended[name].event == "finished"]
    if measured:  # loading a config takes about as long as one bundle
        unit = sum(ended[name].seconds for name in measured) / sum(1 + sizes[name] for name in measured)
        return unit * sum(1 + size for size in opened)
    # A bundle is replayed in about the time of one repetition; the rest of a session is loading.
    once = statistics.fmean(statistics.fmean(entry.wall_seconds or (entry.seconds,)) for entry in finished)
    loading = statistics.fmean(max(0.0, entry.seconds - sum(entry.wall_seconds)) for entry in finished)
    return sum(loading + once * size for size in opened)
