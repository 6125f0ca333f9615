"""What a bundle file says of itself, for people and scripts; needs neither torch nor a key.

This path *reads* evidence and never vouches for it: what it returns cannot be mistaken for, or turned into, a
``VerifiedBundle``. Without a keyring nothing about the signature is known, and the summary says so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import msgspec

from fpforensics.common.bundle import payload_digest
from fpforensics.common.bundle_file import BundleFile
from fpforensics.common.config import ExecutionConfig
from fpforensics.common.engines.base import EngineFacts
from fpforensics.common.envelope import check_form, verify
from fpforensics.common.environment import Environment
from fpforensics.common.errors import EvidenceError, SignatureError, shorten
from fpforensics.common.evidence import PAYLOAD_TYPE, Evidence, Repetitions, Row
from fpforensics.common.frame import FORMAT
from fpforensics.common.inspect_text import render_text
from fpforensics.common.keys import Keyring
from fpforensics.common.manifest import blob_sizes, decode_statement, phase_tensors
from fpforensics.common.rules import check_statement
from fpforensics.common.signals import PHASES, CapturePlan, Phase, Sampling
from fpforensics.common.strict import Limits

__all__ = ["BundleSummary", "render_json", "render_text", "summarize"]

SignatureState = Literal["not checked", "trusted", "not trusted"]
_CHUNK_BYTES = 1 << 20


class SignatureSummary(msgspec.Struct, frozen=True, kw_only=True):
    """``keyid`` is the signer's when ``trusted``, otherwise only what the file says; ``problem`` is empty if
    trusted.
    """

    state: SignatureState
    keyid: str
    problem: str


class BlobSummary(msgspec.Struct, frozen=True, kw_only=True):
    """The blobs that the manifest names. ``intact`` is None where ``header_only`` left them alone."""

    count: int
    bytes: int
    intact: bool | None
    problem: str


class ReferenceSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt, and how many tokens each row generated for it."""

    id: str
    source: str
    prompt_tokens: int
    output_tokens: tuple[int, ...]


class SignalSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One signal of one phase; ``positions`` are the fewest and the most of any trace."""

    phase: Phase
    signal: str
    layers: tuple[str, ...]
    dtypes: tuple[str, ...]
    positions: tuple[int, int]


class RowSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One row: what was asked for, what ran, how often, and what was captured."""

    config_id: str
    config: ExecutionConfig
    facts: EngineFacts
    repetitions: Repetitions
    signals: tuple[SignalSummary, ...]


class BundleSummary(msgspec.Struct, frozen=True, kw_only=True):
    """Everything ``inspect`` shows: the file's own words unless the signature is trusted."""

    file: str
    file_bytes: int
    format: str
    digest: str
    signature: SignatureSummary
    manifest_bytes: int
    blobs: BlobSummary
    created_at: str
    session_id: str
    nonce: str
    tool_version: str
    environment: Environment
    capture: CapturePlan
    sampling: Sampling
    references: tuple[ReferenceSummary, ...]
    rows: tuple[RowSummary, ...]


def summarize(
    path: Path, keyring: Keyring | None = None, header_only: bool = False, limits: Limits | None = None
) -> BundleSummary:
    """Read the bundle at ``path``, everything bounded as in the intake.

    With ``keyring`` the signature is checked, and what is wrong with it reported, not raised. Unless
    ``header_only``, every blob is hashed. Raises :class:`EvidenceError` for a file that cannot be read as a
    bundle at all: with ``keyring``, as a :class:`SignatureError` where no trusted key signed it.
    """
    limits = limits or Limits()
    with BundleFile(path, limits) as file:
        check_form(file.envelope, PAYLOAD_TYPE)
        try:
            statement = decode_statement(file.envelope.payload, limits)
            check_statement(statement, limits)
        except EvidenceError:
            if keyring is not None:
                verify(file.envelope, keyring, PAYLOAD_TYPE)
            raise
        evidence = statement.predicate
        sizes = blob_sizes(evidence)
        return BundleSummary(
            file=shorten(str(path), 256),
            file_bytes=file.size,
            format=FORMAT,
            digest=payload_digest(file.envelope.payload),
            signature=_signature(file, keyring),
            manifest_bytes=len(file.envelope.payload),
            blobs=_blobs(file, sizes, header_only),
            created_at=evidence.created_at,
            session_id=evidence.session_id,
            nonce=evidence.nonce,
            tool_version=evidence.tool_version,
            environment=evidence.environment,
            capture=evidence.capture,
            sampling=evidence.sampling,
            references=_references(evidence),
            rows=tuple(_row(row) for row in evidence.rows),
        )


def render_json(summary: BundleSummary) -> str:
    """The summary as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(summary), indent=2).decode()


def _signature(file: BundleFile, keyring: Keyring | None) -> SignatureSummary:
    (signature,) = file.envelope.signatures
    named = shorten(signature.keyid, 64)
    if keyring is None:
        return SignatureSummary(state="not checked", keyid=named, problem="signature NOT checked: no key given")
    try:
        _, signer = verify(file.envelope, keyring, PAYLOAD_TYPE)
    except SignatureError as error:
        return SignatureSummary(state="not trusted", keyid=named, problem=error.diagnostics())
    return SignatureSummary(state="trusted", keyid=signer.keyid, problem="")


def _blobs(file: BundleFile, sizes: Mapping[str, int], header_only: bool) -> BlobSummary:
    count, total = len(sizes), sum(sizes.values())
    if header_only:
        return BlobSummary(count=count, bytes=total, intact=None, problem="")
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    try:
        for blob in file.match(sizes).values():
            digest = hashlib.sha256()
            for start in range(0, blob.length, _CHUNK_BYTES):
                piece = buffer[: min(_CHUNK_BYTES, blob.length - start)]
                file.read_into(piece, blob.offset + start)
                digest.update(piece)
            if digest.hexdigest() != blob.sha256:
                raise EvidenceError(f"blob {blob.sha256[:16]}… was changed: its digest differs", "fetch it again")
    except EvidenceError as error:
        return BlobSummary(count=count, bytes=total, intact=False, problem=error.diagnostics())
    return BlobSummary(count=count, bytes=total, intact=True, problem="")


def _references(evidence: Evidence) -> tuple[ReferenceSummary, ...]:
    outputs: dict[str, list[int]] = {reference.id: [] for reference in evidence.references}
    for row in evidence.rows:
        for trace in row.traces:
            outputs[trace.reference_id].append(trace.output_ids.shape[0])
    return tuple(
        ReferenceSummary(
            id=reference.id,
            source=reference.source,
            prompt_tokens=reference.prompt_ids.shape[0],
            output_tokens=tuple(outputs[reference.id]),
        )
        for reference in evidence.references
    )


def _row(row: Row) -> RowSummary:
    return RowSummary(
        config_id=row.config_id,
        config=row.config,
        facts=row.facts,
        repetitions=row.repetitions,
        signals=tuple(_signals(row)),
    )


def _signals(row: Row) -> Iterator[SignalSummary]:
    for phase in PHASES:
        found: dict[str, dict[str, set[str]]] = {}  # signal -> layer -> dtypes
        positions: list[int] = []
        for trace in row.traces:
            named = phase_tensors(trace, phase)
            positions.append(named["positions"].shape[0])
            for name, tensor in named.items():
                signal, _, layer = name.partition("/")
                found.setdefault(signal, {}).setdefault(layer, set()).add(tensor.dtype)
        for signal in ("logprobs", "key_vectors", "hidden_states", "logits"):
            if layers := found.get(signal):
                yield SignalSummary(
                    phase=phase,
                    signal=signal,
                    layers=tuple(sorted(filter(None, layers), key=lambda layer: (not layer.isdigit(), layer.zfill(8)))),
                    dtypes=tuple(sorted(set().union(*layers.values()))),
                    positions=(min(positions), max(positions)),
                )
