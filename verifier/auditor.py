"""An auditor's view of a verifier: its verdicts, each believed only after its signature was checked.

The keyring is given out of band, so a lying server can withhold verdicts and nothing else, and only the newest: a gap
in the signed sequence numbers, an answer about another verdict, or a listing that differs from what was signed is
refused.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from typing import Any, Self

import grpc

from fpforensics.common.access import UNARY_SECONDS, Access, Connection
from fpforensics.common.errors import Error, NotFoundError, SignatureError, UnavailableError, UsageError, shorten
from fpforensics.common.keys import Keyring
from fpforensics.common.rpc import error_of, translated
from fpforensics.proto import audit_pb2 as pb
from fpforensics.proto import audit_pb2_grpc
from fpforensics.verifier.verdict import VerifiedVerdict, open_verdict

MIN_PREFIX, ID_DIGITS = 6, 32
RETRY_SECONDS = (1.0, 30.0)
"""How long to wait before a lost connection is made again: at first, doubled each time, and at most."""

_LIED = "do not rely on this server; tell its operator"
_RETRIED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.RESOURCE_EXHAUSTED)


def _say_nothing(_error: Error, _after: int, _seconds: float) -> None:
    """Nobody is told."""


class AuditorClient:
    """A connection to one verifier. ``keyring`` holds the keys whose verdicts count.

    Every method raises :class:`SignatureError` (or another :class:`~fpforensics.common.errors.EvidenceError`) when the
    server shows anything that no trusted key signed.
    """

    def __init__(self, target: str, keyring: Keyring, access: Access | None = None) -> None:
        self.target = target
        self._connection = Connection(target, access)
        self._keyring = keyring
        stub: Any = audit_pb2_grpc.VerifierStub
        self._stub = stub(self._connection.channel)

    def get(self, verdict_id: str) -> VerifiedVerdict:
        """One verdict."""
        with translated():
            message = self._stub.GetVerdict(
                pb.GetVerdictRequest(verdict_id=verdict_id),
                timeout=UNARY_SECONDS,
                metadata=self._connection.metadata,
            )
        verdict = self._believe(message)
        if verdict.predicate.verdict_id != verdict_id:
            raise SignatureError(
                f"the server answered with verdict {shorten(verdict.predicate.verdict_id, 40)} "
                f"when asked for {shorten(verdict_id, 40)}",
                _LIED,
            )
        return verdict

    def find(self, name: str) -> VerifiedVerdict:
        """The verdict whose id is ``name`` or, for at least :data:`MIN_PREFIX` of its hex digits, begins with them.

        Raises :class:`NotFoundError` for none, :class:`UsageError` for a beginning that is too short or that several have.
        """
        start = name.rstrip("….").lower()
        if not re.fullmatch(rf"[0-9a-f]{{1,{ID_DIGITS - 1}}}", start):
            return self.get(name)
        if len(start) < MIN_PREFIX:
            raise UsageError(f"verdict id {shorten(name)!r} is too short", f"give at least {MIN_PREFIX} of its digits")
        found = [verdict for verdict in self.list() if verdict.predicate.verdict_id.startswith(start)]
        if not found:
            raise NotFoundError(f"no verdict whose id begins with {start!r} here", "list them")
        if len(found) > 1:
            names = ", ".join(shorten(verdict.predicate.verdict_id, ID_DIGITS) for verdict in found[:3])
            raise UsageError(
                f"{len(found)} verdicts have ids that begin with {start!r}",
                f"give more digits: {names}{', …' if len(found) > 3 else ''}",
            )
        return found[0]

    def list(self, after: int = 0) -> Iterator[VerifiedVerdict]:
        """Every verdict after a sequence number, in order."""
        more = True
        while more:
            with translated():
                page = self._stub.ListVerdicts(
                    pb.ListVerdictsRequest(after=after),
                    timeout=UNARY_SECONDS,
                    metadata=self._connection.metadata,
                )
            if page.more and not page.verdicts:
                raise SignatureError(f"the server withholds the verdicts after number {after}", _LIED)
            for verdict in self._in_order(page.verdicts, after):
                after = verdict.predicate.sequence
                yield verdict
            more = page.more

    def watch(self, after: int = 0, timeout: float | None = None) -> Iterator[VerifiedVerdict]:
        """Like :meth:`list`, and then those to come, until the iterator is closed or the server stops
        (:class:`~fpforensics.common.errors.UnavailableError`).
        """
        with translated():
            for verdict in self._watch(after, timeout):
                if verdict is not None:
                    yield verdict

    def follow(
        self,
        after: int = 0,
        *,
        lost: Callable[[Error, int, float], None] = _say_nothing,
        pause: Callable[[float], object] = time.sleep,
    ) -> Iterator[VerifiedVerdict]:
        """Like :meth:`watch`, but once the server has answered, a lost connection is made again as soon as the server is
        back, however long that takes, and no verdict is lost or repeated. Before that ``lost`` is called with what happened,
        the last sequence number and the seconds until the first attempt.
        """
        first, most = RETRY_SECONDS
        answered, seconds = False, first
        while True:
            try:
                for verdict in self._watch(after, None, wait=answered):
                    answered, seconds = True, first
                    if verdict is not None:
                        after = verdict.predicate.sequence
                        yield verdict
                error: Error = UnavailableError("the server ended the stream")
            except grpc.RpcError as failure:
                error = error_of(failure)
                if not answered or failure.code() not in _RETRIED:
                    raise error from None
            lost(error, after, seconds)
            pause(seconds)
            seconds = min(2 * seconds, most)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _watch(self, after: int, timeout: float | None, *, wait: bool = False) -> Iterator[VerifiedVerdict | None]:
        """Verdicts as they come; None each time the server says no more than that it is there. ``wait`` for one that is
        away: gRPC dials again and again, at most every 30 seconds.
        """
        call = self._stub.WatchVerdicts(
            pb.WatchVerdictsRequest(after=after),
            timeout=timeout,
            metadata=self._connection.metadata,
            wait_for_ready=wait,
        )
        try:
            for message in call:
                if message == pb.Verdict():
                    yield None
                    continue
                for verdict in self._in_order([message], after):
                    after = verdict.predicate.sequence
                    yield verdict
        finally:
            call.cancel()

    def _in_order(self, messages: Any, after: int) -> Iterator[VerifiedVerdict]:
        for message in messages:
            verdict = self._believe(message)
            if verdict.predicate.sequence != after + 1:
                raise SignatureError(
                    f"the server shows verdict number {verdict.predicate.sequence} after number {after}",
                    _LIED,
                )
            after += 1
            yield verdict

    def _believe(self, message: pb.Verdict) -> VerifiedVerdict:
        verdict = open_verdict(message.envelope, self._keyring)
        signed = verdict.predicate
        for name, shown, stated in (
            ("sequence", message.sequence, signed.sequence),
            ("verdict id", message.verdict_id, signed.verdict_id),
            ("bundle digest", message.bundle_digest, signed.result.bundle_digest),
            ("outcome", message.outcome, signed.result.verdict),
        ):
            if shown != stated:
                raise SignatureError(
                    f"the server shows {name} {shorten(str(shown), 80)!r}, the signature covers {str(stated)!r}",
                    _LIED,
                )
        return verdict
