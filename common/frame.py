"""The bytes around a bundle's contents: a MessagePack map in its one canonical encoding.

``{"format": …, "envelope": {…}, "blobs": {digest: data, …}}``; any MessagePack library reads it. Our own
walker does not parse, it expects: at each place only one encoding is right, so duplicate keys, other orders,
padded lengths and nesting have nowhere to hide, and no size that a file claims is believed beyond what the
file holds.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import msgspec

from fpforensics.common.envelope import Envelope
from fpforensics.common.errors import EvidenceError, shorten

FORMAT = "fpforensics-bundle/1"
DIGEST_BYTES = 32
MAX_BLOB_BYTES = (1 << 32) - 1  # bin 32
MAX_KEY = 32

_LENGTHS = {1: ">B", 2: ">H", 4: ">I"}


def _text(value: str) -> bytes:
    return msgspec.msgpack.encode(value)


_PREFIX = b"\x83" + _text("format") + _text(FORMAT) + _text("envelope")


def head(envelope: Envelope, blobs: int) -> bytes:
    """Everything before the first of ``blobs`` blobs."""
    return _PREFIX + msgspec.msgpack.encode(envelope) + _text("blobs") + _map_header(blobs)


def blob_header(sha256: bytes, length: int) -> bytes:
    """What precedes a blob's ``length`` bytes: its 32-byte digest as the key, then the header of its data."""
    return _bin_header(DIGEST_BYTES) + sha256 + _bin_header(length)


def _map_header(count: int) -> bytes:
    if count < 16:
        return bytes([0x80 | count])
    return b"\xde" + struct.pack(">H", count) if count < 1 << 16 else b"\xdf" + struct.pack(">I", count)


def _bin_header(length: int) -> bytes:
    if length < 1 << 8:
        return bytes([0xC4, length])
    return b"\xc5" + struct.pack(">H", length) if length < 1 << 16 else b"\xc6" + struct.pack(">I", length)


class Walker:
    """Reads a frame forwards, a few bytes at a time, from ``size`` bytes that ``read(offset, length)`` gives.

    ``name`` is the file's, ``at`` the offset of what comes next. Whatever else is found than what a method
    expects is an :class:`EvidenceError` that names ``what``.
    """

    def __init__(self, name: str, size: int, read: Callable[[int, int], bytes], at: int = 0) -> None:
        self.name = name
        self.size = size
        self.at = at
        self._read = read

    def require(self, length: int, what: str) -> None:
        """``length`` more bytes are there."""
        if length > self.size - self.at:
            raise EvidenceError(
                f"{self.name} is cut short: {what} needs {length} bytes at {self.at} of {self.size}",
                "fetch it again",
            )

    def take(self, length: int, what: str) -> bytes:
        """The next ``length`` bytes."""
        self.require(length, what)
        data = self._read(self.at, length)
        self.at += length
        return data

    def key(self, name: str) -> None:
        """The key ``name`` and no other."""
        start = self.at
        found = self.text(MAX_KEY, f"the key {name!r}")
        if found != name:
            raise EvidenceError(
                f"{self.name}: the key {name!r} belongs at {start}, found the key {shorten(found)!r}",
                "write it again",
            )

    def map(self, entries: int, what: str) -> None:
        """The header of a map of exactly ``entries``."""
        start = self.at
        code = self.byte(what)
        if code == 0x80 | entries:
            return
        if 0x80 <= code < 0x90:
            raise EvidenceError(f"{self.name}: {what} is a map of {code & 0x0F}", f"{entries} are expected")
        raise self._unexpected(code, start, what)

    def byte(self, what: str) -> int:
        """One byte."""
        return self.take(1, what)[0]

    def bytes_ahead(self, limit: int, what: str) -> int:
        """The header of bytes: how many follow, at most ``limit`` and all of them there."""
        length = self._length(0xC4, b"", what, limit)
        self.require(length, what)
        return length

    def _length(self, first: int, short: bytes, what: str, limit: int) -> int:
        """The length in a header: a code in ``short``, or ``first`` and the next two with 1, 2, 4 bytes."""
        start = self.at
        code = self.byte(what)
        if code in short:
            length, canonical = code - short[0], True
        elif first <= code < first + 3:
            width = 1 << (code - first)
            (length,) = struct.unpack(_LENGTHS[width], self.take(width, what))
            canonical = length >= max(len(short), 0 if width == 1 else 1 << (4 * width))
        else:
            raise EvidenceError(
                f"{self.name}: byte 0x{code:02x} at offset {start} does not begin {what}",
                "is it a bundle?",
            )
        if length > limit:
            raise EvidenceError(f"{self.name} claims {length} bytes for {what}", f"at most {limit}")
        if not canonical:
            raise EvidenceError(f"{self.name} encodes the length of {what} with padding", "write it again")
        return int(length)

    def binary(self, limit: int, what: str) -> bytes:
        """Bytes, at most ``limit``."""
        return self.take(self.bytes_ahead(limit, what), what)

    def text(self, limit: int, what: str) -> str:
        """A string of at most ``limit`` bytes."""
        data = self.take(self._length(0xD9, bytes(range(0xA0, 0xC0)), what, limit), what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise EvidenceError(f"{self.name}: {what} is not UTF-8", "fetch it again") from None

    def count(self, limit: int, what: str) -> int:
        """The number of entries in a map."""
        start = self.at
        code = self.byte(what)
        if 0x80 <= code < 0x90:
            count, lowest = code & 0x0F, 0
        elif code in (0xDE, 0xDF):
            width = 2 if code == 0xDE else 4
            (count,) = struct.unpack(_LENGTHS[width], self.take(width, what))
            lowest = 16 if width == 2 else 1 << 16
        else:
            raise self._unexpected(code, start, what)
        if count > limit:
            raise EvidenceError(f"{self.name} claims {count} {what}", f"at most {limit}")
        if count < lowest:
            raise EvidenceError(f"{self.name} encodes the number of {what} with padding", "write it again")
        return int(count)

    def _unexpected(self, code: int, start: int, what: str) -> EvidenceError:
        return EvidenceError(f"{self.name}: byte 0x{code:02x} at {start} does not begin {what}", "is it a bundle file?")
