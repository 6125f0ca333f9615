"""What an engine's worker and its parent say to each other: length-prefixed msgpack of tagged structs, never
pickle.

A frame is 8 bytes, big-endian, the length of the body, then the body. Arrays travel as (dtype name, shape,
raw bytes).
"""

from __future__ import annotations

import socket
import struct
from typing import Any

import msgspec
import numpy as np

from fpforensics.common import errors
from fpforensics.common.config import ExecutionConfig
from fpforensics.common.engines.base import EngineFacts, Host, ReplayMode
from fpforensics.common.errors import Error, ReplayError
from fpforensics.common.signals import (
    DTYPES,
    Array,
    CapturePlan,
    Forcing,
    Reference,
    Sampling,
    Trace,
    dtype_name,
)

MAX_FRAME = 16 << 30
_PREFIX = struct.Struct(">Q")


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """Base of every message."""


class Load(_Message, frozen=True):
    """Load this config; answered by ``Loaded``."""

    config: ExecutionConfig
    host: Host


class Generate(_Message, frozen=True):
    """Answered by ``Progressed`` any number of times, then ``Traces``."""

    references: list[Reference]
    sampling: Sampling
    capture: CapturePlan


class TeacherForce(_Message, frozen=True):
    """Answered by ``Progressed`` any number of times, then ``Traces``."""

    forcings: list[Forcing]
    capture: CapturePlan
    mode: ReplayMode


class GetFacts(_Message, frozen=True):
    """Answered by ``Facts``."""


class Close(_Message, frozen=True):
    """Close the engine and end; answered by nothing but the end of the process."""


class Loaded(_Message, frozen=True):
    """The model is ready; ``config`` has its weights digest filled in."""

    config: ExecutionConfig


class Progressed(_Message, frozen=True):
    """So many references are done."""

    done: int
    total: int


class Traces(_Message, frozen=True):
    """The result of ``Generate`` and ``TeacherForce``."""

    traces: list[Trace]


class Facts(_Message, frozen=True):
    """The result of ``GetFacts``."""

    facts: EngineFacts


class Failed(_Message, frozen=True):
    """An error of ours, by the name of its class."""

    kind: str
    message: str
    hint: str

    @classmethod
    def of(cls, error: Error) -> Failed:
        """The message that :meth:`error` turns back into ``error``."""
        return cls(type(error).__name__, error.message, error.hint)

    def error(self) -> Error:
        """The same error on this side; a class that we do not know becomes :class:`ReplayError`."""
        known = getattr(errors, self.kind, ReplayError)
        kind = known if isinstance(known, type) and issubclass(known, Error) else ReplayError
        error = kind.__new__(kind)
        Error.__init__(error, self.message, self.hint)
        return error


Request = Load | Generate | TeacherForce | GetFacts | Close
Reply = Loaded | Progressed | Traces | Facts | Failed


class _Blob(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    dtype: str
    shape: tuple[int, ...]
    data: bytes


def to_blob(value: Any) -> _Blob:
    """msgspec's ``enc_hook`` for arrays."""
    if not isinstance(value, np.ndarray):
        raise NotImplementedError(f"cannot send {type(value)}")
    return _Blob(dtype_name(value), value.shape, np.ascontiguousarray(value).tobytes())


def from_blob(kind: Any, value: Any) -> Array:
    """msgspec's ``dec_hook`` for arrays."""
    if getattr(kind, "__origin__", kind) is not np.ndarray:
        raise NotImplementedError(f"cannot receive {kind}")
    blob = msgspec.convert(value, _Blob)
    if blob.dtype not in DTYPES:
        raise ValueError(f"unknown array dtype {blob.dtype!r}")
    return np.frombuffer(blob.data, DTYPES[blob.dtype]).reshape(blob.shape)


_encoder = msgspec.msgpack.Encoder(enc_hook=to_blob)
_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request, dec_hook=from_blob)
_replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply, dec_hook=from_blob)


def send(channel: socket.socket, message: Request | Reply) -> None:
    """Write one message. Raises :class:`OSError` if the other side is gone."""
    body = _encoder.encode(message)
    channel.sendall(_PREFIX.pack(len(body)))
    channel.sendall(body)


def receive_request(channel: socket.socket) -> Request | None:
    """The worker's side: the next request, or None at the end of the stream."""
    body = _read_frame(channel)
    return None if body is None else _requests.decode(body)


def receive_reply(channel: socket.socket) -> Reply | None:
    """The parent's side: the next reply, or None at the end of the stream."""
    body = _read_frame(channel)
    return None if body is None else _replies.decode(body)


def _read_frame(channel: socket.socket) -> bytearray | None:
    prefix = _read_exactly(channel, _PREFIX.size)
    if prefix is None:
        return None
    (length,) = _PREFIX.unpack(prefix)
    if length > MAX_FRAME:
        raise ReplayError(f"an engine message of {length} bytes", f"at most {MAX_FRAME}: capture fewer positions")
    return _read_exactly(channel, length)


def _read_exactly(channel: socket.socket, count: int) -> bytearray | None:
    data = bytearray(count)
    view = memoryview(data)
    while view:
        try:
            got = channel.recv_into(view)
        except ConnectionResetError:
            return None
        if got == 0:
            return None
        view = view[got:]
    return data
