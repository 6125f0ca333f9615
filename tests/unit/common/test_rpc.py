"""Chunks arrive whole or not at all; errors cross the wire as themselves; what nobody expected says nothing."""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from service_world import chunks_of, open_channel

from fpforensics.common import errors
from fpforensics.common.access import Listen
from fpforensics.common.errors import Error, EvidenceError, LimitError, MissingDependencyError, UnavailableError
from fpforensics.common.rpc import (
    CHUNK_BYTES,
    STATUS,
    Received,
    chunk_file,
    error_of,
    receive_chunks,
    status_of,
    translated,
)
from fpforensics.common.serving import RunningServer, start_server
from fpforensics.proto import evidence_pb2 as pb
from fpforensics.proto import evidence_pb2_grpc

SERVICE = pb.DESCRIPTOR.services_by_name["Prover"].full_name
ERRORS = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Error)]


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES + 7])
def test_a_file_arrives_as_it_was(tmp_path: Path, size: int) -> None:
    content = bytes(index % 251 for index in range(size))
    path = tmp_path / "file"
    path.write_bytes(content)
    sink = io.BytesIO()
    chunks = list(chunk_file(path))
    assert all(len(chunk.data) <= CHUNK_BYTES for chunk in chunks)
    received = receive_chunks(chunks, sink, limit=size)
    assert sink.getvalue() == content
    received.require(size, hashlib.sha256(content).digest())


@settings(max_examples=60, deadline=None)
@given(pieces=st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=6), data=st.data())
def test_damage_and_reordering_never_arrive(pieces: list[bytes], data: st.DataObject) -> None:
    chunks = list(chunks_of(*pieces))
    sink = io.BytesIO()
    receive_chunks(chunks, sink, limit=1000)
    assert sink.getvalue() == b"".join(pieces)

    damaged = data.draw(st.integers(0, len(chunks) - 1))
    changed = bytearray(chunks[damaged].data)
    changed[data.draw(st.integers(0, len(changed) - 1))] ^= data.draw(st.integers(1, 255))
    chunks[damaged] = pb.Chunk(data=bytes(changed), running_sha256=chunks[damaged].running_sha256)
    sink = io.BytesIO()
    with pytest.raises(EvidenceError, match=f"chunk {damaged} does not match"):
        receive_chunks(chunks, sink, limit=1000)
    assert sink.getvalue() == b"".join(pieces[:damaged])


def test_limits_are_checked_before_bytes_are_written() -> None:
    sink = io.BytesIO()
    with pytest.raises(LimitError, match="larger than 3 bytes"):
        receive_chunks(chunks_of(b"ab", b"cd"), sink, limit=3)
    assert sink.getvalue() == b"ab"
    with pytest.raises(LimitError, match="chunk 0 has"):
        receive_chunks(chunks_of(b"x" * (CHUNK_BYTES + 1)), sink, limit=1 << 30)
    with pytest.raises(EvidenceError, match="empty"):
        receive_chunks(chunks_of(b""), sink, limit=3)
    with pytest.raises(EvidenceError, match="ended after 2 of 3"):
        Received(2, b"").require(3, b"")


class Failing(evidence_pb2_grpc.ProverServicer):
    """Raises what it is told to, in a unary and in a streaming call."""

    error: Exception = Error("nothing yet")

    def Describe(self, request: Any, context: Any) -> Any:  # noqa: N802
        raise self.error

    def RunSession(self, request: Any, context: Any) -> Iterator[pb.SessionEvent]:  # noqa: N802
        yield pb.SessionEvent(progress=pb.Progress(stage="before"))
        raise self.error


@pytest.fixture(scope="module")
def failing() -> Iterator[tuple[Failing, Any]]:
    servicer = Failing()
    add: Any = evidence_pb2_grpc.add_ProverServicer_to_server
    with (
        start_server(Listen(), lambda server: add(servicer, server), SERVICE) as server,
        open_channel(server.port) as channel,
    ):
        yield servicer, evidence_pb2_grpc.ProverStub(channel)


def made(kind: type[Error]) -> Error:
    if kind is MissingDependencyError:
        return MissingDependencyError("heat maps", "matplotlib", "pip install '.[report]'")
    return kind("attention 'flish' ≠ ‘flash’", "did you mean 'flash'?")


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_every_error_crosses_the_wire_as_itself(failing: tuple[Failing, Any], kind: type[Error]) -> None:
    servicer, stub = failing
    servicer.error = made(kind)
    for call in (
        lambda: stub.Describe(pb.DescribeRequest(), timeout=60),
        lambda: list(stub.RunSession(pb.SessionRequest(), timeout=60)),
    ):
        with pytest.raises(Error) as caught, translated():
            call()
        assert type(caught.value) is kind
        assert (caught.value.message, caught.value.hint) == (servicer.error.message, servicer.error.hint)
        assert caught.value.exit_code == kind.exit_code
    with pytest.raises(grpc.RpcError) as raw:
        stub.Describe(pb.DescribeRequest(), timeout=60)
    assert raw.value.code() == status_of(servicer.error)
    assert raw.value.details() == servicer.error.diagnostics()


def test_statuses_tell_apart_what_a_caller_must_do_differently() -> None:
    codes = grpc.StatusCode
    assert {kind.__name__: status_of(made(kind)) for kind in ERRORS} == {
        "Error": codes.FAILED_PRECONDITION,
        "UsageError": codes.INVALID_ARGUMENT,
        "NotFoundError": codes.NOT_FOUND,
        "LimitError": codes.RESOURCE_EXHAUSTED,
        "MissingDependencyError": codes.FAILED_PRECONDITION,
        "EvidenceError": codes.INVALID_ARGUMENT,
        "SignatureError": codes.PERMISSION_DENIED,
        "NonceError": codes.FAILED_PRECONDITION,
        "UnknownModelError": codes.FAILED_PRECONDITION,
        "ReplayError": codes.ABORTED,
        "NondeterminismError": codes.ABORTED,
        "OverlapError": codes.ABORTED,
        "CancelledError": codes.CANCELLED,
        "DeadlineError": codes.DEADLINE_EXCEEDED,
        "UnavailableError": codes.UNAVAILABLE,
    }
    assert codes.INTERNAL not in STATUS.values()  # that one means a bug


def test_a_long_error_still_arrives(failing: tuple[Failing, Any]) -> None:
    servicer, stub = failing
    servicer.error = EvidenceError("\N{PILE OF POO}" * 50_000, "\x1b[31m" * 50_000)
    with pytest.raises(EvidenceError) as caught, translated():
        stub.Describe(pb.DescribeRequest(), timeout=60)
    assert caught.value.message.startswith("\N{PILE OF POO}" * 200)
    assert caught.value.message.endswith("…")
    assert caught.value.diagnostics().isprintable()


def test_what_nobody_expected_says_nothing_but_is_logged(
    failing: tuple[Failing, Any], caplog: pytest.LogCaptureFixture
) -> None:
    servicer, stub = failing
    servicer.error = ZeroDivisionError("the secret is 42")
    with caplog.at_level(logging.ERROR), pytest.raises(UnavailableError) as caught, translated():
        stub.Describe(pb.DescribeRequest(), timeout=60)
    assert "secret is" not in caught.value.diagnostics()
    assert "internal error, ticket" in caught.value.message
    assert "the secret is 42" in caplog.text
    ticket = caught.value.message.split("ticket ")[1].split(" ")[0]
    assert ticket in caplog.text


class _Refusal(grpc.RpcError):
    """What a server that keeps to no rules may send."""

    def __init__(self, metadata: tuple[tuple[str, str | bytes], ...]) -> None:
        self._metadata = metadata

    def trailing_metadata(self) -> Any:
        return self._metadata

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.INVALID_ARGUMENT

    def details(self) -> str:
        return "\x1b]0;owned\x07 details"


@pytest.mark.parametrize("name", ["SystemExit", "KeyboardInterrupt", "annotations", "", "did_you_mean"])
def test_a_server_cannot_make_a_client_raise_anything_else(name: str) -> None:
    error = error_of(_Refusal((("fpforensics-error", name), ("fpforensics-message-bin", b"\xff\xfe"))))
    assert type(error) is UnavailableError
    assert error.diagnostics().isprintable()


def test_undecodable_and_hostile_text_is_made_printable() -> None:
    error = error_of(_Refusal((("fpforensics-error", "NonceError"), ("fpforensics-message-bin", b"\xff\x1b[2J"))))
    assert type(error) is errors.NonceError
    assert error.message.isprintable()


def test_nobody_there_is_unavailable(failing: tuple[Failing, Any]) -> None:
    add: Any = evidence_pb2_grpc.add_ProverServicer_to_server
    server: RunningServer = start_server(Listen(), lambda it: add(Failing(), it), SERVICE)
    server.stop(grace=0)
    with open_channel(server.port) as channel:
        stub: Any = evidence_pb2_grpc.ProverStub(channel)  # type: ignore[no-untyped-call]
        with pytest.raises(UnavailableError), translated():
            stub.Describe(pb.DescribeRequest(), timeout=60)


class _Broken(grpc.RpcError):
    """What gRPC itself says of a connection."""

    def __init__(self, details: str) -> None:
        self._details = details

    def trailing_metadata(self) -> Any:
        return None

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return self._details


@pytest.mark.parametrize(
    ("details", "hint"),
    [
        ("Too many pings", "pings that keep a quiet call alive"),
        ("failed to connect to all addresses; last error: UNKNOWN: ipv4:1.2.3.4:1: Connection refused", "server runs"),
        ("errors resolving nosuch.invalid:1: [field:hostname lookup error: Domain name not found]", "host's name"),
        ("failed to connect to all addresses; last error: Tls handshake failed (TSI_PROTOCOL_FAILURE)", "certificate"),
        (
            "failed to connect to all addresses; last error: INTERNAL: Failed parsing HTTP/2 (Expected SETTINGS frame",
            "port",
        ),
        ("failed to connect to all addresses; last error: UNAVAILABLE: ipv4:1.2.3.4:1: Socket closed", "asks for TLS"),
        ("Stream removed (Socket closed)", "connection broke"),
        ("Cancelling all calls", "connection broke"),
        ("", "connection broke"),
    ],
)
def test_a_failed_connection_comes_with_a_fitting_way_out(details: str, hint: str) -> None:
    error = error_of(_Broken(details))
    assert type(error) is UnavailableError
    assert error.message.startswith("no connection to the server")
    assert hint in error.hint


def test_only_rpc_failures_are_translated() -> None:
    with pytest.raises(ZeroDivisionError), translated():
        _ = 1 / 0
