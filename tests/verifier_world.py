"""What tests of the verifier's service share: a stand-in for replays, uploads, and what a refusal must leave behind."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from rpc_world import (
    PROVER_KEY,
    VERIFIER_KEY,
    quick_check,
    result_about,
    write_bundle,
)
from service_world import Held, chunks_of, is_serving, open_channel

from fpforensics.common import envelope as dsse
from fpforensics.common.engines.base import Host
from fpforensics.common.errors import Error, UnavailableError
from fpforensics.common.keys import Keyring, PrivateKey
from fpforensics.common.rpc import CHUNK_BYTES
from fpforensics.common.serving import RunningServer
from fpforensics.proto import audit_pb2 as pb
from fpforensics.proto import audit_pb2_grpc
from fpforensics.verifier.check import CheckPlan, CheckResult
from fpforensics.verifier.client import VerifierClient
from fpforensics.verifier.intake import VerifiedBundle
from fpforensics.verifier.service import SERVICE
from fpforensics.verifier.verdict import sign_verdict

TRUSTED = Keyring([PROVER_KEY.public])
VERIFIERS = Keyring([VERIFIER_KEY.public])


class Checker(Held):
    """Stands where replays would run."""

    def __init__(self) -> None:
        super().__init__()
        self.plans: list[CheckPlan] = []

    def __call__(
        self,
        bundle: VerifiedBundle,
        plan: CheckPlan,
        host: Host,
        report: Callable[[str, int, int], None] = lambda *_: None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> CheckResult:
        self.plans.append(plan)
        if self.error:
            raise self.error
        report("holding", 0, 1)
        self.is_cancelled(cancelled)  # and returns a result all the same: nobody may get it
        return quick_check(bundle, plan, host, report)


@contextmanager
def raw(port: int) -> Iterator[Any]:
    with open_channel(port) as channel:
        yield audit_pb2_grpc.VerifierStub(channel)  # type: ignore[no-untyped-call]


def kept(tmp_path: Path) -> list[str]:
    store = tmp_path / "store"
    return sorted(path.name for part in ("bundles", "spool") for path in (store / part).iterdir())


def header(content: bytes, **changes: Any) -> pb.SubmitRequest:
    made = pb.SubmitHeader(size=len(content), sha256=hashlib.sha256(content).digest())
    for name, value in changes.items():
        setattr(made, name, value)
    return pb.SubmitRequest(header=made)


def upload(content: bytes, step: int = CHUNK_BYTES, **changes: Any) -> Iterator[pb.SubmitRequest]:
    yield header(content, **changes)
    pieces = (content[start : start + step] for start in range(0, len(content), step))
    yield from (pb.SubmitRequest(chunk=chunk) for chunk in chunks_of(*pieces))


def assert_refused(
    server: RunningServer, requests: Iterator[pb.SubmitRequest], code: grpc.StatusCode, tmp_path: Path
) -> None:
    before = kept(tmp_path)
    with raw(server.port) as stub, pytest.raises(grpc.RpcError) as caught:
        stub.SubmitBundle(requests, timeout=30)
    assert caught.value.code() == code
    details = caught.value.details()
    assert details
    assert "\n" not in details
    assert "Traceback" not in details
    assert kept(tmp_path) == before
    assert is_serving(server, SERVICE)
    write_bundle(tmp_path / "good", seed=99)
    with VerifierClient(f"127.0.0.1:{server.port}") as client:
        client.submit_bundle(tmp_path / "good")
    assert len(kept(tmp_path)) == len(before) + 1


def eventually(kind: type[Error], message: str, call: Callable[[], object]) -> None:
    """The other calls are sent, but the server may take a moment to begin them."""
    for _ in range(200):
        try:
            call()
        except kind as error:
            assert message in error.message
            return
        threading.Event().wait(0.02)
    raise AssertionError(f"no {kind.__name__}")


class Tampering(audit_pb2_grpc.VerifierServicer):
    """A verifier that shows what it is told to."""

    shown: tuple[pb.Verdict, ...] = ()
    more = False
    stopping_after = 0

    def GetVerdict(self, request: Any, context: Any) -> pb.Verdict:  # noqa: N802
        return self.shown[0]

    def ListVerdicts(self, request: Any, context: Any) -> pb.ListVerdictsReply:  # noqa: N802
        return pb.ListVerdictsReply(verdicts=self.shown, more=self.more)

    def WatchVerdicts(self, request: Any, context: Any) -> Iterator[pb.Verdict]:  # noqa: N802
        if not self.stopping_after:
            yield from self.shown
        else:
            yield from self.shown[request.after : self.stopping_after]
            raise UnavailableError("the verifier is stopping")


def shown(sequence: int = 1, *, key: PrivateKey = VERIFIER_KEY, name: str = "one", **changes: Any) -> pb.Verdict:
    digest = f"sha256:{'5' * 64}"
    envelope = sign_verdict(result_about(digest), key, sequence=sequence, verdict_id=name)
    made = pb.Verdict(
        sequence=sequence,
        verdict_id=name,
        bundle_digest=digest,
        outcome="CONSISTENT",
        envelope=dsse.to_json(envelope),
    )
    for field, value in changes.items():
        setattr(made, field, value)
    return made
