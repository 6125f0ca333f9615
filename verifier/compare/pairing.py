"""Two rows of verified bundles side by side: the positions at which their full logits can be compared.

What does not fit together raises, with one exception: where generation went two ways, decode positions were fed
different tokens from there on. Those are left out, and the pair says so.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fpforensics.common.errors import UsageError, did_you_mean, shorten
from fpforensics.common.evidence import Row, Tensor, TraceEntry
from fpforensics.common.manifest import phase_tensors
from fpforensics.common.signals import PHASES, Array, Forcing, Phase
from fpforensics.common.words import counted
from fpforensics.verifier.compare.result import DecodeSkipped
from fpforensics.verifier.intake import VerifiedBundle

_CAPTURE = "capture them: prover run --full-logits"


@dataclass(frozen=True)
class Side:
    """One row of a verified bundle; ``name`` is how messages call it, ``A`` or ``B``."""

    name: str
    bundle: VerifiedBundle
    row: Row

    def __str__(self) -> str:
        return f"{self.name} ({shorten(self.bundle.path.name)}, {shorten(self.row.config_id)})"

    def entry(self, reference_id: str) -> TraceEntry:
        """The manifest's entry of a reference; every row has one of each."""
        return next(entry for entry in self.row.traces if entry.reference_id == reference_id)


@dataclass(frozen=True)
class Part:
    """Logits to compare: the first ``len(positions)`` rows of each tensor lie at ``positions``."""

    phase: Phase
    positions: Array
    a: Tensor
    b: Tensor


@dataclass(frozen=True)
class PairedReference:
    """One reference's parts, at most one for each phase."""

    reference_id: str
    source: str
    prompt_tokens: int
    parts: tuple[Part, ...]
    decode_skipped: DecodeSkipped | None


@dataclass(frozen=True)
class Pair:
    """Two sides that fit together; only :func:`pair_rows` makes one."""

    a: Side
    b: Side
    vocab_size: int
    references: tuple[PairedReference, ...]

    def parts(self) -> list[Part]:
        """Every part of every reference."""
        return [part for reference in self.references for part in reference.parts]


def require_logits(name: str, bundle: VerifiedBundle) -> None:
    """Raise :class:`UsageError` where no row holds full logits: before anybody is asked which row is meant."""
    entries = (entry for row in bundle.evidence.rows for entry in row.traces)
    if not any("logits" in phase_tensors(entry, phase) for entry in entries for phase in PHASES):
        raise UsageError(f"{name} ({shorten(bundle.path.name)}) holds no full logits", _CAPTURE)


def choose_side(name: str, bundle: VerifiedBundle, row_id: str = "") -> Side:
    """The row ``row_id`` of ``bundle``, or its only one. Raises :class:`UsageError` that lists the rows."""
    rows = {row.config_id: row for row in bundle.evidence.rows}
    option = f"--row-{name.lower()}"
    if row_id:
        if row_id not in rows:
            raise UsageError(
                f"{option}: no row {shorten(row_id)!r} in {name} ({shorten(bundle.path.name)})", _meant(row_id, rows)
            )
        return Side(name, bundle, rows[row_id])
    if len(rows) > 1:
        listed = ", ".join(shorten(each) for each in list(rows)[:16]) + (" …" if len(rows) > 16 else "")
        raise UsageError(
            f"{name} ({shorten(bundle.path.name)}) has {len(rows)} rows: {listed}", f"choose one with {option}"
        )
    return Side(name, bundle, next(iter(rows.values())))


def _meant(row_id: str, rows: Iterable[str]) -> str:
    """A hint at the rows that say what was asked for and more, as a default config's id does; else at the nearest one."""
    holding = [repr(shorten(name, 120)) for name in rows if set(row_id.split(",")) <= set(name.split(","))]
    return f"did you mean {' or '.join(holding[:3])}?" if holding else shorten(did_you_mean(row_id, rows), 300)


def pair_rows(a: Side, b: Side) -> Pair:
    """Everything of the two sides that can be compared; reads token ids and positions only.

    Raises :class:`UsageError` where the vocabularies, references, prompts or captured positions differ, where a side
    has no full logits, or where no position is left.
    """
    sizes = a.row.facts.model.vocab_size, b.row.facts.model.vocab_size
    if sizes[0] != sizes[1]:
        raise UsageError(f"vocabularies differ: {sizes[0]} tokens in {a}, {sizes[1]} in {b}", "compare one model")
    ids_a, ids_b = ({entry.id for entry in side.bundle.evidence.references} for side in (a, b))
    for has, lacks, only in ((a, b, ids_a - ids_b), (b, a, ids_b - ids_a)):
        if only:
            raise UsageError(
                f"references differ: {has} has {shorten(min(only))!r}, {lacks} has not",
                "run both with the same --prompts, --references and --prompt-tokens",
            )
    references = tuple(_pair_reference(a, b, entry.id) for entry in a.bundle.evidence.references)
    pair = Pair(a, b, sizes[0], references)
    if not pair.parts():
        skipped = next((each.decode_skipped.reason for each in references if each.decode_skipped), "")
        raise UsageError(
            f"no position of {a} and {b} can be compared{': ' + skipped if skipped else ''}",
            "capture prompt positions too: --prefill-positions",
        )
    return pair


def _pair_reference(a: Side, b: Side, reference_id: str) -> PairedReference:
    ours, theirs = a.bundle.forcing(a.row, reference_id), b.bundle.forcing(b.row, reference_id)
    prompt = ours.reference.prompt_ids
    _require_same_prompt(prompt, theirs.reference.prompt_ids, f"{shorten(reference_id)}: prompts of {a} and {b}")
    limit = len(prompt) + _fed_alike(ours.output_ids, theirs.output_ids)
    parts: list[Part] = []
    for phase in PHASES:
        at_a, at_b = (each.positions[phase] for each in (ours, theirs))
        if phase == "decode":
            at_a, at_b = at_a[at_a < limit], at_b[at_b < limit]
        if not np.array_equal(at_a, at_b):
            raise UsageError(
                f"{shorten(reference_id)}, {phase}: captured positions differ, {_span(at_a)} in {a}, {_span(at_b)} in {b}",
                "capture both with the same --prefill-positions, and --decode-positions 0 (all)",
            )
        if len(at_a):
            logits = (_logits(side, reference_id, phase) for side in (a, b))
            parts.append(Part(phase, at_a, *logits))
    return PairedReference(
        reference_id, ours.reference.source, len(prompt), tuple(parts), _skipped(ours, theirs, limit, len(prompt))
    )


def _require_same_prompt(ours: Array, theirs: Array, what: str) -> None:
    hint = "run both with the same model, --prompts, --prompt-tokens and --instruction"
    if len(ours) != len(theirs):
        raise UsageError(f"{what} have {len(ours)} and {len(theirs)} tokens", hint)
    differing = np.flatnonzero(ours != theirs)
    if len(differing):
        at = int(differing[0])
        raise UsageError(f"{what} differ at token {at}: {ours[at]} and {theirs[at]}", hint)


def _fed_alike(ours: NDArray[np.int32], theirs: NDArray[np.int32]) -> int:
    """How many output tokens were fed on both sides, and the same; the last token of an output is never fed."""
    fed = min(len(ours), len(theirs)) - 1
    differing = np.flatnonzero(ours[:fed] != theirs[:fed])
    return int(differing[0]) if len(differing) else fed


def _skipped(ours: Forcing, theirs: Forcing, limit: int, prompt: int) -> DecodeSkipped | None:
    beyond = [int((each.positions["decode"] >= limit).sum()) for each in (ours, theirs)]
    if not any(beyond):
        return None
    step = limit - prompt
    lengths = len(ours.output_ids), len(theirs.output_ids)
    if step < min(lengths) - 1:
        reason = (
            f"the outputs differ from token {step} on: {ours.output_ids[step]} in A, {theirs.output_ids[step]} in B"
        )
    else:
        reason = f"the outputs have {counted(lengths[0], 'token')} in A and {lengths[1]} in B"
    return DecodeSkipped(first=limit, positions_a=beyond[0], positions_b=beyond[1], reason=reason)


def _logits(side: Side, reference_id: str, phase: Phase) -> Tensor:
    tensor = phase_tensors(side.entry(reference_id), phase).get("logits")
    if tensor is None:
        raise UsageError(f"{side} holds no full logits ({shorten(reference_id)}, {phase})", _CAPTURE)
    return tensor


def _span(positions: Array) -> str:
    return f"{len(positions)} from {positions[0]} to {positions[-1]}" if len(positions) else "none"
