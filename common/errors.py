"""The errors a person may see: each names the thing, its value and the way out, and carries the exit code.

A statistical outcome is never an error; it is a value (see ``fpforensics.verifier.decision``).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class Error(Exception):
    """Base of everything this project raises on purpose.

    ``message`` says what is wrong with which thing; ``hint`` says what to do about it.
    """

    exit_code = 2

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def diagnostics(self) -> str:
        """The line a person reads: what is wrong and, in parentheses, the way out."""
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UsageError(Error):
    """The caller asked for something that does not exist or does not fit together."""


class NotFoundError(UsageError):
    """A bundle or verdict that this store does not hold."""


class LimitError(Error):
    """More than a service takes: bytes, disk space or work at once."""

    exit_code = 5


class MissingDependencyError(Error):
    """An optional package is not installed; the hint is the exact install command."""

    exit_code = 5

    def __init__(self, what: str, needs: str, install: str) -> None:
        super().__init__(f"{what} needs {needs}, which is not installed here", f"run: {install}")


class EvidenceError(Error):
    """Evidence that is forged, damaged, malformed or not from a trusted key."""

    exit_code = 4


class SignatureError(EvidenceError):
    """No trusted key signed these exact bytes."""


class NonceError(EvidenceError):
    """Evidence that answers another challenge, or one that was answered before."""


class UnknownModelError(EvidenceError):
    """Evidence about a model that this verifier does not hold."""


class ReplayError(Error):
    """The engine could not run what was asked: out of memory, missing kernel, crashed worker."""

    exit_code = 5


class CancelledError(ReplayError):
    """The caller abandoned the work; not a failure of the evidence or of the engine."""


class DeadlineError(ReplayError):
    """The work took longer than the server gives it."""


class NondeterminismError(ReplayError):
    """Repetitions of one config on one machine were not bit-identical."""


class OverlapError(ReplayError):
    """The concurrent work ran beside too little of a generation or replay to say anything about it."""


class UnavailableError(ReplayError):
    """The other side could not be reached, or refused."""


def did_you_mean(value: str, known: Iterable[str]) -> str:
    """A hint that offers the nearest known name, or lists all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(value, names, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"


def shorten(text: str, limit: int = 60) -> str:
    """``text`` made printable and cut to ``limit`` characters, for use inside an error message."""
    clean = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[: limit + 1])
    return clean if len(text) <= limit else f"{clean[:limit]}…"
