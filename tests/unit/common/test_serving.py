"""Who may reach a server: loopback in plaintext, anything else with TLS and a token or a certificate."""

from __future__ import annotations

import datetime
import ipaddress
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from fpforensics.common import access, serving
from fpforensics.common.access import Access, Connection, Listen, is_loopback, read_token
from fpforensics.common.errors import UnavailableError, UsageError
from fpforensics.common.rpc import translated
from fpforensics.common.serving import MAX_RPCS, RunningServer, start_server
from fpforensics.proto import evidence_pb2 as pb
from fpforensics.proto import evidence_pb2_grpc

SERVICE = pb.DESCRIPTOR.services_by_name["Prover"].full_name


class Open(evidence_pb2_grpc.ProverServicer):
    """Answers anyone who gets through, and remembers what the call carried."""

    def __init__(self) -> None:
        self.metadata: list[dict[str, Any]] = []

    def Describe(self, request: Any, context: Any) -> pb.Description:  # noqa: N802
        self.metadata.append(dict(context.invocation_metadata()))
        return pb.Description(keyid="me")


def serve(listen: Listen, servicer: Open | None = None) -> RunningServer:
    add: Any = evidence_pb2_grpc.add_ProverServicer_to_server
    return start_server(listen, lambda server: add(servicer or Open(), server), SERVICE)


def describe(target: str, access: Access | None = None) -> str:
    with Connection(target, access) as connection, translated():
        stub: Any = evidence_pb2_grpc.ProverStub(connection.channel)  # type: ignore[no-untyped-call]
        return str(stub.Describe(pb.DescribeRequest(), timeout=10, metadata=connection.metadata).keyid)


def write_token(path: Path, token: str = "t" * 40, mode: int = 0o600) -> Path:
    path.write_text(token + "\n")
    path.chmod(mode)
    return path


@dataclass(frozen=True)
class Certificates:
    """A throwaway authority, and two certificates of it."""

    roots: Path
    server: tuple[Path, Path]
    client: tuple[Path, Path]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    folder = tmp_path_factory.mktemp("tls")
    authority = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")])
    root = _certificate(name, name, authority, authority, ca=True)
    (folder / "roots.pem").write_bytes(root.public_bytes(serialization.Encoding.PEM))

    def issue(common: str) -> tuple[Path, Path]:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])
        certificate = _certificate(subject, name, key, authority, ca=False)
        paths = folder / f"{common}.pem", folder / f"{common}.key"
        paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        paths[1].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return paths

    return Certificates(folder / "roots.pem", issue("server"), issue("client"))


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    signer: ec.EllipticCurvePrivateKey,
    *,
    ca: bool,
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(signer, hashes.SHA256())
    )


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1:0", True),
        ("127.8.9.1:50051", True),
        ("localhost:1", True),
        ("LOCALHOST:1", True),
        ("[::1]:50051", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("10.0.0.1:1", False),
        ("localhost.evil.example:1", False),
        ("127.0.0.1.evil.example:1", False),
        ("verifier.example:443", False),
    ],
)
def test_what_counts_as_loopback(address: str, expected: bool) -> None:
    assert is_loopback(address) is expected


@pytest.mark.parametrize(
    "address", ["", "localhost", ":50051", "::1:50051", "http://127.0.0.1:1", "unix:/tmp/s", "h:99999", "h:-1", "h:٣"]
)
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(UsageError, match="not host:port"):
        is_loopback(address)
    with pytest.raises(UsageError):
        serve(Listen(address=address))
    with pytest.raises(UsageError):
        Connection(address)


def test_an_open_address_needs_tls_and_authentication(tmp_path: Path, certificates: Certificates) -> None:
    token = write_token(tmp_path / "token")
    cert, key = certificates.server
    everywhere = Listen(address="0.0.0.0:0")
    for listen, reason in (
        (everywhere, "without TLS"),
        (replace(everywhere, token_file=token), "without TLS"),
        (replace(everywhere, tls_cert=cert, tls_key=key), "without authentication"),
        (replace(everywhere, tls_cert=cert, token_file=token), "go together"),
        (replace(everywhere, client_ca=certificates.roots, token_file=token), "need TLS"),
    ):
        with pytest.raises(UsageError, match=reason) as caught:
            serve(listen)
        assert caught.value.hint
    for listen in (
        replace(everywhere, tls_cert=cert, tls_key=key, token_file=token),
        replace(everywhere, tls_cert=cert, tls_key=key, client_ca=certificates.roots),
    ):
        serve(listen).stop(grace=0)


def test_a_token_opens_everything_and_its_absence_only_health(tmp_path: Path) -> None:
    token = write_token(tmp_path / "token")
    other = write_token(tmp_path / "other", "o" * 40)
    with serve(Listen(token_file=token)) as server:
        target = f"127.0.0.1:{server.port}"
        assert describe(target, Access(token_file=token)) == "me"
        for access in (Access(), Access(token_file=other)):
            with pytest.raises(UnavailableError, match="unauthenticated"):
                describe(target, access)
        with grpc.insecure_channel(target, [("grpc.enable_http_proxy", 0)]) as channel:
            stub: Any = evidence_pb2_grpc.ProverStub(channel)  # type: ignore[no-untyped-call]
            for header in ("t" * 40, "bearer " + "t" * 40, "Bearer " + "t" * 41, "Bearer ", "Bearer " + "t" * 4000):
                with pytest.raises(grpc.RpcError) as caught:
                    stub.Describe(pb.DescribeRequest(), timeout=10, metadata=(("authorization", header),))
                assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
            with pytest.raises(grpc.RpcError) as caught:
                list(stub.RunSession(pb.SessionRequest(), timeout=10))
            assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
            with pytest.raises(grpc.RpcError) as caught:
                _listed_services(channel)
            assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
            assert _health(channel) == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize(
    ("token", "mode", "message"),
    [
        ("t" * 40, 0o644, "open to others"),
        ("t" * 40, 0o620, "open to others"),
        ("short", 0o600, "does not hold"),
        ("two words " * 5, 0o600, "does not hold"),
        ("ü" * 40, 0o600, "does not hold"),
        ("t" * 5000, 0o600, "does not hold"),
    ],
)
def test_a_token_file_must_be_private_and_long(tmp_path: Path, token: str, mode: int, message: str) -> None:
    path = write_token(tmp_path / "token", token, mode)
    with pytest.raises(UsageError, match=message):
        read_token(path)
    with pytest.raises(UsageError, match="cannot read"):
        read_token(tmp_path / "absent")


def test_tls_is_checked_by_the_client(tmp_path: Path, certificates: Certificates) -> None:
    token = write_token(tmp_path / "token")
    cert, key = certificates.server
    with serve(Listen(tls_cert=cert, tls_key=key, token_file=token)) as server:
        target = f"localhost:{server.port}"
        assert describe(target, Access(tls_roots=certificates.roots, token_file=token)) == "me"
        with pytest.raises(UnavailableError):  # an authority that did not sign it
            describe(target, Access(tls_roots=certificates.client[0], token_file=token))
        with pytest.raises(UnavailableError):
            describe(target, Access(token_file=token))  # plaintext


def test_client_certificates_open_the_door(certificates: Certificates) -> None:
    cert, key = certificates.server
    mine, my_key = certificates.client
    with serve(Listen(tls_cert=cert, tls_key=key, client_ca=certificates.roots)) as server:
        target = f"127.0.0.1:{server.port}"
        trusted = Access(tls_roots=certificates.roots)
        assert describe(target, replace(trusted, tls_cert=mine, tls_key=my_key)) == "me"
        with pytest.raises(UnavailableError):
            describe(target, trusted)


def _outward_address() -> str:
    """An address of this machine that is not loopback. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no address but loopback")
        return str(probe.getsockname()[0])


def test_a_token_never_travels_in_the_clear(tmp_path: Path) -> None:
    """A server that speaks plaintext on an outward address, against our own rules, hears nothing from our client."""
    token = write_token(tmp_path / "token")
    servicer, listener = Open(), socket.socket()
    listener.bind((_outward_address(), 0))
    listener.listen()
    listener.settimeout(10)
    host, port = listener.getsockname()
    with listener, Connection(f"{host}:{port}", Access(token_file=token)) as connection:
        stub: Any = evidence_pb2_grpc.ProverStub(connection.channel)  # type: ignore[no-untyped-call]
        call = stub.Describe.future(pb.DescribeRequest(), timeout=10, metadata=connection.metadata)
        peer, _ = listener.accept()
        with peer:
            peer.settimeout(10)
            said = peer.recv(65536)
        call.cancel()
    assert said[:2] == b"\x16\x03"  # a TLS handshake
    assert b"t" * 40 not in said
    assert servicer.metadata == []


def test_who_has_no_token_cannot_hold_threads_by_sending_nothing(tmp_path: Path) -> None:
    token = write_token(tmp_path / "token")
    silent = threading.Event()

    def nothing() -> Iterator[bytes]:
        silent.wait(60)
        yield b""

    with serve(Listen(token_file=token)) as server:
        target = f"127.0.0.1:{server.port}"
        with grpc.insecure_channel(target, [("grpc.enable_http_proxy", 0)]) as channel:
            for method in (f"/{SERVICE}/Describe", f"/{SERVICE}/RunSession", "/no.Such/Method"):
                calls = [channel.stream_unary(method).future(nothing(), timeout=30) for _ in range(MAX_RPCS // 2)]
                codes = {call.code() for call in calls}
                assert codes == {grpc.StatusCode.UNAUTHENTICATED}
            assert describe(target, Access(token_file=token)) == "me"
        silent.set()


def test_health_can_be_watched() -> None:
    with (
        serve(Listen()) as server,
        grpc.insecure_channel(f"127.0.0.1:{server.port}", [("grpc.enable_http_proxy", 0)]) as channel,
    ):
        watching = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE), timeout=10)
        assert next(watching).status == health_pb2.HealthCheckResponse.SERVING
        watching.cancel()


def test_health_and_reflection_are_on() -> None:
    with (
        serve(Listen()) as server,
        grpc.insecure_channel(f"127.0.0.1:{server.port}", [("grpc.enable_http_proxy", 0)]) as channel,
    ):
        assert _health(channel) == _health(channel, SERVICE) == health_pb2.HealthCheckResponse.SERVING
        assert SERVICE in _listed_services(channel)


def _health(channel: grpc.Channel, service: str = "") -> int:
    stub = health_pb2_grpc.HealthStub(channel)
    return int(stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10).status)


def _listed_services(channel: grpc.Channel) -> list[str]:
    def ask() -> Iterator[reflection_pb2.ServerReflectionRequest]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")

    (answer,) = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(ask(), timeout=10)
    return [service.name for service in answer.list_services_response.service]


def test_a_port_in_use_is_an_error_and_not_shared() -> None:
    with (
        serve(Listen()) as server,
        pytest.raises(UsageError, match=r"cannot listen on .*: address already in use") as caught,
    ):
        serve(Listen(address=f"127.0.0.1:{server.port}"))
    assert "another port" in caught.value.hint
    serve(Listen(address=f"127.0.0.1:{server.port}")).stop(grace=0)  # at once: what was closed is not in use


@pytest.mark.parametrize(
    ("address", "said"), [("nosuch.invalid:0", "no such host"), ("192.0.2.1:0", "cannot assign requested address")]
)
def test_an_address_of_another_machine_is_none_to_listen_on(
    certificates: Certificates, tmp_path: Path, address: str, said: str
) -> None:
    cert, key = certificates.server
    token = write_token(tmp_path / "token")
    with pytest.raises(UsageError, match=f"cannot listen on {address}: {said}") as caught:
        serve(Listen(address=address, tls_cert=cert, tls_key=key, token_file=token))
    assert caught.value.hint == "give an address of this machine"


def test_a_port_in_use_is_one_line_on_stderr(tmp_path: Path) -> None:
    """gRPC's C core prints lines of its own, past Python."""
    command = Path(sys.executable).parent / "prover"
    subprocess.run([command, "keygen", tmp_path / "key"], check=True, capture_output=True)
    with serve(Listen()) as server:
        done = subprocess.run(
            [command, "serve", "--key", tmp_path / "key", "--listen", f"127.0.0.1:{server.port}"],
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot listen on ")
    assert done.stderr.count("\n") == 1


class Quiet(evidence_pb2_grpc.ProverServicer):
    """Says nothing until it is let go or the call is over."""

    def __init__(self) -> None:
        self.over = threading.Event()

    def RunSession(self, request: Any, context: Any) -> Iterator[pb.SessionEvent]:  # noqa: N802
        context.add_callback(self.over.set)
        assert self.over.wait(60)
        yield pb.SessionEvent(progress=pb.Progress(stage="still here"))


def listen_quietly(target: str) -> list[str]:
    with Connection(target) as connection, translated():
        stub: Any = evidence_pb2_grpc.ProverStub(connection.channel)  # type: ignore[no-untyped-call]
        return [event.progress.stage for event in stub.RunSession(pb.SessionRequest(), timeout=60)]


def test_a_quiet_call_outlives_its_clients_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two servers get the same pings. The one that allows them answers; the one that does not has cut its client off."""
    assert serving.MIN_PING_MS < access.KEEPALIVE_MS
    monkeypatch.setattr(access, "KEEPALIVE_MS", 100)
    patient, strict = Quiet(), Quiet()
    add: Any = evidence_pb2_grpc.add_ProverServicer_to_server
    with ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(serving, "MIN_PING_MS", 1)
        with start_server(Listen(), lambda it: add(patient, it), SERVICE) as server:
            answer = pool.submit(listen_quietly, f"127.0.0.1:{server.port}")
            monkeypatch.undo()
            monkeypatch.setattr(access, "KEEPALIVE_MS", 100)
            with (
                start_server(Listen(), lambda it: add(strict, it), SERVICE) as other,
                pytest.raises(UnavailableError, match=r"(?i)too many pings"),
            ):
                listen_quietly(f"127.0.0.1:{other.port}")
            assert not patient.over.wait(1.5)  # and one ping more, should it have been a little later
            patient.over.set()
            assert answer.result(timeout=10) == ["still here"]


def test_a_signal_is_heard_before_the_server_has_stopped() -> None:
    heard: list[str] = []
    with serve(Listen()) as server:
        target = f"127.0.0.1:{server.port}"
        timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM))
        timer.start()
        server.wait(stopping=lambda: heard.append(describe(target)))
    assert heard == ["me"]


def test_damaged_tls_files_are_named(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.pem"
    damaged.write_text("no certificate")
    with pytest.raises(UsageError, match="is not PEM"):
        serve(Listen(tls_cert=damaged, tls_key=damaged))
    damaged.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    with pytest.raises(UsageError, match="cannot listen"):
        serve(Listen(tls_cert=damaged, tls_key=damaged))
    with pytest.raises(UsageError, match="cannot read TLS file"):
        Connection("verifier.example:1", Access(tls_roots=tmp_path / "absent"))


def test_stopping_twice_does_no_harm() -> None:
    server = serve(Listen())
    server.stop(grace=0)
    server.stop(grace=0)
    server.wait()
    with pytest.raises(UnavailableError):
        describe(f"127.0.0.1:{server.port}")
