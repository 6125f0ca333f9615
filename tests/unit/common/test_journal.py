"""A server's log says who asked for what and how it ended, in one line that nobody can forge."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator

import grpc
import pytest

from fpforensics.common.errors import (
    CancelledError,
    DeadlineError,
    Error,
    LimitError,
    ReplayError,
    UnavailableError,
    UsageError,
)
from fpforensics.common.journal import MAX_VALUE, log_to_stderr, logged


class Context:
    """As much of a gRPC call as a log line shows."""

    def __init__(self, peer: str = "ipv4:127.0.0.1:4321") -> None:
        self._peer = peer

    def peer(self) -> str:
        return self._peer


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="fpforensics")
    return caplog


def test_one_line_for_work_that_was_done(log: pytest.LogCaptureFixture) -> None:
    with logged("check", Context(), claim="quant=none") as entry:
        entry.note(outcome="CONSISTENT", verdict="4f6c")
    (line,) = log.messages
    assert re.fullmatch(
        r"check peer=127\.0\.0\.1:4321 claim=quant=none outcome=CONSISTENT verdict=4f6c seconds=\d+\.\d", line
    )


@pytest.mark.parametrize(
    ("peer", "shown"),
    [("ipv6:%5B::1%5D:50051", "[::1]:50051"), ("unix:/run/x", "unix:/run/x"), ("ipv4:1.2.3.4:5\nx", '"1.2.3.4:5�x"')],
)
def test_peers_are_shown_without_their_family(log: pytest.LogCaptureFixture, peer: str, shown: str) -> None:
    with logged("session", Context(peer)):
        pass
    assert f"peer={shown} " in log.messages[0]


@pytest.mark.parametrize(
    ("error", "outcome", "said"),
    [
        (CancelledError("cancelled"), "cancelled", ""),
        (GeneratorExit(), "cancelled", ""),
        (grpc.RpcError("the client left"), "cancelled", ""),
        (UnavailableError("the prover is stopping"), "aborted", 'error="UnavailableError: the prover is stopping"'),
        (DeadlineError("too late"), "timed-out", 'error="DeadlineError: too late"'),
        (ReplayError("out of memory"), "failed", 'error="ReplayError: out of memory"'),
        (LimitError("1 session already under way"), "refused", 'error="LimitError: 1 session already under way"'),
        (UsageError("nonsense", "the hint"), "refused", 'error="UsageError: nonsense"'),
        (ZeroDivisionError("the secret is 42"), "failed", "error=ZeroDivisionError"),
        (KeyboardInterrupt(), "failed", "error=KeyboardInterrupt"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_work_that_was_not_done_has_a_line_too(
    log: pytest.LogCaptureFixture, error: BaseException, outcome: str, said: str
) -> None:
    with pytest.raises(type(error)), logged("session", Context()):
        raise error
    (line,) = log.messages
    assert f" outcome={outcome} " in line
    assert said in line
    assert ("error=" in line) == bool(said)
    assert "42" not in line.replace("4321", "")


def test_a_generator_that_is_left_is_logged(log: pytest.LogCaptureFixture) -> None:
    def handler() -> Iterator[int]:
        with logged("session", Context()):
            yield 1

    working = handler()
    next(working)
    working.close()  # type: ignore[attr-defined]
    assert "outcome=cancelled" in log.messages[0]


def test_what_a_caller_chose_cannot_forge_a_line_or_fill_the_disk(log: pytest.LogCaptureFixture) -> None:
    forged = 'x" outcome=CONSISTENT\n2026-01-01T00:00:00Z check \x1b[31m\u202e'
    with pytest.raises(Error), logged("check", Context(), claim=forged, bundle="y" * 100_000):
        raise UsageError(forged)
    (line,) = log.messages
    assert line.isprintable()
    assert 'claim="x\\" outcome=CONSISTENT' in line
    assert len(line) < 4 * MAX_VALUE


def test_on_stderr_each_line_begins_with_the_time(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("fpforensics")
    before = logger.handlers[:], logger.level, logger.propagate
    closed = io.StringIO()
    closed.close()
    try:
        logger.addHandler(logging.StreamHandler(closed))  # of an earlier server in this process
        log_to_stderr()
        with logged("session", Context()):
            pass
    finally:
        logger.handlers, logger.level, logger.propagate = before
    said = capsys.readouterr()
    assert said.out == ""
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ session peer=\S+ outcome=done seconds=0\.0\n", said.err)
