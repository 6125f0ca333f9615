"""A prover's or operator's connection to a verifier: ask for a challenge, submit a bundle, get it checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from fpforensics.common.access import UNARY_SECONDS, Access, Connection
from fpforensics.common.errors import EvidenceError, UnavailableError, UsageError
from fpforensics.common.rpc import chunk_file, file_sha256, translated
from fpforensics.proto import audit_pb2 as pb
from fpforensics.proto import audit_pb2_grpc
from fpforensics.verifier.check import CheckPlan

UPLOAD_SECONDS = 3600.0
LEAST_NONCE_BYTES = 16
_MODES = {"decode": pb.REPLAY_MODE_DECODE, "prefill": pb.REPLAY_MODE_PREFILL}
Report = Callable[[str, int, int], None]


def _silent(_stage: str, _done: int, _total: int) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class Submission:
    """A bundle that a verifier took: its digest, who signed it, and whether it answered a fresh challenge."""

    bundle_digest: str
    signer: str
    challenged: bool


class VerifierClient:
    """A connection to one verifier. Failures raise :mod:`fpforensics.common.errors`."""

    def __init__(self, target: str, access: Access | None = None) -> None:
        self._connection = Connection(target, access)
        stub: Any = audit_pb2_grpc.VerifierStub
        self._stub = stub(self._connection.channel)

    def request_nonce(self) -> str:
        """A fresh challenge (hex) for the next session."""
        with translated():
            answer = self._stub.RequestNonce(
                pb.NonceRequest(), timeout=UNARY_SECONDS, metadata=self._connection.metadata
            )
        nonce = bytes(answer.nonce)
        if len(nonce) < LEAST_NONCE_BYTES:
            raise EvidenceError(
                f"a challenge of {len(nonce)} bytes", f"at least {LEAST_NONCE_BYTES}: is this a verifier?"
            )
        return nonce.hex()

    def submit_bundle(self, path: Path, report: Report = _silent, timeout: float = UPLOAD_SECONDS) -> Submission:
        """Send a bundle file. ``report`` gets bytes sent and in all. Raises what the verifier found."""
        try:
            size, sha256 = path.stat().st_size, file_sha256(path)
        except OSError as error:
            raise UsageError(f"cannot read bundle {path}: {error.strerror}", "give a bundle file") from None

        def parts() -> Iterator[pb.SubmitRequest]:
            yield pb.SubmitRequest(header=pb.SubmitHeader(size=size, sha256=sha256))
            sent = 0
            for chunk in chunk_file(path):
                yield pb.SubmitRequest(chunk=chunk)
                sent += len(chunk.data)
                report("submitting", sent, size)

        with translated():
            reply = self._stub.SubmitBundle(parts(), timeout=timeout, metadata=self._connection.metadata)
        return Submission(str(reply.bundle_digest), str(reply.signer), bool(reply.challenged))

    def check(
        self, bundle_digest: str, plan: CheckPlan, report: Report = _silent, timeout: float | None = None
    ) -> bytes:
        """Have a submitted bundle checked. Returns the verdict's envelope (DSSE, JSON), not verified yet: see
        :func:`fpforensics.verifier.verdict.open_verdict`. Leaving early (an exception, Ctrl-C) cancels the check.
        """
        if plan.using:
            raise UsageError(
                f"using {plan.using!r} in a remote check", "the verifier's operator chooses how replays run"
            )
        if plan.profile is not None:
            raise UsageError(
                f"profile {plan.profile.content.name} in a remote check",
                "the verifier's operator chooses what it decides by",
            )
        request = pb.CheckRequest(
            bundle_digest=bundle_digest,
            claim=plan.claim,
            lineup=plan.lineup,
            mode=_MODES[plan.mode],
            row=plan.row,
        )
        call = self._stub.Check(request, timeout=timeout, metadata=self._connection.metadata)
        try:
            with translated():
                for event in call:
                    kind = event.WhichOneof("event")
                    if kind == "verdict":
                        return bytes(event.verdict.envelope)
                    if kind != "progress":
                        raise EvidenceError("the verifier does not keep to the protocol", "is it the same version?")
                    report(event.progress.stage, event.progress.done, event.progress.total)
        finally:
            call.cancel()
        raise UnavailableError("the verifier ended the check without a verdict", "check again")

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
