"""The manifest as bytes and as a list of tensors: what it mentions, in which order, and what each must hold.

Its own rules are in :mod:`fpforensics.common.rules`, those on the blobs' elements in
:mod:`fpforensics.common.contents`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Literal, NamedTuple

import msgspec

from fpforensics.common.config import as_written
from fpforensics.common.errors import EvidenceError, shorten
from fpforensics.common.evidence import (
    EVIDENCE_TYPE,
    STATEMENT_TYPE,
    Evidence,
    EvidenceStatement,
    ReferenceEntry,
    Row,
    Subject,
    Tensor,
    TraceEntry,
)
from fpforensics.common.signals import DTYPES, PHASES, Phase
from fpforensics.common.strict import Limits, convert, parse_json


class Rule(NamedTuple):
    """What every element of a tensor must be; ``low`` and ``high`` bound integers, both inclusive."""

    kind: Literal["ids", "top_ids", "positions", "logprobs", "floats"]
    low: int = 0
    high: int = 0


class Use(NamedTuple):
    """One mention of a tensor in the manifest: where, and what it must hold there."""

    tensor: Tensor
    where: str
    rule: Rule


def encode_statement(statement: EvidenceStatement) -> bytes:
    """The manifest's bytes. What an earlier version could say is written in the same bytes as it did."""
    value = msgspec.to_builtins(statement)
    for row in value["predicate"]["rows"]:
        row["config"] = as_written(row["config"])
    return msgspec.json.encode(value)


def decode_statement(payload: bytes, limits: Limits) -> EvidenceStatement:
    """The manifest in ``payload``, strictly parsed. Its rules are not checked yet."""
    value = parse_json(payload, "manifest", limits)
    kinds = (value.get("_type"), value.get("predicateType")) if isinstance(value, dict) else (None, None)
    for found, expected in zip(kinds, (STATEMENT_TYPE, EVIDENCE_TYPE), strict=True):
        if found != expected:
            raise EvidenceError(
                f"manifest of type {shorten(str(found))!r} where {expected!r} is expected",
                "is this the right file?",
            )
    return convert(value, EvidenceStatement, "manifest")


def blob_sizes(evidence: Evidence) -> dict[str, int]:
    """Length in bytes of each blob by its digest, in the order of first use: the order in the file.

    Raises :class:`EvidenceError` when two tensors give one digest different lengths.
    """
    sizes: dict[str, int] = {}
    for tensor in tensors(evidence):
        size = prod(tensor.shape) * DTYPES[tensor.dtype].itemsize
        if sizes.setdefault(tensor.sha256, size) != size:
            raise EvidenceError(
                f"blob {tensor.sha256[:16]}… is both {sizes[tensor.sha256]} and {size} bytes long",
                "one shape is wrong",
            )
    return sizes


def tensors(evidence: Evidence) -> Iterator[Tensor]:
    """Every tensor that the manifest mentions, in order, as often as it does."""
    for reference in evidence.references:
        yield reference.prompt_ids
    for row in evidence.rows:
        for trace in row.traces:
            yield trace.output_ids
            yield from trace.prefill.values()
            yield from trace.decode.values()


def statement_of(evidence: Evidence) -> EvidenceStatement:
    """The in-toto Statement that a bundle signs: about the references' prompts, saying ``evidence``."""
    return EvidenceStatement(
        type_=STATEMENT_TYPE,
        subject=subjects(evidence.references),
        predicate_type=EVIDENCE_TYPE,
        predicate=evidence,
    )


def subjects(references: tuple[ReferenceEntry, ...]) -> tuple[Subject, ...]:
    """What the statement is about: each reference's prompt."""
    return tuple(Subject(name=one.id, digest={"sha256": one.prompt_ids.sha256}) for one in references)


def uses(evidence: Evidence) -> Iterator[Use]:
    """Every mention of a tensor with the rule for its elements. The manifest must have passed its rules."""
    lengths: dict[str, int] = {}
    vocabulary = shared_vocabulary(evidence)
    for reference in evidence.references:
        lengths[reference.id] = reference.prompt_ids.shape[0]
        yield prompt_use(reference, vocabulary)
    for row in evidence.rows:
        for trace in row.traces:
            yield output_use(row, trace)
            for phase in PHASES:
                for name in phase_tensors(trace, phase):
                    yield phase_use(row, trace, phase, name, lengths[trace.reference_id])


def shared_vocabulary(evidence: Evidence) -> int:
    """How many token ids every row's model has: prompts are fed to all of them."""
    return min(row.facts.model.vocab_size for row in evidence.rows)


def prompt_use(reference: ReferenceEntry, vocabulary: int) -> Use:
    """A prompt's token ids."""
    return Use(reference.prompt_ids, f"{reference.id}, prompt_ids", Rule("ids", 0, vocabulary - 1))


def output_use(row: Row, trace: TraceEntry) -> Use:
    """The generated token ids of one trace."""
    where = f"{row.config_id}, {trace.reference_id}, output_ids"
    return Use(trace.output_ids, where, Rule("ids", 0, row.facts.model.vocab_size - 1))


def phase_use(row: Row, trace: TraceEntry, phase: Phase, name: str, prompt: int) -> Use:
    """The tensor ``name`` of one phase of a trace whose prompt has ``prompt`` tokens."""
    where = f"{row.config_id}, {trace.reference_id}, {phase}, {name}"
    tensor = phase_tensors(trace, phase)[name]
    if name == "positions":
        return Use(tensor, where, Rule("positions", *span(phase, prompt, trace.output_ids.shape[0])))
    if name == "logprob_ids":
        return Use(tensor, where, Rule("top_ids", 0, row.facts.model.vocab_size - 1))
    return Use(tensor, where, Rule("logprobs" if name in ("logprobs", "chosen_logprobs") else "floats"))


def phase_tensors(trace: TraceEntry, phase: Phase) -> Mapping[str, Tensor]:
    """A trace's tensors of one phase by name."""
    return trace.prefill if phase == "prefill" else trace.decode


def span(phase: Phase, prompt: int, output: int) -> tuple[int, int]:
    """First and last position that a phase can hold: the last token of the output is never fed."""
    return (0, prompt - 1) if phase == "prefill" else (prompt, prompt + output - 2)
