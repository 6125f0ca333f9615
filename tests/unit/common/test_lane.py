"""A lane runs one job at a time, shows the latest progress, and never outlives its caller's interest."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from fpforensics.common.errors import CancelledError, DeadlineError, LimitError, ReplayError, UnavailableError
from fpforensics.common.lane import Cancelled, Lane, Report


class Context:
    """As much of a gRPC call as a lane sees: it can end, and tells those who asked."""

    def __init__(self) -> None:
        self.callbacks: list[Callable[[], None]] = []
        self.active = True

    def add_callback(self, callback: Callable[[], None]) -> bool:
        if self.active:
            self.callbacks.append(callback)
        return self.active

    def end(self) -> None:
        self.active = False
        for callback in self.callbacks:
            callback()


@pytest.fixture
def lane() -> Iterator[Lane]:
    made = Lane("job", waiting=1)
    yield made
    made.close()


def drain(
    lane: Lane, work: Callable[[Report, Cancelled], int], context: Context | None = None
) -> tuple[list[str], int]:
    stages: list[str] = []

    def collect() -> Iterator[str]:
        result = yield from lane.run(context or Context(), work, lambda progress: progress.stage)
        results.append(result)

    results: list[int] = []
    stages.extend(collect())
    return stages, results[0]


def test_progress_and_then_the_result(lane: Lane) -> None:
    def work(report: Report, cancelled: Cancelled) -> int:
        report("only", 1, 1)
        assert not cancelled()
        return 7

    assert drain(lane, work) == (["only"], 7)


def test_a_slow_reader_sees_the_newest_progress_and_slows_nothing(lane: Lane) -> None:
    worked = threading.Event()

    def work(report: Report, cancelled: Cancelled) -> int:
        for number in range(1000):
            report(str(number), number, 1000)
        worked.set()
        return 1

    reading = lane.run(Context(), work, lambda progress: progress.done)
    first = next(reading)
    assert worked.wait(60)
    assert [first, *reading][-1] == 999


def test_an_error_of_the_work_is_raised_to_the_caller(lane: Lane) -> None:
    def work(report: Report, cancelled: Cancelled) -> int:
        raise ReplayError("out of memory", "smaller batch")

    with pytest.raises(ReplayError):
        drain(lane, work)
    assert drain(lane, lambda _report, _cancelled: 3) == ([], 3)


def test_jobs_run_one_at_a_time_and_only_so_many_wait(lane: Lane) -> None:
    go, running, most = threading.Event(), [0], [0]
    lock = threading.Lock()

    def work(report: Report, cancelled: Cancelled) -> int:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        report("begun", 0, 1)
        assert go.wait(60)
        with lock:
            running[0] -= 1
        return 1

    first = lane.run(Context(), work, lambda progress: progress.stage)
    assert next(first) == "begun"
    second = lane.run(Context(), work, lambda progress: progress.stage)
    assert next(second) == "waiting for 1 earlier job"
    with pytest.raises(LimitError, match="2 job"):
        next(lane.run(Context(), work, lambda progress: progress.stage))
    go.set()
    assert list(first) == []
    assert list(second) in ([], ["begun"])
    assert most == [1]
    assert drain(lane, lambda _report, _cancelled: 5) == ([], 5)


def test_a_caller_who_leaves_ends_the_work_before_the_generator_ends(lane: Lane) -> None:
    ended = threading.Event()

    def work(report: Report, cancelled: Cancelled) -> int:
        report("begun", 0, 1)
        while not cancelled():
            threading.Event().wait(0.01)
        ended.set()
        return 1

    closed = lane.run(Context(), work, lambda progress: progress.stage)
    next(closed)
    closed.close()
    assert ended.is_set()

    ended.clear()
    context = Context()
    cancelled = lane.run(context, work, lambda progress: progress.stage)
    next(cancelled)
    context.end()
    with pytest.raises(CancelledError):
        next(cancelled)
    assert ended.is_set()


def test_a_call_that_is_over_already_starts_no_wait(lane: Lane) -> None:
    context = Context()
    context.end()
    with pytest.raises(CancelledError):
        drain(lane, lambda _report, _cancelled: 1, context)


def test_one_who_leaves_while_waiting_never_runs(lane: Lane) -> None:
    go, ran = threading.Event(), threading.Event()

    def first_work(report: Report, cancelled: Cancelled) -> int:
        report("begun", 0, 1)
        assert go.wait(60)
        return 1

    def second_work(report: Report, cancelled: Cancelled) -> int:
        ran.set()
        return 2

    first = lane.run(Context(), first_work, lambda progress: progress.stage)
    next(first)
    context = Context()
    second = lane.run(context, second_work, lambda progress: progress.stage)
    next(second)
    with ThreadPoolExecutor(1) as pool:
        leaving = pool.submit(next, second)
        context.end()
        with pytest.raises(CancelledError):
            leaving.result(timeout=60)  # at once, not after the first one's end
    go.set()
    assert list(first) == []
    assert drain(lane, lambda _report, _cancelled: 3) == ([], 3)
    assert not ran.is_set()


def until_stopped(report: Report, cancelled: Cancelled) -> int:
    report("begun", 1, 3)
    while not cancelled():
        threading.Event().wait(0.01)
    raise ReplayError("the worker was killed")  # nobody is to hear this


def test_silent_work_says_its_last_progress_again() -> None:
    go = threading.Event()

    def work(report: Report, cancelled: Cancelled) -> int:
        assert go.wait(60)
        report("begun", 1, 3)
        while not cancelled():
            threading.Event().wait(0.01)
        return 1

    lane = Lane("job", heartbeat=0.01)
    context = Context()
    reading = lane.run(context, work, lambda progress: (progress.stage, progress.done, progress.total))
    assert [next(reading) for _ in range(3)] == [("job under way", 0, 0)] * 3
    go.set()
    while next(reading) != ("begun", 1, 3):
        pass
    assert [next(reading) for _ in range(3)] == [("begun", 1, 3)] * 3
    reading.close()
    lane.close()


def test_work_that_takes_too_long_is_stopped_and_the_next_gets_its_own_time() -> None:
    lane = Lane("job", waiting=1, seconds=0.2)
    reading = lane.run(Context(), until_stopped, lambda progress: progress.stage)
    assert next(reading) == "begun"
    waiting = lane.run(Context(), lambda _report, _cancelled: 5, lambda progress: progress.stage)
    assert next(waiting) == "waiting for 1 earlier job"
    with pytest.raises(DeadlineError, match=r"job stopped: it took more than the 0\.2 seconds") as caught:
        list(reading)
    assert "--max-seconds" in caught.value.hint
    assert list(waiting) == []  # its time began with its turn
    assert drain(lane, lambda _report, _cancelled: 3) == ([], 3)
    lane.close()


def test_stopping_ends_what_runs_what_waits_and_what_comes_later(lane: Lane) -> None:
    running = lane.run(Context(), until_stopped, lambda progress: progress.stage)
    assert next(running) == "begun"
    waiting = lane.run(Context(), lambda _report, _cancelled: 5, lambda progress: progress.stage)
    assert next(waiting) == "waiting for 1 earlier job"
    lane.stop(UnavailableError("the server is stopping"))
    later = lane.run(Context(), lambda _report, _cancelled: 5, lambda progress: progress.stage)
    for each in (running, waiting, later):
        with pytest.raises(UnavailableError, match="the server is stopping"):
            list(each)


def test_what_waits_when_the_lane_stops_never_begins(lane: Lane) -> None:
    running = lane.run(Context(), until_stopped, lambda progress: progress.stage)
    assert next(running) == "begun"
    begun = threading.Event()
    waiting = lane.run(Context(), lambda _report, _cancelled: begun.set(), lambda progress: progress.stage)
    assert next(waiting) == "waiting for 1 earlier job"
    lane.stop(UnavailableError("the server is stopping"))
    with pytest.raises(UnavailableError):
        list(running)
    lane._pool.shutdown(wait=True)  # so its turn has come, while its caller does not even read
    assert not begun.is_set()
    with pytest.raises(UnavailableError, match="the server is stopping"):
        list(waiting)
