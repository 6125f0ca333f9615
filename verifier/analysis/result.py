"""What an analysis says, as values that JSON can hold: no NaN, no infinity.

As JSON it is one object keyed by phase, then signal, and by nothing else: who reads it loops over its keys. So what it was
measured from is no key beside the phases, but stands in each signal as ``about``.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from fpforensics.common.signals import Phase, Signal
from fpforensics.verifier.matrix import Table
from fpforensics.verifier.pairs import PairDecision

Side = Literal["claimed", "observed"]
"""Which experiment a config is of; with a single experiment, all are ``claimed``."""
SIDES: tuple[Side, Side] = ("claimed", "observed")


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """One experiment file: its name, and what it says of model and hardware. Untrusted: to be escaped where it is shown."""

    file: str
    model: str
    hardware: tuple[str, ...]


class About(msgspec.Struct, frozen=True, kw_only=True):
    """What was compared, and how: a result that was saved says so itself. ``observed`` is None for a single experiment."""

    variable: str
    claimed: Source
    observed: Source | None
    canonical: str
    top: int


class PairAnalysis(msgspec.Struct, frozen=True, kw_only=True):
    """Two configs: the mean distance between them over the mean of their own diagonals.

    Between two experiments a pair is one of ``values`` (the variable's, as JSON text): the distances are from the claimed
    config with the one to the observed config with the other, both ways, and ``pair`` names the claimed configs, or the
    observed one of a value that only the observed experiment has. ``label`` is the published one; ``decision`` our own, from
    the prompts one by one (None where no prompt has both).
    """

    pair: tuple[str, str]
    values: tuple[str, str]
    signal: float
    noise: float | None
    snr: float | None
    snr_infinite: bool
    label: str
    decision: PairDecision | None = None


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """One distance that answers one of the plan's questions; ``snr`` is over the mean cross-hardware baseline."""

    configs: tuple[str, str]
    sides: tuple[Side, Side]
    hardware: tuple[str, str]
    values: tuple[str, str]
    distance: float
    snr: float | None = None
    snr_infinite: bool = False
    label: str = ""


class Diverged(msgspec.Struct, frozen=True, kw_only=True):
    """Two runs whose token sequences differ from ``step`` on: they have no decode distance.

    Between two experiments the first is the claimed one.
    """

    configs: tuple[str, str]
    reference: str
    step: int


Asked = Literal["cross_hardware_baseline", "within_hardware", "across_hardware"]
"""The plan's questions that pairs of configs answer, by the fields of :class:`CellAnalysis` that hold the answers."""


class Unanswered(msgspec.Struct, frozen=True, kw_only=True):
    """A question that has pairs of configs and no distance between any two of them.

    ``diverged`` counts the pairs whose tokens differ somewhere, from ``step`` on where that is earliest. 0: something else is
    missing, which ``not_compared`` and ``uncompared`` say.
    """

    question: Asked
    pairs: int
    diverged: int = 0
    step: int | None = None


class NotCompared(msgspec.Struct, frozen=True, kw_only=True):
    """What one side has and means leave out, or what it lacks. ``references`` are all of them if empty, ``config`` is every one if empty.

    ``one side``: these references are in this experiment only, and in no distance. ``no counterpart``: no config of the
    other side has this one's value, so that it is in off-diagonal means only. ``not measured``: there is no distance here,
    means are over the other references.
    """

    side: Side
    reason: Literal["one side", "no counterpart", "not measured"]
    config: str = ""
    references: tuple[str, ...] = ()


class CellAnalysis(msgspec.Struct, frozen=True, kw_only=True):
    """One phase and signal (pooled over layers, each layer in ``per_layer``). None stands where nothing was measured.

    ``snr_meaningful`` leaves out pairs within a kernel class; ``kernel_class_sides`` says for each class which experiments
    hold it. ``reproducible`` is None for a config with one repetition of which the document says nothing; an id of both
    experiments is reproducible if it is in both. ``within_hardware`` holds the distances from each machine's first config
    to its others, ``unanswered`` why there is none where there could be. ``uncompared`` counts the positions where none of the canonical ids was listed on both sides.
    """

    about: About
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
    kernel_class_sides: tuple[tuple[Side, ...], ...]
    reproducible: dict[str, bool | None]
    cross_hardware_baseline: tuple[Comparison, ...]
    within_hardware: tuple[Comparison, ...]
    across_hardware: tuple[Comparison, ...]
    diverged: tuple[Diverged, ...]
    not_compared: tuple[NotCompared, ...]
    uncompared: int
    unanswered: tuple[Unanswered, ...]
    per_layer: dict[str, CellAnalysis]


Analysis = dict[Phase, dict[Signal, CellAnalysis]]
"""By phase, then signal; see above for why by nothing else."""
