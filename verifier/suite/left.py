"""How long a run still takes, from what is finished: sessions of provers side by side, then replays one after the other."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from fpforensics.verifier.suite.journal import DONE, Entry, Journal
from fpforensics.verifier.suite.model import Suite
from fpforensics.verifier.suite.plan import Job, lanes_of, plan_jobs, plan_replays, replay_id


def seconds_left(suite: Suite, ended: Mapping[str, Entry]) -> float | None:
    """Seconds for the sessions and replays that have not ended; None before any session has finished."""
    jobs = plan_jobs(suite)
    finished = [ended[job.id] for job in jobs if _has_finished(job, ended)]
    if not finished:
        return None
    mean = statistics.fmean(entry.seconds for entry in finished)
    sessions = max(_lane_seconds(lane, ended, mean) for lane in lanes_of(jobs))
    return sessions + _replay_seconds(suite, jobs, ended, finished)


def say_left(suite: Suite, journal: Journal) -> str:
    """The same in words, for a line of progress; empty where it is not known."""
    seconds = seconds_left(suite, journal.latest(*DONE, "blocked"))
    if seconds is None:
        return ""
    return f", about {seconds / 60:.0f} min left" if seconds >= 90 else f", about {seconds:.0f} s left"


def _has_finished(job: Job, ended: Mapping[str, Entry]) -> bool:
    return job.id in ended and ended[job.id].event == "finished"


def _lane_seconds(lane: list[Job], ended: Mapping[str, Entry], mean: float) -> float:
    """``mean`` is every prover's; a prover's own is taken where it has finished something."""
    own = [ended[job.id].seconds for job in lane if _has_finished(job, ended)]
    return (statistics.fmean(own) if own else mean) * sum(job.id not in ended for job in lane)


def _replay_seconds(suite: Suite, jobs: tuple[Job, ...], ended: Mapping[str, Entry], finished: list[Entry]) -> float:
    if not suite.replay.enabled:
        return 0.0
    lost = {job.id for job in jobs if job.id in ended and ended[job.id].event != "finished"}
    sizes = {replay_id(each.name): len(set(each.jobs) - lost) for each in plan_replays(suite)}
    opened = [size for name, size in sizes.items() if size and name not in ended]
    measured = [name for name in sizes if name in ended and ended[name].event == "finished"]
    if measured:  # loading a config takes about as long as one bundle
        unit = sum(ended[name].seconds for name in measured) / sum(1 + sizes[name] for name in measured)
        return unit * sum(1 + size for size in opened)
    # A bundle is replayed in about the time of one repetition; the rest of a session is loading.
    once = statistics.fmean(statistics.fmean(entry.wall_seconds or (entry.seconds,)) for entry in finished)
    loading = statistics.fmean(max(0.0, entry.seconds - sum(entry.wall_seconds)) for entry in finished)
    return sum(loading + once * size for size in opened)
