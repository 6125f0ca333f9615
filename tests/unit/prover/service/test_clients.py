"""A verifier's side: it asks who the prover is, and believes no bundle that was damaged."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from prover_world import PLAN, Runner
from rpc_world import PROVER_KEY, STRANGER_KEY

from fpforensics.common.access import Listen
from fpforensics.common.errors import (
    EvidenceError,
    LimitError,
    SignatureError,
)
from fpforensics.common.serving import RunningServer, start_server
from fpforensics.proto import evidence_pb2 as pb
from fpforensics.proto import evidence_pb2_grpc
from fpforensics.prover.client import ProverClient
from fpforensics.prover.service import SERVICE
from fpforensics.verifier.cli.session import session


def test_a_verifiers_session_asks_who_it_is_before_the_work(
    server: RunningServer, runner: Runner, tmp_path: Path
) -> None:
    trusted, stranger = tmp_path / "prover.pub", tmp_path / "stranger.pub"
    trusted.write_bytes(PROVER_KEY.public.pem())
    stranger.write_bytes(STRANGER_KEY.public.pem())

    def ask(key: Path) -> BaseException | None:
        output = str(tmp_path / "bundle")
        arguments = [
            "--prover",
            f"127.0.0.1:{server.port}",
            "--key",
            str(key),
            "--output",
            output,
            "--claim",
            "quant=none",
        ]
        return CliRunner().invoke(session, arguments).exception

    error = ask(stranger)
    assert isinstance(error, SignatureError)
    assert "which is not trusted here" in error.message
    assert STRANGER_KEY.keyid[:16] in error.message
    assert runner.plans == []
    # The control: this key is trusted, so the work is done, and its stand-in is no answer to what was asked.
    assert isinstance(ask(trusted), EvidenceError)
    assert len(runner.plans) == 1


class Lying(evidence_pb2_grpc.ProverServicer):
    """Sends the events it is given."""

    events: tuple[pb.SessionEvent, ...] = ()

    def RunSession(self, request: Any, context: Any) -> Iterator[pb.SessionEvent]:  # noqa: N802
        yield from self.events


def chunk(data: bytes, covered: bytes | None = None) -> pb.SessionEvent:
    digest = hashlib.sha256(data if covered is None else covered).digest()
    return pb.SessionEvent(chunk=pb.Chunk(data=data, running_sha256=digest))


def end(size: int, data: bytes) -> pb.SessionEvent:
    sha256 = hashlib.sha256(data).digest()
    return pb.SessionEvent(end=pb.BundleEnd(size=size, sha256=sha256, bundle_digest="sha256:1"))


LIES: dict[str, tuple[tuple[pb.SessionEvent, ...], type[Exception]]] = {
    "nothing": ((), EvidenceError),
    "no end": ((chunk(b"ab"),), EvidenceError),
    "damaged": ((chunk(b"ab", b"aX"), end(2, b"ab")), EvidenceError),
    "truncated": ((chunk(b"ab"), end(3, b"abc")), EvidenceError),
    "wrong digest": ((chunk(b"ab"), end(2, b"aX")), EvidenceError),
    "more after the end": ((chunk(b"ab"), end(2, b"ab"), chunk(b"c", b"abc")), EvidenceError),
    "an empty event": ((pb.SessionEvent(),), EvidenceError),
    "too much": ((chunk(b"x" * 1001), end(1001, b"x" * 1001)), LimitError),
}


@pytest.mark.parametrize(("events", "error"), LIES.values(), ids=LIES)
def test_a_lying_prover_writes_nothing(
    tmp_path: Path, events: tuple[pb.SessionEvent, ...], error: type[Exception]
) -> None:
    servicer = Lying()
    add: Any = evidence_pb2_grpc.add_ProverServicer_to_server
    with (
        start_server(Listen(), lambda it: add(servicer, it), SERVICE) as server,
        ProverClient(f"127.0.0.1:{server.port}") as client,
    ):
        servicer.events = (chunk(b"ab"), end(2, b"ab"))
        assert client.run_session(PLAN, tmp_path / "control", max_bytes=1000) == "sha256:1"
        servicer.events = events
        with pytest.raises(error):
            client.run_session(PLAN, tmp_path / "lie", max_bytes=1000)
    assert [path.name for path in tmp_path.iterdir()] == ["control"]
