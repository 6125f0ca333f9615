"""Signals and traces: what is captured, at which layers and positions, in the dtype the model computed.

Shapes use M for captured positions, D for a vector's width, K for top-k, V for the vocabulary.
Arrays of bfloat16 are NumPy arrays of ``ml_dtypes.bfloat16``: they keep every bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import ml_dtypes
import msgspec
import numpy as np
from numpy.typing import NDArray

from fpforensics.common.errors import Error

Array = NDArray[Any]
Phase = Literal["prefill", "decode"]
Signal = Literal["logprobs", "key_vectors", "hidden_states"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")
SIGNALS: tuple[Signal, ...] = ("logprobs", "key_vectors", "hidden_states")

# Our own names for dtypes on the wire: NumPy calls bfloat16 '<V2'.
DTYPES: Mapping[str, np.dtype[Any]] = {
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f16": np.dtype("<f2"),
    "f32": np.dtype("<f4"),
    "f64": np.dtype("<f8"),
    "i32": np.dtype("<i4"),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

LAST = "last"
"""The layer name of the last block's output (before the final norm), or of the last block's keys."""


def dtype_name(array: Array) -> str:
    """Our name for an array's dtype. Raises :class:`Error` for one that evidence cannot hold."""
    name = _NAMES.get(array.dtype.newbyteorder("<") if array.dtype.byteorder == ">" else array.dtype)
    if name is None:
        raise Error(f"arrays of dtype {array.dtype} cannot be evidence", f"use one of {', '.join(DTYPES)}")
    return name


class CapturePlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What to capture.

    ``layers`` are 1-based block numbers as strings, or ``last``; those beyond the model's depth are left out by the engine
    and the trace says which ones it holds. ``prefill_positions`` is how many of the last prompt positions, and
    ``decode_positions`` how many of the last generated positions (0 for all), are captured.
    ``full_logits`` keeps the raw logits too.
    """

    layers: tuple[str, ...] = ("1", "2", "4", "12", LAST)
    prefill_positions: int = 16
    decode_positions: int = 0
    top_k: int = 20
    full_logits: bool = False


def generation_positions(prompt_length: int, output_length: int, plan: CapturePlan) -> tuple[Array, Array]:
    """Absolute positions that a plan captures, (M,) int32 each: the last of the prompt, and of the generated
    tokens fed.
    """
    first = max(0, prompt_length - plan.prefill_positions)
    end = prompt_length + output_length - 1
    start = prompt_length if plan.decode_positions == 0 else max(prompt_length, end - plan.decode_positions)
    return np.arange(first, prompt_length, dtype=np.int32), np.arange(start, end, dtype=np.int32)


class Sampling(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How tokens are chosen. ``temperature`` 0 is greedy; otherwise Gumbel-max with noise from Philox keyed by
    (``seed``, reference, step), so that a verifier can draw the same noise."""

    max_new_tokens: int = 32
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Reference:
    """One prompt, as token ids. ``source`` says where the text came from."""

    id: str
    prompt_ids: Array  # (P,) int32
    source: str = ""


@dataclass(frozen=True)
class Forcing:
    """What a replay must feed and which ids it must report, for one reference.

    ``claimed_ids[phase]`` (M, K) int32: the log-probabilities at these ids are gathered from the replay's own full
    distribution, so that both sides compare the same tokens. ``positions[phase]`` (M,) int32 are absolute.
    """

    reference: Reference
    output_ids: Array  # (N,) int32
    positions: Mapping[Phase, Array]
    claimed_ids: Mapping[Phase, Array]


@dataclass(frozen=True)
class PhaseTrace:
    """The signals of one reference in one phase; row i belongs to absolute position ``positions[i]``."""

    positions: Array  # (M,) int32
    logprob_ids: Array  # (M, K) int32
    logprobs: Array  # (M, K) float32, at logprob_ids
    chosen_logprobs: Array  # (M,) float32, of the token that follows the position
    hidden_states: Mapping[str, Array] = field(default_factory=dict)  # layer -> (M, D) native dtype
    key_vectors: Mapping[str, Array] = field(default_factory=dict)  # layer -> (M, heads * head_dim) native dtype
    logits: Array | None = None  # (M, V) native dtype, only with CapturePlan.full_logits

    def tensors(self) -> dict[str, Array]:
        """Every array by a stable name: ``positions``, ``logprobs``, …, ``hidden_states/1``, ``key_vectors/last``."""
        named: dict[str, Array] = {
            "positions": self.positions,
            "logprob_ids": self.logprob_ids,
            "logprobs": self.logprobs,
            "chosen_logprobs": self.chosen_logprobs,
        }
        if self.logits is not None:
            named["logits"] = self.logits
        named.update({f"hidden_states/{layer}": rows for layer, rows in self.hidden_states.items()})
        named.update({f"key_vectors/{layer}": rows for layer, rows in self.key_vectors.items()})
        return named

    @classmethod
    def from_tensors(cls, named: Mapping[str, Array]) -> PhaseTrace:
        """The inverse of :meth:`tensors`."""
        layered: dict[str, dict[str, Array]] = {"hidden_states": {}, "key_vectors": {}}
        for name, rows in named.items():
            signal, slash, layer = name.partition("/")
            if slash:
                layered[signal][layer] = rows
        return cls(
            positions=named["positions"],
            logprob_ids=named["logprob_ids"],
            logprobs=named["logprobs"],
            chosen_logprobs=named["chosen_logprobs"],
            hidden_states=layered["hidden_states"],
            key_vectors=layered["key_vectors"],
            logits=named.get("logits"),
        )


@dataclass(frozen=True)
class Trace:
    """The signals of one reference under one config. Token N of the output is never fed, so decode has N - 1 positions."""

    reference_id: str
    output_ids: Array  # (N,) int32
    prefill: PhaseTrace
    decode: PhaseTrace

    def phase(self, phase: Phase) -> PhaseTrace:
        """The phase's signals by name."""
        return self.prefill if phase == "prefill" else self.decode


@dataclass(frozen=True)
class Divergence:
    """The first place where two traces of one reference differ."""

    reference_id: str
    phase: Phase
    name: str  # tensor name, e.g. hidden_states/2
    position: int  # absolute
    size: float  # largest absolute difference at that position

    def __str__(self) -> str:
        return f"{self.reference_id}, {self.phase}, position {self.position}, {self.name}: |Δ| = {self.size:.3g}"


def first_divergence(a: Trace, b: Trace) -> Divergence | None:
    """Where ``a`` and ``b`` stop being bit-identical (prefill first, then by position), or None."""
    if not np.array_equal(a.output_ids, b.output_ids):
        n = min(len(a.output_ids), len(b.output_ids))
        differing = np.flatnonzero(a.output_ids[:n] != b.output_ids[:n])
        step = int(differing[0]) if len(differing) else n
        first = _first_in_phases(a, b)
        return first or Divergence(a.reference_id, "decode", "output_ids", step, float("nan"))
    return _first_in_phases(a, b)


def _first_in_phases(a: Trace, b: Trace) -> Divergence | None:
    for phase in PHASES:
        left, right = a.phase(phase).tensors(), b.phase(phase).tensors()
        found: list[Divergence] = []
        for name in sorted(left.keys() | right.keys()):
            rows_a, rows_b = left.get(name), right.get(name)
            if rows_a is None or rows_b is None or rows_a.shape != rows_b.shape or rows_a.dtype != rows_b.dtype:
                found.append(Divergence(a.reference_id, phase, name, -1, float("nan")))
                continue
            bytes_a, bytes_b = _row_bytes(rows_a), _row_bytes(rows_b)
            differing = np.flatnonzero((bytes_a != bytes_b).any(axis=1))
            if len(differing):
                row = int(differing[0])
                gap = np.abs(rows_a[row].astype(np.float64) - rows_b[row].astype(np.float64))
                found.append(
                    Divergence(a.reference_id, phase, name, int(a.phase(phase).positions[row]), float(gap.max()))
                )
        if found:
            return min(found, key=lambda divergence: divergence.position)
    return None


def _row_bytes(rows: Array) -> NDArray[np.uint8]:
    """(M, anything) as raw bytes (M, B), so that equality means equality of bits."""
    flat = np.ascontiguousarray(rows).reshape(len(rows), int(np.prod(rows.shape[1:])))  # no -1: there may be no rows
    return flat.view(np.uint8)
