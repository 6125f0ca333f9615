"""An auditor's view of a verifier: its verdicts, each believed only after its signature was checked.

The keyring is given out of band, so a lying server can withhold verdicts and nothing else, and only the newest: a gap
in the signed sequence numbers, an answer about another verdict, or a listing that differs from what was signed is
refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self

from fpforensics.common.access import UNARY_SECONDS, Access, Connection
from fpforensics.common.errors import SignatureError, shorten
from fpforensics.common.keys import Keyring
from fpforensics.common.rpc import translated
from fpforensics.proto import audit_pb2 as pb
from fpforensics.proto import audit_pb2_grpc
from fpforensics.verifier.verdict import VerifiedVerdict, open_verdict

_LIED = "do not rely on this server; tell its operator"


class AuditorClient:
    """A connection to one verifier. ``keyring`` holds the keys whose verdicts count.

    Every method raises :class:`SignatureError` (or another :class:`~fpforensics.common.errors.EvidenceError`) when the
    server shows anything that no trusted key signed.
    """

    def __init__(self, target: str, keyring: Keyring, access: Access | None = None) -> None:
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
        call = self._stub.WatchVerdicts(
            pb.WatchVerdictsRequest(after=after), timeout=timeout, metadata=self._connection.metadata
        )
        try:
            with translated():
                yield from self._in_order(call, after)
        finally:
            call.cancel()

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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
