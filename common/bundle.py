"""Bundles are written here: arrays spooled as they come, then one signed file that appears at once.

What is written passes the verifier's own checks before it is signed. See ``docs/adr`` for the format.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np

from fpforensics.common.contents import is_finite
from fpforensics.common.envelope import sign
from fpforensics.common.errors import EvidenceError, UsageError, shorten
from fpforensics.common.evidence import PAYLOAD_TYPE, Evidence, ReferenceEntry, Tensor, TraceEntry
from fpforensics.common.frame import MAX_BLOB_BYTES, blob_header, head
from fpforensics.common.keys import PrivateKey
from fpforensics.common.manifest import blob_sizes, decode_statement, encode_statement, statement_of
from fpforensics.common.rules import check_statement
from fpforensics.common.signals import DTYPES, Array, Reference, Trace, dtype_name
from fpforensics.common.strict import Limits

_COPY_BYTES = 1 << 20
_MAX_SOURCE = 256


def payload_digest(payload: bytes) -> str:
    """What names a bundle: ``sha256:<hex>`` of its signed manifest, which in turn names every blob."""
    return f"sha256:{hashlib.sha256(payload).hexdigest()}"


class BundleWriter:
    """Collects arrays on disk, then writes them behind a signed manifest.

    Arrays are content addressed: one that was added before takes no space. Memory holds one array at a time.
    The file at ``path`` appears, or is replaced, atomically and synced in :meth:`finish`; on any failure
    nothing is left.
    """

    def __init__(self, path: Path, limits: Limits | None = None) -> None:
        self.path = path
        self.limits = limits or Limits()
        self._spooled: dict[str, tuple[int, int]] = {}  # digest -> offset of its header, bytes with header
        self._end = 0
        try:
            # Anonymous where the system can do it: not even a killed process leaves it behind.
            self._spool: IO[bytes] = tempfile.TemporaryFile(dir=path.parent, buffering=0)  # noqa: SIM115
        except OSError as error:
            raise UsageError(
                f"cannot write {path}: {error.strerror}", "choose an existing folder that you can write to"
            ) from None

    def add(self, array: Array) -> Tensor:
        """Store an array; the result names it in a manifest.

        Raises :class:`EvidenceError` for NaN or infinity, and :class:`Error` for a dtype that evidence cannot
        hold.
        """
        dtype = dtype_name(array)
        stored = np.ascontiguousarray(array, dtype=DTYPES[dtype]).reshape(array.shape)
        if stored.dtype.kind != "i" and not is_finite(stored):
            raise EvidenceError(
                f"array of shape {array.shape} holds NaN or infinity",
                "such numbers are no evidence: check the run",
            )
        data = stored.reshape(-1).view(np.uint8).data
        if len(data) > min(MAX_BLOB_BYTES, self.limits.elements * stored.itemsize):
            raise EvidenceError(f"array of shape {array.shape} is too large", f"at most {MAX_BLOB_BYTES} bytes")
        digest = hashlib.sha256(data)
        if digest.hexdigest() not in self._spooled:
            header = blob_header(digest.digest(), len(data))
            self._write(self._spool, (header, data))
            self._spooled[digest.hexdigest()] = (self._end, len(header) + len(data))
            self._end += len(header) + len(data)
        return Tensor(sha256=digest.hexdigest(), dtype=dtype, shape=array.shape)

    def add_reference(self, reference: Reference) -> ReferenceEntry:
        """Store a reference's prompt."""
        source = shorten(reference.source, _MAX_SOURCE)  # a file name may hold anything
        return ReferenceEntry(id=reference.id, source=source, prompt_ids=self.add(reference.prompt_ids))

    def add_trace(self, trace: Trace) -> TraceEntry:
        """Store a trace's arrays. Raises :class:`EvidenceError` that names the one which is not finite."""
        return TraceEntry(
            reference_id=trace.reference_id,
            output_ids=self.add(trace.output_ids),
            prefill=self._add_all(trace.prefill.tensors(), f"{trace.reference_id}, prefill"),
            decode=self._add_all(trace.decode.tensors(), f"{trace.reference_id}, decode"),
        )

    def finish(self, evidence: Evidence, key: PrivateKey) -> str:
        """Sign ``evidence``, whose tensors were all added; write the file; return :func:`payload_digest`.

        Raises :class:`EvidenceError` for a manifest that a verifier would refuse; then nothing is written.
        """
        payload = encode_statement(statement_of(evidence))
        # Read back as a verifier does, from the very bytes: nothing is signed that could not be accepted.
        statement = decode_statement(payload, self.limits)
        check_statement(statement, self.limits)
        order = list(blob_sizes(statement.predicate))
        for digest in order:
            if digest not in self._spooled:
                raise EvidenceError(f"blob {digest[:16]}… is in the manifest, but was never added", "add its array")
        beginning = head(sign(payload, PAYLOAD_TYPE, key), len(order))
        self._write_file(beginning, self._runs(order))
        return payload_digest(payload)

    def close(self) -> None:
        """Drop what was spooled; more than once does no harm."""
        self._spool.close()

    def __enter__(self) -> BundleWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _add_all(self, named: Mapping[str, Array], where: str) -> dict[str, Tensor]:
        added: dict[str, Tensor] = {}
        for name, array in named.items():
            try:
                added[name] = self.add(array)
            except EvidenceError as error:
                raise EvidenceError(f"{where}, {name}: {error.message}", error.hint) from None
        return added

    def _runs(self, order: Iterable[str]) -> list[tuple[int, int]]:
        """The spooled blobs in ``order`` as (start, end) in the spool, neighbours joined."""
        runs: list[tuple[int, int]] = []
        for digest in order:
            start, length = self._spooled[digest]
            if runs and runs[-1][1] == start:
                runs[-1] = (runs[-1][0], start + length)
            else:
                runs.append((start, start + length))
        return runs

    def _copied(self, runs: Iterable[tuple[int, int]]) -> Iterator[bytes]:
        for start, end in runs:
            self._spool.seek(start)
            while start < end:
                chunk = self._spool.read(min(_COPY_BYTES, end - start))
                if not chunk:
                    raise UsageError(f"the temporary file beside {self.path} was cut short", "run it again")
                yield chunk
                start += len(chunk)

    def _write_file(self, beginning: bytes, runs: Iterable[tuple[int, int]]) -> None:
        temporary = self.path.with_name(f".{self.path.name}.{secrets.token_hex(8)}.tmp")
        try:
            with temporary.open("xb", buffering=0) as file:
                self._write(file, [beginning])
                for chunk in self._copied(runs):
                    self._write(file, [chunk])
                os.fsync(file.fileno())
            temporary.replace(self.path)
        except BaseException as error:
            with suppress(OSError):
                temporary.unlink()
            if isinstance(error, OSError):
                raise self._failed(error) from None
            raise
        with suppress(OSError):  # some file systems cannot sync a folder
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def _write(self, file: IO[bytes], parts: Iterable[bytes | memoryview]) -> None:
        try:
            for part in parts:
                left = memoryview(part)
                while left:
                    left = left[file.write(left) :]
        except OSError as error:
            raise self._failed(error) from None

    def _failed(self, error: OSError) -> UsageError:
        return UsageError(f"cannot write {self.path}: {error.strerror}", "free space or choose another folder")
