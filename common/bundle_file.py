"""An open bundle file: its envelope and where its blobs lie. Nothing in here has been verified.

Blobs are read with positioned reads into memory of ours, never mapped: a file that someone cuts short under
us must be an error, not a crash, and what was hashed must be what is used.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import msgspec

from fpforensics.common.envelope import (
    MAX_KEYID,
    MAX_PAYLOAD_TYPE,
    SIGNATURE_BYTES,
    Envelope,
    Signature,
)
from fpforensics.common.errors import EvidenceError, UsageError, shorten
from fpforensics.common.frame import DIGEST_BYTES, FORMAT, MAX_BLOB_BYTES, Walker, blob_header
from fpforensics.common.strict import Limits

_WINDOW_BYTES = 512


class Blob(NamedTuple):
    """Where a blob lies in the file: the SHA-256 that it claims (hex), offset and length in bytes."""

    sha256: str
    offset: int
    length: int


class BundleFile:
    """An open bundle file whose envelope has been read and of which *nothing* has been verified.

    Use :func:`fpforensics.verifier.intake.open_bundle` for evidence that may be relied on.
    """

    def __init__(self, path: Path, limits: Limits | None = None) -> None:
        self.path = path
        self.name = f"bundle {shorten(path.name)}"
        self.limits = limits or Limits()
        self._window, self._window_at = b"", 0
        self._fd, self.size = _open(path, self.name)
        try:
            if self.size == 0:
                raise EvidenceError(f"{self.name} is empty", "write or fetch it again")
            if self.size > self.limits.file_bytes:
                raise EvidenceError(f"{self.name} has {self.size} bytes", f"at most {self.limits.file_bytes}")
            self.envelope, self._blobs_at, self.blob_count = self._walk_head()
        except BaseException:
            self.close()
            raise

    def blobs(self) -> Iterator[Blob]:
        """Each blob in the order of the file, its bytes untouched. The last one must end the file."""
        at = self._blobs_at
        for index in range(self.blob_count):
            walker = Walker(self.name, self.size, self._bytes, at)
            digest = walker.binary(DIGEST_BYTES, f"the digest of blob {index + 1} of {self.blob_count}").hex()
            length = walker.bytes_ahead(MAX_BLOB_BYTES, f"blob {digest[:16]}…")
            yield Blob(digest, walker.at, length)
            at = walker.at + length
        if at != self.size:
            raise EvidenceError(f"{self.name} has {self.size - at} bytes after its end", "fetch it again")

    def match(self, sizes: Mapping[str, int]) -> dict[str, Blob]:
        """The blobs by digest, if they are exactly those of a manifest: these lengths, this order, no other."""
        found: dict[str, Blob] = {}
        at = self._blobs_at
        for sha256, length in sizes.items():
            # What the one canonical encoding must have here; to say what is there instead takes a walk.
            header = blob_header(bytes.fromhex(sha256), length)
            end = at + len(header) + length
            if end > self.size or self._bytes(at, len(header)) != header:
                raise self._mismatch(sizes)
            found[sha256] = Blob(sha256, at + len(header), length)
            at = end
        if at != self.size or self.blob_count != len(sizes):
            raise self._mismatch(sizes)
        return found

    def _mismatch(self, sizes: Mapping[str, int]) -> EvidenceError:
        """Why the blobs in the file are not those of its manifest; raises itself where the frame is at fault."""
        found: set[str] = set()
        for blob in self.blobs():
            name = f"blob {blob.sha256[:16]}… of {self.name}"
            if blob.sha256 in found:
                return EvidenceError(f"{name} is there twice", "each blob is stored once")
            if blob.sha256 not in sizes:
                return EvidenceError(f"{name} is not in its manifest", "only what is signed may be in a bundle")
            if blob.length != sizes[blob.sha256]:
                return EvidenceError(f"{name} has {blob.length} bytes", f"its shape needs {sizes[blob.sha256]}")
            found.add(blob.sha256)
        for digest in sizes:
            if digest not in found:
                return EvidenceError(f"blob {digest[:16]}… is missing from {self.name}", "fetch it again")
        return EvidenceError(f"{self.name} has its blobs in another order than its manifest", "write it again")

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` (of bytes) from ``offset``, or raise: the file may be shorter by now."""
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._fd, [buffer[done:]], offset + done)
            except OSError as error:
                raise EvidenceError(f"{self.name} cannot be read: {error.strerror}", "check the disk") from None
            if count == 0:
                raise EvidenceError(f"{self.name} was cut short while it was read", "fetch it again")
            done += count

    def close(self) -> None:
        """Close the file; more than once does no harm."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> BundleFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _walk_head(self) -> tuple[Envelope, int, int]:
        walker = Walker(self.name, self.size, self._bytes)
        walker.map(3, "a bundle")
        walker.key("format")
        found = walker.text(MAX_PAYLOAD_TYPE, "the format")
        if found != FORMAT:
            raise EvidenceError(f"{self.name} is of format {shorten(found)!r}", f"this version reads {FORMAT}")
        walker.key("envelope")
        start = walker.at
        walker.map(3, "the envelope")
        walker.key("payloadType")
        payload_type = walker.text(MAX_PAYLOAD_TYPE, "the payload type")
        walker.key("payload")
        payload = walker.binary(self.limits.manifest_bytes, "the manifest")
        walker.key("signatures")
        count = walker.byte("the signatures") ^ 0x90
        if count != 1:
            raise EvidenceError(
                f"{self.name} has {count if count < 16 else 'no list of'} signatures",
                "exactly one is expected",
            )
        walker.map(2, "the signature")
        walker.key("keyid")
        keyid = walker.text(MAX_KEYID, "the keyid")
        walker.key("sig")
        envelope = Envelope(payload_type, payload, (Signature(keyid, walker.binary(SIGNATURE_BYTES, "the signature")),))
        encoded = msgspec.msgpack.encode(envelope)
        if walker.at - start != len(encoded) or self._bytes(start, len(encoded)) != encoded:
            raise EvidenceError(f"{self.name} has an envelope that is not canonically encoded", "write it again")
        walker.key("blobs")
        blobs = walker.count(self.limits.tensors, "blobs")
        return envelope, walker.at, blobs

    def _bytes(self, offset: int, length: int) -> bytes:
        """A frame is read in many small pieces: from a window where it can be, so that a blob costs one system call."""
        start = offset - self._window_at
        if not 0 <= start <= len(self._window) - length:
            buffer = bytearray(max(length, min(_WINDOW_BYTES, self.size - offset)))
            self.read_into(memoryview(buffer), offset)
            if length > _WINDOW_BYTES:
                return bytes(buffer)
            self._window, self._window_at, start = bytes(buffer), offset, 0
        return self._window[start : start + length]


def _open(path: Path, name: str) -> tuple[int, int]:
    try:
        # Without O_NONBLOCK a named pipe in a bundle's place would hold us forever.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise UsageError(f"{name} does not exist", f"looked for {path}") from None
    except OSError as error:
        raise UsageError(f"{name} cannot be opened: {error.strerror}", f"looked for {path}") from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise UsageError(f"{name} is not a file", f"looked for {path}")
    return descriptor, status.st_size
