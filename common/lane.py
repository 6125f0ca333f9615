"""Heavy work behind a streaming call: one job at a time, its latest progress while it runs, stopped when the caller
leaves, when it takes too long, or when the server stops.

A slow reader never slows the work: progress that was not read in time is replaced by newer progress. Work that is silent
for long does not leave its caller in doubt: the last progress is said again now and then.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

import grpc

from fpforensics.common.errors import CancelledError, DeadlineError, Error, LimitError
from fpforensics.proto.evidence_pb2 import Progress

T = TypeVar("T")
E = TypeVar("E")
Report = Callable[[str, int, int], None]
Cancelled = Callable[[], bool]

HEARTBEAT_SECONDS = 15.0
"""How long a call that is under way may say nothing."""

WORK_SECONDS = 6 * 3600.0
"""How long one job may run, unless a server's operator says otherwise."""


class Lane:
    """Runs one job at a time; at most ``waiting`` others wait for their turn, more are refused.

    A job may run for ``seconds`` (None: for ever), not counting its wait; silence is broken every ``heartbeat`` seconds.
    """

    def __init__(
        self, name: str, waiting: int = 0, *, seconds: float | None = None, heartbeat: float = HEARTBEAT_SECONDS
    ) -> None:
        self._name = name
        self._waiting = waiting
        self._seconds, self._heartbeat = seconds, heartbeat
        self._under_way: set[_Mailbox] = set()
        self._stopped: Error | None = None
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)

    def run(
        self,
        context: grpc.ServicerContext,
        work: Callable[[Report, Cancelled], T],
        show: Callable[[Progress], E],
    ) -> Generator[E, None, T]:
        """Yield ``show(progress)`` while ``work(report, cancelled)`` runs in another thread; return its result.

        However this generator ends, the work has ended before it. Raises :class:`LimitError` if the lane is full,
        :class:`DeadlineError` if the work takes too long, what :meth:`stop` was given if that comes first.
        """
        mailbox = _Mailbox(f"{self._name} under way")
        with self._lock:
            taken = len(self._under_way)
            if self._stopped is not None:
                raise self._stopped
            if taken > self._waiting:
                raise LimitError(f"{taken} {self._name} already under way", "try again when it is done")
            if taken:
                mailbox.report(f"waiting for {taken} earlier {self._name}", 0, 0)
            self._under_way.add(mailbox)
            future = self._pool.submit(self._timed, work, mailbox)

        def finished(_: Future[T]) -> None:
            with self._lock:  # first free the lane: whoever hears that this is over may come at once
                self._under_way.discard(mailbox)
            mailbox.close()

        def leave() -> None:
            mailbox.stop(CancelledError(f"{self._name} cancelled", "nothing was kept"))

        future.add_done_callback(finished)
        if not context.add_callback(leave):
            leave()
        try:
            while (progress := mailbox.take(self._heartbeat)) is not None:
                yield show(progress)
            if mailbox.reason is not None:
                raise mailbox.reason
            return future.result()
        finally:
            leave()
            if not future.cancel():  # which succeeds for one that was still waiting for its turn
                wait([future])

    def stop(self, reason: Error) -> None:
        """End the work under way, and that of all who wait or come later, with ``reason``. Does not wait for it."""
        with self._lock:
            self._stopped = reason
            under_way = list(self._under_way)
        for mailbox in under_way:
            mailbox.stop(reason)

    def close(self) -> None:
        """Wait for the work under way and take no more."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _timed(self, work: Callable[[Report, Cancelled], T], mailbox: _Mailbox) -> T:
        with self._lock:
            stopped = mailbox.reason or self._stopped
        if stopped is not None:  # its turn has come because those before it were stopped too
            raise stopped
        if self._seconds is None:
            return work(mailbox.report, mailbox.is_stopped)
        late = DeadlineError(
            f"{self._name} stopped: it took more than the {self._seconds:g} seconds that this server gives one",
            "ask for less at once, or ask the server's operator for more (--max-seconds)",
        )
        with _timer(self._seconds, lambda: mailbox.stop(late)):
            return work(mailbox.report, mailbox.is_stopped)


class Slots:
    """A bound on calls that hold a thread for as long as their client likes."""

    def __init__(self, name: str, count: int) -> None:
        self._name, self._count = name, count
        self._free = threading.BoundedSemaphore(count)

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Hold one in this block. Raises :class:`LimitError` when none is free."""
        if not self._free.acquire(blocking=False):
            raise LimitError(f"{self._count} {self._name} are under way already", "try again later")
        try:
            yield
        finally:
            self._free.release()


@contextmanager
def deadline(context: grpc.ServicerContext, seconds: float) -> Iterator[None]:
    """Cancel the call when it lasts longer: a client that neither sends nor reads would hold its thread for ever."""
    with _timer(seconds, context.cancel):
        yield


@contextmanager
def _timer(seconds: float, act: Callable[[], object]) -> Iterator[None]:
    timer = threading.Timer(seconds, act)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class _Mailbox:
    """Holds the latest progress until it is taken, and why the work must stop, once it must."""

    def __init__(self, stage: str) -> None:
        self._condition = threading.Condition()
        self._latest: Progress | None = None
        self._last = Progress(stage=stage)
        self._closed = False
        self.reason: Error | None = None

    def report(self, stage: str, done: int, total: int) -> None:
        with self._condition:
            self._latest = self._last = Progress(stage=stage[:512], done=max(0, done), total=max(0, total))
            self._condition.notify_all()

    def take(self, seconds: float) -> Progress | None:
        """The next progress, or the last one again after ``seconds`` without any; None when there will be none."""
        with self._condition:
            if not self._condition.wait_for(
                lambda: self._latest is not None or self._closed or self.is_stopped(), seconds
            ):
                return self._last
            latest, self._latest = self._latest, None
            return None if self.is_stopped() else latest

    def close(self) -> None:
        with self._condition:
            self._closed = True
            self._condition.notify_all()

    def stop(self, reason: Error) -> None:
        """The work is to end; the first reason counts."""
        with self._condition:
            if self.reason is None:
                self.reason = reason
            self._condition.notify_all()

    def is_stopped(self) -> bool:
        return self.reason is not None
