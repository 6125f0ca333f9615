"""Drive a remote prover: ask who it is, run a session, fetch the bundle.

What arrives is checked for damage on the way, and for nothing else: the verifier's intake decides whether to believe
it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self, cast

from fpforensics.common.access import UNARY_SECONDS, Access, Connection
from fpforensics.common.environment import Environment
from fpforensics.common.errors import EvidenceError, SignatureError, UsageError, shorten
from fpforensics.common.keys import Keyring
from fpforensics.common.rpc import MAX_BUNDLE_BYTES, receive_chunks, translated
from fpforensics.proto import evidence_pb2 as pb
from fpforensics.proto import evidence_pb2_grpc
from fpforensics.prover.session import SessionPlan
from fpforensics.prover.wire import request_of

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ProverDescription:
    """What a prover says about itself; nothing of it is proven."""

    public_key_pem: str
    keyid: str
    tool_version: str
    models: tuple[str, ...]
    environment: Environment


def require_known_signer(said: ProverDescription, keyring: Keyring, prover: str) -> None:
    """Raise :class:`SignatureError` if a prover says that it signs with a key that is not in ``keyring``.

    Saves a session that could only be refused. It proves nothing: the bundle's signature must still be verified.
    """
    if keyring.get(said.keyid) is None:
        trusted = ", ".join(f"{key.keyid[:16]}…" for key in keyring.all()[:3]) or "none"
        raise SignatureError(
            f"the prover at {shorten(prover)} signs with key {shorten(said.keyid, 16)}, which is not trusted here "
            f"(trusted: {trusted})",
            "give the public key of this prover, or the address of the prover that you trust",
        )


class ProverClient:
    """A connection to one prover. Failures raise :mod:`fpforensics.common.errors`."""

    def __init__(self, target: str, access: Access | None = None) -> None:
        self._connection = Connection(target, access)
        stub: Any = evidence_pb2_grpc.ProverStub
        self._stub = stub(self._connection.channel)

    def describe(self) -> ProverDescription:
        """Who the prover says it is."""
        with translated():
            said: pb.Description = self._stub.Describe(
                pb.DescribeRequest(), timeout=UNARY_SECONDS, metadata=self._connection.metadata
            )
        env = said.environment
        return ProverDescription(
            public_key_pem=said.public_key_pem,
            keyid=said.keyid,
            tool_version=said.tool_version,
            models=tuple(said.models),
            environment=Environment(
                hostname=env.hostname,
                platform=env.platform,
                python=env.python,
                cpu=env.cpu,
                cpu_count=env.cpu_count,
                cpu_flags=tuple(env.cpu_flags),
                gpus=tuple(env.gpus),
                driver=env.driver,
                packages=dict(env.packages),
                variables=dict(env.variables),
            ),
        )

    def run_session(
        self,
        plan: SessionPlan,
        output: Path,
        *,
        report: Report = lambda _stage, _done, _total: None,
        timeout: float | None = None,
        max_bytes: int = MAX_BUNDLE_BYTES,
    ) -> str:
        """Run ``plan`` there and write the bundle to ``output``, whole or not at all. Returns the digest that the
        prover states. Leaving early (an exception, Ctrl-C) cancels the session.

        Raises the prover's own error, :class:`EvidenceError` for a damaged or truncated bundle,
        :class:`~fpforensics.common.errors.LimitError` for one larger than ``max_bytes``.
        """
        call = self._stub.RunSession(request_of(plan), timeout=timeout, metadata=self._connection.metadata)
        try:
            with _written_whole(output) as file, translated():
                return _receive(call, file, report, max_bytes)
        finally:
            call.cancel()

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _receive(events: Iterable[pb.SessionEvent], file: BinaryIO, report: Report, max_bytes: int) -> str:
    end: pb.BundleEnd | None = None

    def chunks() -> Iterator[pb.Chunk]:
        nonlocal end
        for event in events:
            kind = event.WhichOneof("event")
            if end is not None or kind is None:
                raise EvidenceError("the prover does not keep to the protocol", "is it the same version?")
            if kind == "progress":
                report(event.progress.stage, event.progress.done, event.progress.total)
            elif kind == "end":
                end = event.end
            else:
                yield event.chunk

    received = receive_chunks(chunks(), file, limit=max_bytes)
    if end is None:
        raise EvidenceError(f"the prover stopped after {received.size} bytes of its bundle", "run the session again")
    received.require(end.size, end.sha256)
    return str(end.bundle_digest)


@contextmanager
def _written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the name ``path`` only when its block succeeds."""
    try:
        with tempfile.NamedTemporaryFile(prefix=f".{path.name}.", dir=path.parent, delete=False) as file:
            part = Path(file.name)
            try:
                yield cast(BinaryIO, file)
                file.close()
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}", "choose another folder, or free space") from error
