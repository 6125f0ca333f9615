"""Work that an engine keeps running beside its generations and replays, seen to run before they begin and gone after them.

A generation and a decode replay are accompanied alike: the work is part of the config. Workers are threads; what one
multiplies, on which device and by which clock, is in :mod:`concurrent_cuda` and :mod:`concurrent_threads`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, Protocol

import msgspec

from fpforensics.common.engines.base import ConcurrentWork
from fpforensics.common.engines.overlap import Burst, measure, require_overlap
from fpforensics.common.errors import Error, ReplayError, shorten


class Products(Protocol):
    """One worker's products. Everything is called in the worker's own thread, but for :meth:`now`."""

    kind: Literal["cuda-stream", "threads"]
    dtype: str
    duty: float
    """The share of its time that the worker is to work, above 0 and at most 1."""

    @property
    def size(self) -> int:
        """N of the N × N matrices; known once prepared."""
        ...

    def prepare(self) -> None:
        """Allocate."""
        ...

    def burst(self) -> Burst:
        """Multiply for a moment, and wait for the result."""
        ...

    def now(self) -> float:
        """This moment of the calling thread's own work, by the clock of the bursts. Called after a burst."""
        ...

    def free(self) -> None:
        """Give the memory back; also after a :meth:`prepare` that failed."""
        ...


class Load(Protocol):
    """Concurrent work on one device, or on every rank's."""

    def begin(self) -> None:
        """Start it and see it run. Raises :class:`ReplayError`, with nothing left running."""
        ...

    def end(self) -> ConcurrentWork:
        """End it: what it did since it was seen. Raises :class:`ReplayError` where it had failed."""
        ...

    def abandon(self) -> None:
        """End it, whatever it did."""
        ...


class ThreadedLoad:
    """Workers in threads of this process, all by one clock."""

    def __init__(self, products: Sequence[Products]) -> None:
        self._products = products
        self._workers: list[_Worker] = []
        self._opened = 0.0

    def begin(self) -> None:
        """As :meth:`Load.begin`."""
        try:
            for each in self._products:
                worker = _Worker(each)
                self._workers.append(worker)
                worker.thread.start()
            for worker in self._workers:
                worker.seen.wait()
            self._require_alive()
            self._opened = self._products[0].now()
        except BaseException:
            self.abandon()
            raise

    def end(self) -> ConcurrentWork:
        """As :meth:`Load.end`."""
        try:
            self._require_alive()
            window = self._opened, self._products[0].now()
        except BaseException:
            self.abandon()
            raise
        workers = self._stop()
        self._require_alive(workers)
        measured = measure([worker.bursts for worker in workers], window)
        first = self._products[0]
        return ConcurrentWork(
            kind=first.kind,
            size=first.size,
            dtype=first.dtype,
            workers=len(workers),
            products=measured.products,
            seconds=window[1] - window[0],
            overlap=measured.overlap,
            busy=measured.busy,
            outside_seconds=0.0,
        )

    def abandon(self) -> None:
        """As :meth:`Load.abandon`."""
        self._stop()

    def _stop(self) -> list[_Worker]:
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.stop.set()
        for worker in workers:
            if worker.thread.ident is not None:
                worker.thread.join()
        return workers

    def _require_alive(self, workers: Sequence[_Worker] | None = None) -> None:
        for worker in self._workers if workers is None else workers:
            if isinstance(worker.error, Error):
                raise worker.error
            if worker.error is not None:
                text = shorten(" ".join(str(worker.error).split()), 200)
                raise ReplayError(
                    f"concurrent=true: the work beside generation failed: {type(worker.error).__name__}: {text}",
                    "free memory on the device, or use concurrent=false",
                )


class _Worker:
    """A thread that works in bursts until it is told to stop."""

    def __init__(self, products: Products) -> None:
        self.bursts: list[Burst] = []
        self.error: BaseException | None = None
        self.seen, self.stop = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._run, args=(products,), name="concurrent-work", daemon=True)

    def _run(self, products: Products) -> None:
        try:
            products.prepare()
            while not self.stop.is_set():
                burst = products.burst()
                self.bursts.append(burst)
                self.seen.set()
                if products.duty < 1 and len(self.bursts) > 1:  # no pause before the generation, which may be short
                    self.stop.wait((burst.end - burst.start) * (1 / products.duty - 1))
        except BaseException as error:
            self.error = error
        try:
            products.free()
        except BaseException as error:
            self.error = self.error or error
        self.seen.set()


class Accompaniment:
    """An engine's concurrent work, and what it did each time: ``done``."""

    def __init__(self, load: Load, clock: Callable[[], float] = time.perf_counter) -> None:
        self._load, self._clock = load, clock
        self.done: list[ConcurrentWork] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, the work runs. Raises :class:`OverlapError` on leaving where it ran beside too little of it."""
        started = self._clock()
        self._load.begin()
        outside = self._clock() - started
        try:
            yield
        except BaseException:
            self._load.abandon()
            raise
        ended = self._clock()
        work = self._load.end()
        work = msgspec.structs.replace(work, outside_seconds=outside + self._clock() - ended)
        require_overlap(work)
        self.done.append(work)


def load_on(device: str) -> ThreadedLoad:
    """The work for a device of this process, by torch's name for it: ``cpu``, ``cuda:0``."""
    if device == "cpu":
        from fpforensics.common.engines.concurrent_threads import ThreadProducts, worker_count

        return ThreadedLoad([ThreadProducts(seed) for seed in range(worker_count())])
    from fpforensics.common.engines.concurrent_cuda import StreamProducts

    return ThreadedLoad([StreamProducts(device)])
