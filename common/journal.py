"""A server's log: one line for each piece of work, saying who asked for what, how it ended and how long it took.

A line holds names, claims, sizes and digests; never a prompt, a token or a key. What a remote party chose is made printable
and cut.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import unquote

import grpc

from fpforensics.common.errors import CancelledError, DeadlineError, Error, ReplayError, UnavailableError, shorten

MAX_VALUE = 200
_logger = logging.getLogger(__name__)
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.:;,/+-_#[]…=")
_OUTCOMES: tuple[tuple[type[BaseException], str], ...] = (
    (GeneratorExit, "cancelled"),  # the caller left, and gRPC closed the handler
    (CancelledError, "cancelled"),
    (grpc.RpcError, "cancelled"),  # the caller left in the middle of its upload
    (DeadlineError, "timed-out"),
    (UnavailableError, "aborted"),
    (ReplayError, "failed"),
    (Error, "refused"),
    (BaseException, "failed"),
)


class Entry:
    """A line in the making."""

    def __init__(self, kind: str, facts: dict[str, object]) -> None:
        self._kind = kind
        self._facts = facts

    def note(self, **facts: object) -> None:
        """Add facts; one of a name that is there already replaces it."""
        self._facts.update(facts)

    def __str__(self) -> str:
        return " ".join([self._kind, *(f"{name}={_shown(str(value))}" for name, value in self._facts.items())])


@contextmanager
def logged(kind: str, context: grpc.ServicerContext, **facts: object) -> Iterator[Entry]:
    """Log one line when this block ends, however it ends. ``outcome`` is ``done`` unless the block notes another or raises."""
    entry = Entry(kind, {"peer": _peer(context), **facts, "outcome": "done"})
    started = time.monotonic()
    try:
        yield entry
    except BaseException as error:
        entry.note(outcome=next(name for kind_of, name in _OUTCOMES if isinstance(error, kind_of)))
        if isinstance(error, Error) and not isinstance(error, CancelledError):
            entry.note(error=f"{type(error).__name__}: {error.message}")
        elif not isinstance(error, CancelledError | GeneratorExit | grpc.RpcError):
            entry.note(error=type(error).__name__)  # its words may say anything; the traceback has its own place
        raise
    finally:
        entry.note(seconds=f"{time.monotonic() - started:.1f}")
        _logger.info("%s", entry)


def log_to_stderr() -> None:
    """Send this project's log to stderr and nowhere else, each line after the time in UTC. For a server's command line."""
    handler = logging.StreamHandler(sys.stderr)
    formatter = logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%dT%H:%M:%SZ")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    logger = logging.getLogger("fpforensics")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _peer(context: grpc.ServicerContext) -> str:
    """``address:port`` as gRPC names it, without the family: ``[::1]:50051`` for ``ipv6:%5B::1%5D:50051``."""
    family, _, address = unquote(str(context.peer())).partition(":")
    return address if family in ("ipv4", "ipv6") else f"{family}:{address}"


def _shown(value: str) -> str:
    clean = shorten(value, MAX_VALUE)
    return clean if clean and _PLAIN.issuperset(clean) else json.dumps(clean, ensure_ascii=False)
