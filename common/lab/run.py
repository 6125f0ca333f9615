"""What an experiment measured, as arrays: configurations, and runs with their signals by phase.

Shapes use M for places (a step and a position within it), K for listed tokens, D for a vector's width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fpforensics.common.signals import Array, Phase, Signal

Place = tuple[int, int]
"""(step, position): the step counts from 0 (always 0 in prefill), the position from the end: -1 is the last token."""
Layered = tuple[Signal, str]
"""A vector signal and the name of its layer, e.g. ("key_vectors", "layer_12")."""


@dataclass(frozen=True)
class Configuration:
    """One entry of ``configurations``. ``raw`` holds all of its fields, as they are."""

    config_id: str
    hardware: str
    variable_value: str | float | bool | None
    raw: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Ranked:
    """The listed log-probabilities at M places; where fewer than K were listed, the id is -1 and the value NaN."""

    places: tuple[Place, ...]
    ids: Array  # (M, K) int64, in the order listed
    logprobs: Array  # (M, K) float64


@dataclass(frozen=True)
class Vectors:
    """One layer's vectors at M places."""

    places: tuple[Place, ...]
    values: Array  # (M, D) float64


@dataclass(frozen=True)
class RunSignals:
    """What one run measured in one phase."""

    logprobs: Ranked | None = None
    vectors: Mapping[Layered, Vectors] = field(default_factory=dict)


@dataclass(frozen=True)
class RunInfo:
    """What a run is, without its signals. ``index`` is where it lies in its document.

    ``tokens`` are the generated tokens as far as the document says (each step's own, else the run's), or None;
    ``bit_identical`` what the document says about repetitions that it does not store.
    """

    index: int
    config_id: str
    ref_id: str
    rep_id: int
    tokens: tuple[int, ...] | None = None
    prompt_sha256: str = ""
    bit_identical: bool | None = None


@dataclass(frozen=True)
class Run:
    """One run: one reference under one configuration, once."""

    info: RunInfo
    phases: Mapping[Phase, RunSignals]


def same_rows(a: Array, b: Array) -> bool:
    """Whether two arrays are equal, padding included."""
    return a.shape == b.shape and bool(np.array_equal(a, b, equal_nan=a.dtype.kind == "f"))
