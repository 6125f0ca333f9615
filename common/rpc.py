"""What both services agree on beside the messages: how errors cross the wire, and how bundles travel in chunks.

An :class:`~fpforensics.common.errors.Error` raised by a service arrives in the client as the same class with the same
message and hint. Anything else that a service raises arrives as ``INTERNAL`` and says nothing about the server's
insides.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import grpc

from fpforensics.common import errors
from fpforensics.common.errors import Error, EvidenceError, LimitError, UnavailableError, UsageError
from fpforensics.proto.evidence_pb2 import Chunk

CHUNK_BYTES = 1 << 20
MAX_BUNDLE_BYTES = 4 << 30
MAX_MESSAGE_TEXT, MAX_HINT_TEXT = 1024, 512  # bytes; all trailing metadata must stay below 8 KiB

_CLASS_KEY, _MESSAGE_KEY, _HINT_KEY = "fpforensics-error", "fpforensics-message-bin", "fpforensics-hint-bin"
_logger = logging.getLogger(__name__)

# The nearest listed class of an error decides its status.
STATUS: Mapping[type[Error], grpc.StatusCode] = {
    Error: grpc.StatusCode.FAILED_PRECONDITION,
    errors.UsageError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFoundError: grpc.StatusCode.NOT_FOUND,
    errors.LimitError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.MissingDependencyError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.EvidenceError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.SignatureError: grpc.StatusCode.PERMISSION_DENIED,
    errors.NonceError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.UnknownModelError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ReplayError: grpc.StatusCode.ABORTED,
    errors.CancelledError: grpc.StatusCode.CANCELLED,
    errors.DeadlineError: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.UnavailableError: grpc.StatusCode.UNAVAILABLE,
}
_BY_NAME: Mapping[str, type[Error]] = {
    name: value for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Error)
}
_HINTS: Mapping[grpc.StatusCode, str] = {
    grpc.StatusCode.UNAUTHENTICATED: "give the server's token file, or a client certificate that it accepts",
    grpc.StatusCode.DEADLINE_EXCEEDED: "the server is busy or far away: try again",
    grpc.StatusCode.UNIMPLEMENTED: "is this the right service, and the same version?",
    grpc.StatusCode.INTERNAL: "the server's log says more",
    grpc.StatusCode.UNKNOWN: "the server's log says more",
}
# Words that gRPC uses when a connection fails or breaks, and the way out; the first that occur decide.
_BROKEN: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("too many pings", "too_many_pings", "enhance_your_calm"),
        "the server, or a proxy before it, forbids the pings that keep a quiet call alive: is it the same version?",
    ),
    (("resolving", "name not found"), "check the host's name"),
    (
        ("handshake", "certificate"),
        "check the server's TLS certificate and whose certificates you trust, or that it uses TLS",
    ),
    (("expected settings frame", "http1"), "no gRPC server answers there: check the port"),
    (("connection refused", "timed out"), "check the address and that the server runs"),
    (
        ("failed to connect",),
        "check the address, that the server runs, and whether it asks for TLS or a client certificate",
    ),
)
_BROKE_OFF = "the connection broke or the server stopped: try again when it runs"


@dataclass(frozen=True)
class Received:
    """What arrived: how many bytes, and their SHA-256."""

    size: int
    sha256: bytes

    def require(self, size: int, sha256: bytes) -> None:
        """Raise :class:`EvidenceError` unless exactly the promised bytes arrived."""
        if self.size != size:
            raise EvidenceError(f"bundle ended after {self.size} of {size} bytes", "send it again, whole")
        if self.sha256 != sha256:
            raise EvidenceError("bundle bytes do not match the promised SHA-256", "damaged on the way: send it again")


def chunk_file(path: Path) -> Iterator[Chunk]:
    """A file as chunks of at most ``CHUNK_BYTES``, each with the digest of everything up to its end."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(CHUNK_BYTES):
            digest.update(data)
            yield Chunk(data=data, running_sha256=digest.digest())


def receive_chunks(chunks: Iterable[Chunk], sink: BinaryIO, *, limit: int) -> Received:
    """Write chunks to ``sink``, checking each before it is written.

    Raises:
        LimitError: a chunk is larger than ``CHUNK_BYTES``, or all of them than ``limit``.
        EvidenceError: an empty chunk, or one that does not match its running digest.
    """
    digest, size = hashlib.sha256(), 0
    for number, chunk in enumerate(chunks):
        data = chunk.data
        if len(data) > CHUNK_BYTES:
            raise LimitError(f"chunk {number} has {len(data)} bytes", f"send at most {CHUNK_BYTES}")
        if not data:
            raise EvidenceError(f"chunk {number} is empty", "send only chunks that hold bytes")
        size += len(data)
        if size > limit:
            raise LimitError(f"bundle is larger than {limit} bytes", "the receiver takes no more")
        digest.update(data)
        if digest.digest() != chunk.running_sha256:
            raise EvidenceError(f"chunk {number} does not match its digest", "damaged on the way: send it again")
        sink.write(data)
    return Received(size, digest.digest())


def file_sha256(path: Path) -> bytes:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def require_short(name: str, text: str, limit: int) -> str:
    """``text`` itself. Raises :class:`UsageError` if it is longer than ``limit`` characters."""
    if len(text) > limit:
        raise UsageError(f"{name} of {len(text)} characters", f"at most {limit}")
    return text


def status_of(error: Error) -> grpc.StatusCode:
    """The gRPC status that an error travels as."""
    return next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)


def refuse(context: grpc.ServicerContext, error: Error) -> NoReturn:
    """End the call with an error that the client can raise again. Never returns."""
    message, hint = _clean(error.message, MAX_MESSAGE_TEXT), _clean(error.hint, MAX_HINT_TEXT)
    kind = next(kind for kind in type(error).__mro__ if _BY_NAME.get(kind.__name__) is kind)
    context.set_trailing_metadata(
        ((_CLASS_KEY, kind.__name__), (_MESSAGE_KEY, message.encode()), (_HINT_KEY, hint.encode()))
    )
    context.abort(status_of(error), f"{message} ({hint})" if hint else message)
    raise AssertionError("abort returned")


def error_of(failure: grpc.RpcError) -> Error:
    """The error behind a failed call: the server's own where it sent one, else what the status says."""
    metadata = dict(failure.trailing_metadata() or ())
    kind = _BY_NAME.get(str(metadata.get(_CLASS_KEY, "")))
    if kind is not None:
        message, hint = (_text(metadata.get(key, b"")) for key in (_MESSAGE_KEY, _HINT_KEY))
        return _rebuilt(kind, _clean(message, MAX_MESSAGE_TEXT), _clean(hint, MAX_HINT_TEXT))
    code = failure.code()
    said = _clean(failure.details() or "", MAX_MESSAGE_TEXT)
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        return LimitError(f"the server refused: {said}", "try again later, or send less")
    if code == grpc.StatusCode.UNAVAILABLE:
        heard = said.lower()
        hint = next((hint for words, hint in _BROKEN if any(word in heard for word in words)), _BROKE_OFF)
        return UnavailableError(f"no connection to the server: {said}" if said else "no connection to the server", hint)
    name = code.name.lower().replace("_", " ")
    return UnavailableError(f"the server answered {name}: {said}" if said else name, _HINTS.get(code, ""))


@contextmanager
def translated() -> Iterator[None]:
    """In a client: a failed call leaves this block as an :class:`Error`."""
    try:
        yield
    except grpc.RpcError as failure:
        raise error_of(failure) from None


class ErrorBoundary(grpc.ServerInterceptor):
    """Around every handler: errors become statuses; what nobody expected is logged here and nowhere else."""

    def intercept_service(self, continuation: Callable[..., Any], details: Any) -> Any:
        """Wrap the handler that would serve this call; None, for an unknown method, stays None."""
        handler = continuation(details)
        return None if handler is None else _bounded(handler, details.method)


def _bounded(handler: Any, method: str) -> Any:
    arrives, leaves = (
        "stream" if many else "unary" for many in (handler.request_streaming, handler.response_streaming)
    )
    kind = f"{arrives}_{leaves}"
    behavior = getattr(handler, kind)

    def once(request: Any, context: grpc.ServicerContext) -> Any:
        with _boundary(context, method):
            return behavior(request, context)

    def stream(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        with _boundary(context, method):
            yield from behavior(request, context)

    make = getattr(grpc, f"{kind}_rpc_method_handler")
    wrapped = stream if handler.response_streaming else once
    return make(
        wrapped,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )


@contextmanager
def _boundary(context: grpc.ServicerContext, method: str) -> Iterator[None]:
    try:
        yield
    except grpc.RpcError:
        raise  # the client went away while it was sending
    except Error as error:
        refuse(context, error)
    except Exception:
        if not context.is_active():
            context.abort(grpc.StatusCode.CANCELLED, "cancelled")
        ticket = secrets.token_hex(4)
        _logger.exception("%s failed, ticket %s", method, ticket)
        context.abort(grpc.StatusCode.INTERNAL, f"internal error, ticket {ticket} in the server's log")


def _rebuilt(kind: type[Error], message: str, hint: str) -> Error:
    # Not every class is built from (message, hint), but each has them.
    error = kind.__new__(kind)
    Error.__init__(error, message, hint)
    return error


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _clean(text: str, limit: int) -> str:
    """Printable, and at most ``limit`` bytes: what a server says may land in a terminal."""
    printable = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[: limit + 1])
    raw = printable.encode("utf-8", "replace")
    return printable if len(raw) <= limit else raw[: limit - 3].decode("utf-8", "ignore") + "…"
