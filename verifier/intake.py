"""Untrusted bundle files become a :class:`VerifiedBundle` here, and nowhere else.

``limits`` bound everything that a file claims before memory is given to it; blobs are read one at a time, so
that a bundle may be larger than memory. Whatever is wrong raises an :class:`EvidenceError` of one line.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from fpforensics.common.bundle import payload_digest
from fpforensics.common.bundle_file import Blob, BundleFile
from fpforensics.common.contents import WHOLE, check_elements
from fpforensics.common.envelope import verify
from fpforensics.common.errors import EvidenceError, NonceError, shorten
from fpforensics.common.evidence import PAYLOAD_TYPE, Evidence, Row, Tensor, TraceEntry
from fpforensics.common.keys import Keyring, PublicKey
from fpforensics.common.manifest import (
    Rule,
    Use,
    blob_sizes,
    decode_statement,
    output_use,
    phase_tensors,
    phase_use,
    prompt_use,
    shared_vocabulary,
    uses,
)
from fpforensics.common.rules import check_statement
from fpforensics.common.signals import DTYPES, PHASES, Array, Forcing, Phase, PhaseTrace, Reference, Trace
from fpforensics.common.strict import Limits

__all__ = ["Limits", "VerifiedBundle", "open_bundle"]

_CHUNK_BYTES = 1 << 18  # a multiple of every item size; small enough to stay in a core's cache
_TOKEN = object()

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


def open_bundle(
    path: Path, keyring: Keyring, *, expected_nonce: str | None = None, limits: Limits | None = None
) -> VerifiedBundle:
    """Verify the file at ``path`` up to its blobs, whose bytes are checked as they are used.

    Raises :class:`SignatureError` when no key in ``keyring`` signed it, :class:`NonceError` when it answers
    another challenge than ``expected_nonce`` (None: any), :class:`EvidenceError` for everything else that is
    wrong with it, and :class:`UsageError` when there is no such file.
    """
    # To trust a bundle we must:
    #  0. bound the file's size
    #  1. walk its frame: the one canonical encoding, a bounded envelope, no size believed beyond what is there
    #  2. check the payload's type
    #  3. check a trusted key's signature over the exact payload bytes (keyid is only a hint)
    #  4. parse those bytes strictly (bounded nesting and strings, no duplicate keys, no NaN) and check that what
    #     they say makes sense: counts, ids, shapes and dtypes, all within limits
    #  5. check that the file holds exactly the manifest's blobs, each with its length, and nothing after them
    #  6. check each blob's digest and elements as it is used (array, trace, ..., or all at once: verify_all)
    #  7. check that the nonce is the expected one, if there is one
    #
    # What remains the caller's: whether the claim holds; whether the model is the one that the verifier holds
    # (weights, vocabulary and sizes are the prover's words); whether the nonce or the bundle was seen before.
    limits = limits or Limits()
    file = BundleFile(path, limits)  # 0, 1
    try:
        payload, signer = verify(file.envelope, keyring, PAYLOAD_TYPE)  # 2, 3
        statement = decode_statement(payload, limits)  # 4
        check_statement(statement, limits)
        blobs = file.match(blob_sizes(statement.predicate))  # 5
        evidence = statement.predicate
        if expected_nonce is not None and evidence.nonce != expected_nonce:  # 7
            raise NonceError(
                f"{file.name} answers nonce {shorten(evidence.nonce)!r}, not {shorten(expected_nonce)!r}",
                "ask the prover for a new session with this nonce",
            )
        return VerifiedBundle(_TOKEN, file, evidence, signer, payload_digest(payload), blobs)
    except BaseException:
        file.close()
        raise


class VerifiedBundle:
    """Evidence that a trusted key signed. Only :func:`open_bundle` makes one; use it in a ``with``.

    ``evidence`` is the manifest, ``signer`` the trusted key, ``digest`` (``sha256:<hex>`` of the signed
    bytes) the bundle's name. Arrays are read on demand and come back read-only; each is checked against its
    digest and its rule every time.
    """

    def __init__(
        self,
        token: object,
        file: BundleFile,
        evidence: Evidence,
        signer: PublicKey,
        digest: str,
        blobs: Mapping[str, Blob],
    ) -> None:
        if token is not _TOKEN:
            raise TypeError("a VerifiedBundle comes from open_bundle only")
        self.evidence = evidence
        self.signer = signer
        self.digest = digest
        self.path = file.path
        self.size = file.size
        self._file = file
        self._blobs = blobs
        self._prompts = {one.id: one for one in evidence.references}
        self._vocabulary = shared_vocabulary(evidence)

    def array(self, tensor: Tensor) -> Array:
        """The array that ``tensor`` names: its digest fits, and floats are finite."""
        array = self._load(tensor)
        if array.dtype.kind != "i":
            check_elements(array, Rule("floats"), f"blob {tensor.sha256[:16]}…")
        return array

    def reference(self, reference_id: str) -> Reference:
        """One reference; its token ids lie in the vocabulary."""
        entry = self._prompts.get(reference_id)
        if entry is None:
            raise EvidenceError(
                f"no reference {shorten(reference_id)!r} in {self._file.name}", f"it has {len(self._prompts)}"
            )
        return Reference(entry.id, self._checked(prompt_use(entry, self._vocabulary)), entry.source)

    def references(self) -> list[Reference]:
        """Every reference, in the bundle's order."""
        return [self.reference(reference_id) for reference_id in self._prompts]

    def trace(self, row: Row, reference_id: str) -> Trace:
        """The trace of one reference in ``row``, every array checked."""
        entry = self._entry(row, reference_id)
        prefill, decode = (
            PhaseTrace.from_tensors(
                {name: self._phase_array(row, entry, phase, name) for name in phase_tensors(entry, phase)}
            )
            for phase in PHASES
        )
        return Trace(reference_id, self._checked(output_use(row, entry)), prefill, decode)

    def forcing(self, row: Row, reference_id: str) -> Forcing:
        """What a replay of one reference in ``row`` must feed and report."""
        entry = self._entry(row, reference_id)
        return Forcing(
            self.reference(reference_id),
            self._checked(output_use(row, entry)),
            positions={phase: self._phase_array(row, entry, phase, "positions") for phase in PHASES},
            claimed_ids={phase: self._phase_array(row, entry, phase, "logprob_ids") for phase in PHASES},
        )

    def verify_digests(self, progress: Progress | None = None) -> None:
        """Check every blob's digest: the file is whole and as it was signed. Memory holds a small buffer."""
        self._verify([(blob, []) for blob in self._blobs.values()], progress)

    def verify_all(self, progress: Progress | None = None) -> None:
        """Check every blob's digest and elements, each byte read once: nothing in the bundle can fail later."""
        wanted: dict[str, dict[tuple[object, ...], Use]] = {digest: {} for digest in self._blobs}
        for use in uses(self.evidence):
            shape = use.tensor.shape if use.rule.kind == "top_ids" else ()
            wanted[use.tensor.sha256].setdefault((use.rule, use.tensor.dtype, shape), use)
        self._verify([(self._blobs[sha256], list(found.values())) for sha256, found in wanted.items()], progress)

    def close(self) -> None:
        """Close the file; more than once does no harm."""
        self._file.close()

    def __enter__(self) -> VerifiedBundle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _entry(self, row: Row, reference_id: str) -> TraceEntry:
        for entry in row.traces:
            if entry.reference_id == reference_id:
                return entry
        raise EvidenceError(
            f"row {shorten(row.config_id)} has no trace of {shorten(reference_id)!r}",
            f"it has {len(row.traces)}",
        )

    def _phase_array(self, row: Row, entry: TraceEntry, phase: Phase, name: str) -> Array:
        prompt = self._prompts[entry.reference_id].prompt_ids.shape[0]
        return self._checked(phase_use(row, entry, phase, name, prompt))

    def _checked(self, use: Use) -> Array:
        array = self._load(use.tensor)
        check_elements(array, use.rule, use.where)
        return array

    def _load(self, tensor: Tensor) -> Array:
        blob = self._blobs.get(tensor.sha256)
        if blob is None:
            raise EvidenceError(f"no blob {shorten(tensor.sha256)} in {self._file.name}", "ask for one of its tensors")
        array = np.empty(tensor.shape, DTYPES[tensor.dtype])
        if array.nbytes != blob.length:
            raise EvidenceError(f"blob {blob.sha256[:16]}… has {blob.length} bytes, not {array.nbytes}", "wrong shape")
        raw = array.reshape(-1).view(np.uint8).data
        digest = hashlib.sha256()
        for start in range(0, blob.length, _CHUNK_BYTES):  # hashed while it is still in the cache
            piece = raw[start : start + _CHUNK_BYTES]
            self._file.read_into(piece, blob.offset + start)
            digest.update(piece)
        self._check_digest(digest.hexdigest(), blob)
        array.flags.writeable = False
        return array

    def _verify(self, work: Sequence[tuple[Blob, list[Use]]], progress: Progress | None) -> None:
        buffer = np.empty(_CHUNK_BYTES, np.uint8)
        done, total = 0, sum(blob.length for blob, _ in work)
        for blob, mentions in work:
            if any(use.rule.kind in WHOLE for use in mentions):
                raw = self._load(mentions[0].tensor).reshape(-1).view(np.uint8)
                for use in mentions:
                    array = raw.view(DTYPES[use.tensor.dtype]).reshape(use.tensor.shape)
                    check_elements(array, use.rule, use.where)
            else:
                self._stream(blob, mentions, buffer)
            done += blob.length
            if progress:
                progress(done, total)

    def _stream(self, blob: Blob, mentions: list[Use], buffer: Array) -> None:
        digest = hashlib.sha256()
        problem: EvidenceError | None = None
        for start in range(0, blob.length, _CHUNK_BYTES):
            piece = buffer[: min(_CHUNK_BYTES, blob.length - start)]
            self._file.read_into(piece.data, blob.offset + start)
            digest.update(piece.data)
            for use in mentions if problem is None else ():
                array = piece.view(DTYPES[use.tensor.dtype])
                try:
                    check_elements(array, use.rule, use.where, start // array.itemsize)
                except EvidenceError as error:
                    problem = error
        self._check_digest(digest.hexdigest(), blob)
        if problem:  # only now is it known to be the signer's doing, not damage
            raise problem

    def _check_digest(self, found: str, blob: Blob) -> None:
        if found != blob.sha256:
            raise EvidenceError(
                f"blob {blob.sha256[:16]}… in {self._file.name} was changed: its digest differs",
                "fetch it again",
            )
