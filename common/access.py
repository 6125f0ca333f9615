"""How the two ends of a connection prove who they are: addresses, TLS files, bearer tokens.

Loopback may be plaintext. A client that dials anything else uses TLS always, so a token never travels in the clear.
"""

from __future__ import annotations

import ipaddress
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import grpc

from fpforensics.common.errors import UsageError, shorten
from fpforensics.common.rpc import CHUNK_BYTES

UNARY_SECONDS = 30.0
"""The deadline of calls that should answer at once."""

KEEPALIVE_MS = 30_000
"""How often a client asks, while a call is under way, whether the server is still there. Servers must allow it: see
:data:`fpforensics.common.serving.MIN_PING_MS`.
"""

MAX_REQUEST_BYTES = 2 * CHUNK_BYTES
MAX_RESPONSE_BYTES = 16 * CHUNK_BYTES
MAKE_TOKEN = "(umask 077; openssl rand -hex 32 > FILE)"  # noqa: S105 - a command that makes one
_MIN_TOKEN, _MAX_TOKEN = 32, 1024
_MAX_PEM_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Listen:
    """Where a server listens (``host:port``, port 0 for any) and how clients must prove who they are.

    ``client_ca`` asks for client certificates of that authority; ``token_file`` for its bearer token.
    """

    address: str = "127.0.0.1:0"
    tls_cert: Path | None = None
    tls_key: Path | None = None
    client_ca: Path | None = None
    token_file: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Access:
    """How a client reaches a server: whose certificates it trusts (None: the system's), and how it proves who it is.

    Loopback is dialled in plaintext unless ``tls_roots`` or ``tls_cert`` is given.
    """

    tls_roots: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    token_file: Path | None = None


class Connection:
    """A channel to ``target`` (``host:port``) and the metadata that each call on it carries."""

    def __init__(self, target: str, access: Access | None = None) -> None:
        access = access or Access()
        loopback = is_loopback(target)
        require_pair(access.tls_cert, access.tls_key)
        token = read_token(access.token_file) if access.token_file is not None else ""
        self.metadata: tuple[tuple[str, str], ...] = (("authorization", f"Bearer {token}"),) if token else ()
        options = [*_options(), ("grpc.enable_http_proxy", 0 if loopback else 1)]
        if loopback and access.tls_roots is None and access.tls_cert is None:
            self.channel = grpc.insecure_channel(target, options)
            return
        credentials = grpc.ssl_channel_credentials(
            root_certificates=optional_pem(access.tls_roots),
            private_key=optional_pem(access.tls_key),
            certificate_chain=optional_pem(access.tls_cert),
        )
        self.channel = grpc.secure_channel(target, credentials, options)

    def close(self) -> None:
        """Close the channel; calls under way are cancelled."""
        self.channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _options() -> tuple[tuple[str, int], ...]:
    return (
        ("grpc.max_receive_message_length", MAX_RESPONSE_BYTES),
        ("grpc.max_send_message_length", MAX_REQUEST_BYTES),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.max_pings_without_data", 0),  # all through a silent call, not only at its beginning
        ("grpc.max_reconnect_backoff_ms", 30_000),
        ("grpc.use_local_subchannel_pool", 1),  # a new connection is tried at once, whatever befell another
    )


def split_address(address: str) -> tuple[str, int]:
    """Host, without brackets, and port. Raises :class:`UsageError` if ``address`` is not host:port."""
    host, _, port = address.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    ambiguous = ":" in bare and bare == host  # IPv6 without brackets
    if not bare or "/" in bare or ambiguous or not port.isascii() or not port.isdigit() or int(port[:6]) > 65535:
        raise UsageError(f"address {shorten(address)!r} is not host:port", "e.g. 127.0.0.1:50051 or [::1]:50051")
    return bare, int(port)


def is_loopback(address: str) -> bool:
    """Whether ``host:port`` can be reached from this machine only. Raises :class:`UsageError` if it is not host:port."""
    bare, _ = split_address(address)
    try:
        return ipaddress.ip_address(bare).is_loopback
    except ValueError:
        return bare.lower() == "localhost"


def require_guard(listen: Listen) -> None:
    """Raise :class:`UsageError`, with the way out, if others could reach this address unasked."""
    require_pair(listen.tls_cert, listen.tls_key)
    if listen.client_ca is not None and listen.tls_cert is None:
        raise UsageError("client certificates need TLS", "give a certificate and its key")
    if is_loopback(listen.address):
        return
    if listen.tls_cert is None:
        raise UsageError(
            f"listening on {listen.address} without TLS lets anyone on the network read and alter the traffic",
            "give a TLS certificate and key, or listen on 127.0.0.1",
        )
    if listen.token_file is None and listen.client_ca is None:
        raise UsageError(
            f"listening on {listen.address} without authentication lets anyone on the network in",
            f"give a token file, made with {MAKE_TOKEN}, or a client CA, or listen on 127.0.0.1",
        )


def require_pair(certificate: Path | None, key: Path | None) -> None:
    """Raise :class:`UsageError` if only one of the two is given."""
    if (certificate is None) != (key is None):
        raise UsageError("a TLS certificate and its key go together", "give both files")


def server_credentials(listen: Listen) -> Any:
    """gRPC's credentials for a server, or None for plaintext."""
    if listen.tls_cert is None or listen.tls_key is None:
        return None
    roots = optional_pem(listen.client_ca)
    pair = (read_pem(listen.tls_key), read_pem(listen.tls_cert))
    return grpc.ssl_server_credentials([pair], root_certificates=roots, require_client_auth=roots is not None)


def read_token(path: Path) -> str:
    """The bearer token in ``path``, which only its owner may read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            raw = file.read(_MAX_TOKEN + 1)
    except OSError as error:
        raise UsageError(f"cannot read token file {path}: {error.strerror}", f"make one: {MAKE_TOKEN}") from None
    if os.name == "posix" and mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UsageError(
            f"token file {path} is open to others (mode {stat.S_IMODE(mode):04o})", f"run: chmod 600 {path}"
        )
    token = raw.strip()
    if not _MIN_TOKEN <= len(token) <= _MAX_TOKEN or not all(0x21 <= byte <= 0x7E for byte in token):
        raise UsageError(
            f"token file {path} does not hold one word of {_MIN_TOKEN} to {_MAX_TOKEN} printable characters",
            f"make one: {MAKE_TOKEN}",
        )
    return token.decode("ascii")


def optional_pem(path: Path | None) -> bytes | None:
    """:func:`read_pem`, or None for None."""
    return None if path is None else read_pem(path)


def read_pem(path: Path) -> bytes:
    """A PEM file's bytes. Raises :class:`UsageError` if it cannot be read or is not PEM."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_PEM_BYTES)
    except OSError as error:
        raise UsageError(f"cannot read TLS file {path}: {error.strerror}", "give a readable PEM file") from None
    if b"-----BEGIN " not in data:
        raise UsageError(f"TLS file {path} is not PEM", "convert it: openssl x509 -in FILE -out FILE.pem")
    return data
