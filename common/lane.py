"""Heavy work behind a streaming call: one job at a time, its latest progress while it runs, stopped when the caller
leaves.

A slow reader never slows the work: progress that was not read in time is replaced by newer progress.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

import grpc

from fpforensics.common.errors import CancelledError, LimitError
from fpforensics.proto.evidence_pb2 import Progress

T = TypeVar("T")
E = TypeVar("E")
Report = Callable[[str, int, int], None]
Cancelled = Callable[[], bool]


class Lane:
    """Runs one job at a time; at most ``waiting`` others wait for their turn, more are refused."""

    def __init__(self, name: str, waiting: int = 0) -> None:
        self._name = name
        self._waiting = waiting
        self._taken = 0
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)

    def run(
        self,
        context: grpc.ServicerContext,
        work: Callable[[Report, Cancelled], T],
        show: Callable[[Progress], E],
    ) -> Generator[E, None, T]:
        """Yield ``show(progress)`` while ``work(report, cancelled)`` runs in another thread; return its result.

        However this generator ends, the work has ended before it. Raises :class:`LimitError` if the lane is full.
        """
        mailbox = _Mailbox()
        with self._lock:
            if self._taken > self._waiting:
                raise LimitError(f"{self._taken} {self._name} already under way", "try again when it is done")
            if self._taken:
                mailbox.report(f"waiting for {self._taken} earlier {self._name}", 0, 0)
            self._taken += 1
            future = self._pool.submit(work, mailbox.report, mailbox.is_cancelled)

        def finished(_: Future[T]) -> None:
            with self._lock:  # first free the lane: whoever hears that this is over may come at once
                self._taken -= 1
            mailbox.close()

        future.add_done_callback(finished)
        if not context.add_callback(mailbox.cancel):
            mailbox.cancel()
        try:
            while (progress := mailbox.take()) is not None:
                yield show(progress)
            if mailbox.is_cancelled():
                raise CancelledError(f"{self._name} cancelled", "nothing was kept")
            return future.result()
        finally:
            mailbox.cancel()
            if not future.cancel():  # which succeeds for one that was still waiting for its turn
                wait([future])

    def close(self) -> None:
        """Wait for the work under way and take no more."""
        self._pool.shutdown(wait=True, cancel_futures=True)


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
    """Cancel the call when it lasts longer: a client that sends nothing would hold its thread for ever."""
    timer = threading.Timer(seconds, context.cancel)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class _Mailbox:
    """Holds the latest progress until it is taken."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._latest: Progress | None = None
        self._closed = False
        self._cancelled = False

    def report(self, stage: str, done: int, total: int) -> None:
        with self._condition:
            self._latest = Progress(stage=stage[:512], done=max(0, done), total=max(0, total))
            self._condition.notify_all()

    def take(self) -> Progress | None:
        """Wait for the next progress; None when there will be none."""
        with self._condition:
            self._condition.wait_for(lambda: self._latest is not None or self._closed or self._cancelled)
            latest, self._latest = self._latest, None
            return None if self._cancelled else latest

    def close(self) -> None:
        with self._condition:
            self._closed = True
            self._condition.notify_all()

    def cancel(self) -> None:
        with self._condition:
            self._cancelled = True
            self._condition.notify_all()

    def is_cancelled(self) -> bool:
        return self._cancelled
