"""What an analysis says, as values that JSON can hold: no NaN, no infinity."""

from __future__ import annotations

import msgspec

from fpforensics.common.signals import Phase, Signal
from fpforensics.verifier.matrix import Table
from fpforensics.verifier.pairs import PairDecision


class PairAnalysis(msgspec.Struct, frozen=True, kw_only=True):
    """Two configs: the mean distance between them over the mean of their own diagonals.

    ``label`` is the published one; ``decision`` our own, from the prompts one by one (None where no prompt has both).
    """

    pair: tuple[str, str]
    signal: float
    noise: float | None
    snr: float | None
    snr_infinite: bool
    label: str
    decision: PairDecision | None = None


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """One distance that answers one of the plan's questions; ``snr`` is over the mean cross-hardware baseline."""

    configs: tuple[str, str]
    hardware: tuple[str, str]
    values: tuple[str, str]
    distance: float
    snr: float | None = None
    snr_infinite: bool = False
    label: str = ""


class Diverged(msgspec.Struct, frozen=True, kw_only=True):
    """Two runs whose token sequences differ from ``step`` on: they have no decode distance."""

    configs: tuple[str, str]
    reference: str
    step: int


class CellAnalysis(msgspec.Struct, frozen=True, kw_only=True):
    """One phase and signal (pooled over layers, each layer in ``per_layer``). None stands where nothing was measured.

    ``snr_meaningful`` leaves out pairs within a kernel class. ``reproducible`` is None for a config with one
    repetition of which the document says nothing. ``uncompared`` counts the positions where none of the
    canonical ids was listed on both sides.
    """

    configs: tuple[str, ...]
    observed_configs: tuple[str, ...]
    matrix: Table
    per_reference: dict[str, Table]
    diagonal_mean: float | None
    off_diagonal_mean: float | None
    off_diagonal_count: int
    snr: float | None
    snr_infinite: bool
    snr_meaningful: float | None
    snr_meaningful_infinite: bool
    meaningful_mean: float | None
    meaningful_count: int
    label: str
    pairwise: tuple[PairAnalysis, ...]
    kernel_classes: tuple[tuple[str, ...], ...]
    reproducible: dict[str, bool | None]
    cross_hardware_baseline: tuple[Comparison, ...]
    within_hardware: tuple[Comparison, ...]
    across_hardware: tuple[Comparison, ...]
    diverged: tuple[Diverged, ...]
    uncompared: int
    per_layer: dict[str, CellAnalysis]


Analysis = dict[Phase, dict[Signal, CellAnalysis]]
"""By phase, then signal."""
