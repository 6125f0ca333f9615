"""Run a suite, or go on where a run ended: every job once, each noted before the next begins.

Three things can end a job. A host that cannot run a config skips it, with the reason. Repetitions that differ stop the
experiments that need the config. What is no fault of the config (a lost connection, a full disk, a kill) ends the run,
which can then be resumed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace

import msgspec

from fpforensics.common.errors import (
    CancelledError,
    DeadlineError,
    Error,
    EvidenceError,
    LimitError,
    MissingDependencyError,
    NondeterminismError,
    ReplayError,
    UnavailableError,
    UsageError,
    shorten,
)
from fpforensics.common.keys import Keyring
from fpforensics.common.signals import Trace, first_divergence
from fpforensics.verifier.intake import open_bundle
from fpforensics.verifier.suite.folder import is_full
from fpforensics.verifier.suite.journal import DONE, ENDED, Entry, Journal
from fpforensics.verifier.suite.left import Left
from fpforensics.verifier.suite.plan import Job, lanes_of, plan_jobs
from fpforensics.verifier.suite.sessions import Held, Loads, Report, Setting, adopt, fetch, new_nonce

RETRIES = 4
RETRY_SECONDS = 2.0
MAX_REASON = 600


class StoppedError(ReplayError):
    """The run ended before its work was done, and can be resumed."""


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Time, as tests can set it. ``wait`` is by default until all is to end, at most so many seconds."""

    now: Callable[[], float] = time.time
    wait: Callable[[float], None] | None = None


def run_sessions(
    setting: Setting,
    journal: Journal,
    report: Report = lambda _stage, _done, _total: None,
    *,
    clock: Clock | None = None,
    again: bool = False,
) -> None:
    """Run every job that is not done: one machine's in order, machines side by side.

    Failed jobs are tried again, skipped ones only with ``again``. What ends the run on one machine lets the jobs that are under
    way on others end first, so that nothing is lost; Ctrl-C ends them at once.

    Raises :class:`StoppedError` where the run cannot go on now, and :class:`EvidenceError` for a prover's bundle that is
    not to be trusted.
    """
    clock = clock or Clock()
    jobs = plan_jobs(setting.suite)
    run = _Run(setting, journal, report, clock, again, jobs, setting.folder.keyring(), Left(setting, journal))
    lanes = lanes_of(jobs)
    with ThreadPoolExecutor(len(lanes)) as pool:
        try:
            wait([pool.submit(run.lane, lane) for lane in lanes])
        except BaseException:  # Ctrl-C: nobody waits for what is under way
            setting.stop.set()
            raise
    if run.failures:
        raise run.failures[0]


@dataclass
class _Run:
    """What the lanes of a run share. ``failures`` are what ended the run, the first one first."""

    setting: Setting
    journal: Journal
    report: Report
    clock: Clock
    again: bool
    jobs: Sequence[Job]
    keyring: Keyring
    left: Left
    failures: list[BaseException] = field(default_factory=list)

    def lane(self, jobs: Sequence[Job]) -> None:
        """One machine's jobs in order. Once the run has failed elsewhere, the one that is under way is the last."""
        try:
            for job in jobs:
                if self.failures or self.setting.stop():
                    return
                self._job(job)
        except BaseException as error:
            self.failures.append(error)

    def _job(self, job: Job) -> None:
        setting, journal, now = self.setting, self.journal, self.clock.now
        last = journal.latest(*ENDED).get(job.id)
        if last is not None and last.event in DONE and not (self.again and last.event == "skipped"):
            _tidy(setting, job)
            return
        if job.skip:
            journal.add(Entry(event="skipped", job=job.id, at=now(), reason=job.skip))
            return
        if reason := _blocked(setting, self.jobs, job, journal):
            if last is None or (last.event, last.reason) != ("blocked", reason):
                journal.add(Entry(event="blocked", job=job.id, at=now(), reason=reason))
            return
        place = f"session {self.jobs.index(job) + 1} of {len(self.jobs)}{self.left}"
        where = f"{', '.join(job.experiments[:2]) or 'reference'}: {job.id} ({place})"

        def tell(stage: str, done: int, total: int) -> None:
            last_one = "the last one, another prover's failed: " if self.failures else ""
            self.report(f"{last_one}{where}: {stage}", done, total)

        _run_job(setting, journal, job, tell, self.keyring, self.clock)


def _run_job(setting: Setting, journal: Journal, job: Job, tell: Report, keyring: Keyring, clock: Clock) -> None:
    started, worked, loads = clock.now(), False, Loads(setting.start)
    setting = replace(setting, start=loads)

    def noticing(stage: str, done: int, total: int) -> None:
        nonlocal worked
        worked = worked or done > 0
        tell(stage, done, total)

    def note(event: str, error: Error) -> None:
        reason = shorten(error.diagnostics(), MAX_REASON)
        ended = Entry(event=event, job=job.id, at=clock.now(), reason=reason)  # type: ignore[arg-type]
        journal.add(msgspec.structs.replace(ended, loads=loads.count, load_seconds=loads.seconds))

    try:
        sessions = _sessions(setting, journal, job, noticing, keyring, clock)
        held = sessions[-1]
        identical = held.identical
        if job.variant.reload:
            identical = _are_equal(setting, job, len(sessions), keyring)
            _keep_last(setting, job, len(sessions))
        journal.add(
            Entry(
                event="finished",
                job=job.id,
                at=clock.now(),
                digest=held.digest,
                seconds=clock.now() - started,
                wall_seconds=tuple(seconds for each in sessions for seconds in each.wall_seconds),
                identical=identical,
                concurrent_work=tuple(work for each in sessions for work in each.concurrent_work),
                loads=loads.count,
                load_seconds=loads.seconds,
            )
        )
        _tidy(setting, job)
    except NondeterminismError as error:
        note("stopped", error)
    except (CancelledError, UnavailableError, LimitError, DeadlineError) as error:
        raise _stopped(setting, job, error) from error
    except (UsageError, MissingDependencyError, ReplayError) as error:
        if is_full(error) or isinstance(error, StoppedError):
            raise _stopped(setting, job, error) from error
        note("failed" if worked else "skipped", error)
    except OSError as error:
        raise _stopped(setting, job, UsageError(f"cannot write: {error.strerror or error}", "free space")) from error


def _sessions(setting: Setting, journal: Journal, job: Job, tell: Report, keyring: Keyring, clock: Clock) -> list[Held]:
    """The job's sessions: one, or one for each repetition. Those that a killed run had finished are taken as they are."""
    found = []
    for name in session_names(setting, job):
        noted = journal.latest("started").get(name)
        held = None
        if noted is not None:
            held = adopt(setting, job, name, noted.nonce, keyring) or (
                adopt(setting, job, job.id, noted.nonce, keyring) if name != job.id else None
            )
        if held is None:
            held = _fetch_patiently(setting, journal, job, name, tell, keyring, clock)
        found.append(held)
    return found


def session_names(setting: Setting, job: Job) -> list[str]:
    """What the job's sessions are called."""
    if not job.variant.reload:
        return [job.id]
    return [f"{job.id}.rep{number}" for number in range(1, setting.suite.repetitions + 1)]


def _fetch_patiently(
    setting: Setting, journal: Journal, job: Job, session: str, tell: Report, keyring: Keyring, clock: Clock
) -> Held:
    """Try again after a lost connection or a busy prover, a bounded number of times."""
    for attempt in range(RETRIES + 1):
        nonce = new_nonce()
        journal.add(Entry(event="started", job=session, at=clock.now(), nonce=nonce))
        try:
            return fetch(setting, job, session, nonce, tell, keyring)
        except (UnavailableError, LimitError) as error:
            if setting.stop():
                raise CancelledError("the run was stopped") from None
            if attempt == RETRIES:
                raise
            tell(f"trying again: {error.message}", 0, 0)
            (clock.wait or setting.stop.wait)(RETRY_SECONDS * 2**attempt)
    raise AssertionError("unreachable")


def _are_equal(setting: Setting, job: Job, count: int, keyring: Keyring) -> bool:
    """Compare repetitions that had a worker each.

    Raises :class:`NondeterminismError` naming the first divergence where the experiment does not allow one.
    """
    names = session_names(setting, job)
    first = _traces(setting, names[0], keyring)
    for number in range(2, count + 1):
        name = names[number - 1]
        name = name if setting.folder.bundle(name).exists() else job.id
        for ours, theirs in zip(first, _traces(setting, name, keyring), strict=True):
            divergence = first_divergence(ours, theirs)
            if divergence is not None and job.variant.nondeterministic:
                return False
            if divergence is not None:
                raise NondeterminismError(
                    f"{job.id}: repetition {number}, in a worker of its own, differs from the first at {divergence}",
                    "find the cause, or mark the experiment with nondeterministic = true",
                )
    return True


def _traces(setting: Setting, session: str, keyring: Keyring) -> list[Trace]:
    with open_bundle(setting.folder.bundle(session), keyring) as bundle:
        row = bundle.evidence.rows[0]
        return [bundle.trace(row, entry.reference_id) for entry in row.traces]


def _keep_last(setting: Setting, job: Job, count: int) -> None:
    last = setting.folder.bundle(session_names(setting, job)[count - 1])
    if last.exists():
        last.replace(setting.folder.bundle(job.id))


def _tidy(setting: Setting, job: Job) -> None:
    """Of repetitions that are known to be equal, only the last one's signals are stored."""
    if job.variant.reload:
        for name in session_names(setting, job):
            setting.folder.bundle(name).unlink(missing_ok=True)


def _blocked(setting: Setting, jobs: Sequence[Job], job: Job, journal: Journal) -> str:
    """Why a job has no use: its experiments have no baseline on this prover, or one of their configs was not reproducible."""
    ended = journal.latest(*ENDED)
    reasons = []
    for experiment in setting.suite.experiments:
        if experiment.name not in job.experiments or job.variant.identity == experiment.baseline.identity:
            continue
        reason = ""
        for other in jobs:
            if other.prover.name != job.prover.name or experiment.name not in other.experiments or other.id == job.id:
                continue
            entry = ended.get(other.id)
            if entry is None or entry.event == "finished":
                continue
            if entry.event == "stopped":
                reason = f"{experiment.name} stopped: {entry.reason}"
            elif other.variant.identity == experiment.baseline.identity:
                reason = f"the baseline of {experiment.name} did not run: {entry.reason}"
            if reason:
                break
        reasons.append(reason)
    return shorten(reasons[0], MAX_REASON) if reasons and all(reasons) else ""


def _stopped(setting: Setting, job: Job, error: Error) -> Error:
    if isinstance(error, CancelledError | EvidenceError):
        return error
    hint = f"{error.hint}; then: " if error.hint else ""
    return StoppedError(
        f"stopped at {job.id}: {error.message}",
        f"{hint}verifier suite resume {setting.folder.path}, which repeats nothing",
    )
