"""The manifest of a bundle: an in-toto Statement whose predicate holds environment, configs, references and blob digests.

These structs are the wire format. Decoding is strict: unknown fields, wrong types, NaN and duplicate keys are refused.
"""

from __future__ import annotations

import msgspec

from fpforensics.common.config import ExecutionConfig
from fpforensics.common.engines.base import EngineFacts
from fpforensics.common.environment import Environment
from fpforensics.common.signals import CapturePlan, Sampling

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
EVIDENCE_TYPE = "https://fpforensics.dev/evidence/v1"
VERDICT_TYPE = "https://fpforensics.dev/verdict/v1"
PAYLOAD_TYPE = "application/vnd.in-toto+json"


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Frozen, keyword-only, refuses unknown fields."""


class Tensor(_Strict, frozen=True):
    """A blob by digest (SHA-256, hex) with the shape and dtype (our names) of the array it holds, row-major, little-endian."""

    sha256: str
    dtype: str
    shape: tuple[int, ...]


class ReferenceEntry(_Strict, frozen=True):
    """One prompt: its id, where its text came from, and its token ids (P,) i32."""

    id: str
    source: str
    prompt_ids: Tensor


class TraceEntry(_Strict, frozen=True):
    """One trace: tensors by the names of ``PhaseTrace.tensors``."""

    reference_id: str
    output_ids: Tensor
    prefill: dict[str, Tensor]
    decode: dict[str, Tensor]


class Repetitions(_Strict, frozen=True):
    """How often the row was generated, whether bit-identical, and how long each took (seconds).

    ``noise`` is the largest mean L2 distance between repetitions by ``phase/tensor``; empty when bit-identical.
    """

    count: int
    bit_identical: bool
    wall_seconds: tuple[float, ...]
    wall_mean: float
    wall_variance: float
    first_divergence: str = ""
    noise: dict[str, float] = {}


class Row(_Strict, frozen=True):
    """Everything recorded under one execution config."""

    config_id: str
    config: ExecutionConfig
    facts: EngineFacts
    repetitions: Repetitions
    traces: tuple[TraceEntry, ...]


class Evidence(_Strict, frozen=True):
    """The predicate. ``nonce`` is the verifier's challenge (hex), or empty when nobody challenged."""

    created_at: str
    session_id: str
    nonce: str
    tool_version: str
    environment: Environment
    capture: CapturePlan
    sampling: Sampling
    references: tuple[ReferenceEntry, ...]
    rows: tuple[Row, ...]


class Subject(_Strict, frozen=True):
    """What a statement is about: a name and a SHA-256 digest (hex)."""

    name: str
    digest: dict[str, str]


class EvidenceStatement(_Strict, frozen=True):
    """An in-toto v1 Statement; its subjects are the references' prompt token ids."""

    type_: str = msgspec.field(name="_type")
    subject: tuple[Subject, ...]
    predicate_type: str = msgspec.field(name="predicateType")
    predicate: Evidence
