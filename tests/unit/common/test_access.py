"""Who may reach a server: loopback in plaintext, anything else with TLS and a token or a certificate."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health_pb2
from open_server import SERVICE, Open, describe, health_of, listed_services, serve, write_token
from service_world import open_channel

from fpforensics.common.access import Access, Connection, Listen, is_loopback, read_token
from fpforensics.common.errors import UnavailableError, UsageError
from fpforensics.common.serving import MAX_RPCS
from fpforensics.proto import evidence_pb2 as pb
from fpforensics.proto import evidence_pb2_grpc


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


def test_a_token_opens_everything_and_its_absence_onlyhealth_of(tmp_path: Path) -> None:
    token = write_token(tmp_path / "token")
    other = write_token(tmp_path / "other", "o" * 40)
    with serve(Listen(token_file=token)) as server:
        target = f"127.0.0.1:{server.port}"
        assert describe(target, Access(token_file=token)) == "me"
        for access in (Access(), Access(token_file=other)):
            with pytest.raises(UnavailableError, match="unauthenticated"):
                describe(target, access)
        with open_channel(server.port) as channel:
            stub: Any = evidence_pb2_grpc.ProverStub(channel)  # type: ignore[no-untyped-call]
            for header in ("t" * 40, "bearer " + "t" * 40, "Bearer " + "t" * 41, "Bearer ", "Bearer " + "t" * 4000):
                with pytest.raises(grpc.RpcError) as caught:
                    stub.Describe(pb.DescribeRequest(), timeout=60, metadata=(("authorization", header),))
                assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
            with pytest.raises(grpc.RpcError) as caught:
                list(stub.RunSession(pb.SessionRequest(), timeout=60))
            assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
            with pytest.raises(grpc.RpcError) as caught:
                listed_services(channel)
            assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
            assert health_of(channel) == health_pb2.HealthCheckResponse.SERVING


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
        call = stub.Describe.future(pb.DescribeRequest(), timeout=60, metadata=connection.metadata)
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
        with open_channel(server.port) as channel:
            for method in (f"/{SERVICE}/Describe", f"/{SERVICE}/RunSession", "/no.Such/Method"):
                calls = [channel.stream_unary(method).future(nothing(), timeout=30) for _ in range(MAX_RPCS // 2)]
                codes = {call.code() for call in calls}
                assert codes == {grpc.StatusCode.UNAUTHENTICATED}
            assert describe(target, Access(token_file=token)) == "me"
        silent.set()


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
