"""Distance matrices: rows are claimed configs, columns verified ones; directed, never symmetrized.

Pure NumPy. A matrix's diagonal is where both keys are equal, not where the indices are: the lineup may be
larger than the bundle. SNR is the published one, off-diagonal mean over diagonal mean; a zero diagonal makes
it infinite, which is a flag and never a number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import msgspec
import numpy as np

from fpforensics.common.errors import Error, ReplayError, shorten
from fpforensics.common.signals import PHASES, SIGNALS, Phase, Signal
from fpforensics.verifier.distance import POOLED, Cell, Floats, with_pooled
from fpforensics.verifier.pairs import PairDecision, decide_pairs

Classes = Sequence[Collection[str]]
Table = tuple[tuple[float | None, ...], ...]
_PUBLISHED = ((100.0, "TRIVIALLY DETECTABLE"), (10.0, "CLEARLY DETECTABLE"), (3.0, "MARGINALLY DETECTABLE"))
_PLAN = ((10.0, "Strong"), (3.0, "Moderate"), (1.0, "Weak"))


class Ratio(msgspec.Struct, frozen=True):
    """A signal over a noise; ``value`` is None if it is infinite (only the noise is 0) or one is missing."""

    value: float | None = None
    infinite: bool = False

    def exceeds(self, threshold: float) -> bool:
        """Whether the ratio is known and greater."""
        return self.infinite or (self.value is not None and self.value > threshold)


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """The distances of one reference from a claimed row to one member's replay."""

    row: str
    column: str
    reference_id: str
    distances: dict[Cell, float]


class PairSnr(msgspec.Struct, frozen=True, kw_only=True):
    """One unordered pair of configs: the mean distance between them over the mean of their own diagonals.

    The labels are the published ones; ``decision`` is our own, prompt by prompt, None where no prompt has both.
    """

    a: str
    b: str
    signal: float
    noise: float | None
    snr: float | None
    snr_infinite: bool
    label: str
    second_label: str
    same_kernel_class: bool
    decision: PairDecision | None = None


class MatrixReport(msgspec.Struct, frozen=True, kw_only=True):
    """A distance matrix and what follows from it, ready for JSON.

    None stands where nothing was measured or a ratio has no value. ``layer`` is empty for logprobs,
    ``pooled`` for the mean over layers, else a layer's name. The labels belong to ``snr_meaningful``.
    """

    phase: Phase
    signal: Signal
    layer: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    references: tuple[str, ...]
    per_reference: tuple[Table, ...]
    aggregate: Table
    diagonal_mean: float | None
    off_diagonal_mean: float | None
    off_diagonal_count: int
    snr: float | None
    snr_infinite: bool
    meaningful_mean: float | None
    meaningful_count: int
    snr_meaningful: float | None
    snr_meaningful_infinite: bool
    label: str
    second_label: str
    pairwise: tuple[PairSnr, ...]


@dataclass(frozen=True)
class DistanceMatrix:
    """Distances (R references, rows, columns) of one cell; NaN marks what was not measured.

    The diagonal is where keys are equal. Keys are the ids themselves, unless rows and columns come from two
    experiments, where one config has two ids: then they are the values that configs are matched by. Pairs and
    kernel classes are about keys.
    """

    cell: Cell
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    references: tuple[str, ...]
    values: Floats  # (R, A, B): references, claimed rows, verified columns
    row_keys: tuple[str, ...] = ()
    column_keys: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "row_keys", self.row_keys or self.rows)
        object.__setattr__(self, "column_keys", self.column_keys or self.columns)
        if (len(self.row_keys), len(self.column_keys)) != (len(self.rows), len(self.columns)):
            raise Error(f"matrix {self.cell}: a key is missing", "one for each row and column, or none at all")
        shape = (len(self.references), len(self.rows), len(self.columns))
        if self.values.shape != shape:
            raise Error(f"matrix {self.cell}: values of shape {self.values.shape} for {shape}", "one per pair")
        for names in (self.rows, self.columns, self.references):
            if len(set(names)) != len(names):
                raise Error(f"matrix {self.cell}: duplicate ids in {names}", "give every config its own id")
        if np.isinf(self.values).any() or (self.values < 0).any():
            raise ReplayError(f"matrix {self.cell}: a distance is infinite or negative")

    @cached_property
    def aggregate(self) -> Floats:
        """(A, B): the mean over the references that were measured; NaN where none was."""
        measured = ~np.isnan(self.values)
        counts = measured.sum(axis=0)
        sums = np.where(measured, self.values, 0.0).sum(axis=0)
        return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)

    @cached_property
    def diagonal_mean(self) -> float | None:
        """The published noise: mean distance of each claimed config to its own replay."""
        return _mean(self._entries(lambda row, column: row == column))

    def off_diagonal(self, exclude: Classes = ()) -> list[float]:
        """Distances between different configs, without pairs that share one of the classes of ``exclude``."""
        return self._entries(lambda row, column: row != column and not same_class(row, column, exclude))

    def snr(self, exclude: Classes = ()) -> Ratio:
        """Off-diagonal mean over diagonal mean, of all pairs or of those that kernels can tell apart."""
        return ratio(_mean(self.off_diagonal(exclude)), self.diagonal_mean)

    def distance(self, row: str, column: str) -> float | None:
        """The aggregate entry between two keys (the mean, if several rows or columns share one), or None."""
        return self._by_keys.get((row, column))

    def pairwise(self, classes: Classes = ()) -> tuple[PairSnr, ...]:
        """Every pair with a measured direction, most detectable first."""
        keys = list(dict.fromkeys(self.row_keys + self.column_keys))
        named = [(a, b) for a, b in combinations(keys, 2) if self._directions(a, b)]
        decisions = self._decisions(keys, named)
        pairs = [self._pair(a, b, classes, decision) for (a, b), decision in zip(named, decisions, strict=True)]
        return tuple(sorted(pairs, key=_most_detectable_first))

    def to_report(self, classes: Classes = ()) -> MatrixReport:
        """Everything above as values that JSON can hold."""
        every, meaningful = self.off_diagonal(), self.off_diagonal(classes)
        snr, snr_meaningful = self.snr(), self.snr(classes)
        label, second_label = labels(snr_meaningful)
        return MatrixReport(
            phase=self.cell.phase,
            signal=self.cell.signal,
            layer=self.cell.layer,
            rows=self.rows,
            columns=self.columns,
            references=self.references,
            per_reference=tuple(_table(values) for values in self.values),
            aggregate=_table(self.aggregate),
            diagonal_mean=self.diagonal_mean,
            off_diagonal_mean=_mean(every),
            off_diagonal_count=len(every),
            snr=snr.value,
            snr_infinite=snr.infinite,
            meaningful_mean=_mean(meaningful),
            meaningful_count=len(meaningful),
            snr_meaningful=snr_meaningful.value,
            snr_meaningful_infinite=snr_meaningful.infinite,
            label=label,
            second_label=second_label,
            pairwise=self.pairwise(classes),
        )

    @cached_property
    def _by_keys(self) -> dict[tuple[str, str], float]:
        found: dict[tuple[str, str], list[float]] = {}
        for row, values in zip(self.row_keys, self.aggregate.tolist(), strict=True):
            for column, value in zip(self.column_keys, values, strict=True):
                if not math.isnan(value):
                    found.setdefault((row, column), []).append(value)
        return {keys: mean(values) for keys, values in found.items()}

    def _decisions(self, keys: list[str], named: Sequence[tuple[str, str]]) -> list[PairDecision | None]:
        """What each pair's prompts say; those of the same matrix are one family."""
        signals, noises = self._by_pair(keys)
        at = {key: index for index, key in enumerate(keys)}
        measured: list[tuple[list[float], list[float]]] = []
        for a, b in named:
            signal, noise = (table[:, at[a], at[b]] for table in (signals, noises))
            both = ~np.isnan(signal) & ~np.isnan(noise)
            measured.append((signal[both].tolist(), noise[both].tolist()))
        decided = iter(decide_pairs([pair for pair in measured if pair[0]]))
        return [next(decided) if signal else None for signal, _ in measured]

    def _by_pair(self, keys: Sequence[str]) -> tuple[Floats, Floats]:
        """Each reference's own signal and noise between every two of K keys, (R, K, K) each; NaN where it lacks one.

        The signal is the mean of the entries between the two, both ways, the noise that of their own entries.
        """
        rows, columns = (
            np.array([[key == each for each in held] for key in keys], np.float64)
            for held in (self.row_keys, self.column_keys)
        )
        measured = ~np.isnan(self.values)
        sums = rows @ np.where(measured, self.values, 0.0) @ columns.T
        counts = rows @ measured @ columns.T

        def both(tables: Floats) -> tuple[Floats, Floats]:
            own = np.diagonal(tables, axis1=1, axis2=2)
            return tables + tables.transpose(0, 2, 1), own[:, :, None] + own[:, None, :]

        signals, noises = (
            np.where(count > 0, total / np.maximum(count, 1), np.nan)
            for total, count in zip(both(sums), both(counts), strict=True)
        )
        return signals, noises

    def _pair(self, a: str, b: str, classes: Classes, decision: PairDecision | None) -> PairSnr:
        signal = mean(self._directions(a, b))
        noise = _mean([value for name in (a, b) if (value := self.distance(name, name)) is not None])
        snr = ratio(signal, noise)
        label, second_label = labels(snr)
        return PairSnr(
            a=a,
            b=b,
            signal=signal,
            noise=noise,
            snr=snr.value,
            snr_infinite=snr.infinite,
            label=label,
            second_label=second_label,
            same_kernel_class=same_class(a, b, classes),
            decision=decision,
        )

    def _directions(self, a: str, b: str) -> list[float]:
        return [value for pair in ((a, b), (b, a)) if (value := self.distance(*pair)) is not None]

    def _entries(self, keep: Callable[[str, str], bool]) -> list[float]:
        return [
            value
            for row, values in zip(self.row_keys, self.aggregate.tolist(), strict=True)
            for column, value in zip(self.column_keys, values, strict=True)
            if keep(row, column) and not math.isnan(value)
        ]


def build_matrices(measurements: Iterable[Measurement]) -> tuple[DistanceMatrix, ...]:
    """One matrix per cell: by phase, then signal, pooled layers before each layer in the order measured.

    Rows, columns and references keep the order in which they first appear. Raises :class:`ReplayError` for a
    distance that is not a finite number of at least 0, :class:`Error` for a pair measured twice on one
    reference.
    """
    entries: dict[Cell, dict[tuple[int, int, int], float]] = {}
    rows: dict[str, int] = {}
    columns: dict[str, int] = {}
    references: dict[str, int] = {}
    for each in measurements:
        at = (
            references.setdefault(each.reference_id, len(references)),
            rows.setdefault(each.row, len(rows)),
            columns.setdefault(each.column, len(columns)),
        )
        for cell, distance in with_pooled(each.distances).items():
            if not np.isfinite(distance) or distance < 0:
                raise ReplayError(f"{cell}: distance {distance} {_where(each)}", "distances are finite, at least 0")
            if at in entries.setdefault(cell, {}):
                raise Error(f"{cell}: measured twice {_where(each)}", "give every config its own id")
            entries[cell][at] = distance
    matrices = []
    for cell in sorted(
        entries, key=lambda cell: (PHASES.index(cell.phase), SIGNALS.index(cell.signal), cell.layer != POOLED)
    ):
        values = np.full((len(references), len(rows), len(columns)), np.nan)
        for at, distance in entries[cell].items():
            values[at] = distance
        matrices.append(DistanceMatrix(cell, tuple(rows), tuple(columns), tuple(references), values))
    return tuple(matrices)


def kernel_classes(pairs: Iterable[tuple[str, str]]) -> tuple[tuple[str, ...], ...]:
    """The classes of two or more configs that equivalent ``pairs`` join; members and classes are sorted."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        parent.setdefault(name, name)
        while parent[name] != name:
            parent[name] = name = parent[parent[name]]
        return name

    for a, b in pairs:
        parent[root(a)] = root(b)
    classes: dict[str, list[str]] = {}
    for name in sorted(parent):
        classes.setdefault(root(name), []).append(name)
    return tuple(sorted(tuple(members) for members in classes.values() if len(members) > 1))


def same_class(a: str, b: str, classes: Classes) -> bool:
    """Whether one of ``classes`` holds both."""
    return any(a in members and b in members for members in classes)


def ratio(signal: float | None, noise: float | None) -> Ratio:
    """``signal / noise``, without ever being NaN or infinity; no signal is 0, even over no noise."""
    if signal is None or noise is None:
        return Ratio()
    if signal == 0.0:
        return Ratio(0.0)
    if noise == 0.0 or not np.isfinite(signal / noise):
        return Ratio(infinite=True)
    return Ratio(signal / noise)


def labels(snr: Ratio) -> tuple[str, str]:
    """The published label and the plan's second one; both empty if the ratio is unknown."""
    if snr.value is None and not snr.infinite:
        return "", ""
    published = next((name for bound, name in _PUBLISHED if snr.exceeds(bound)), "NOT RELIABLY DETECTABLE")
    return published, next((name for bound, name in _PLAN if snr.exceeds(bound)), "Not Detectable")


def mean(values: Sequence[float]) -> float:
    """The mean of at least one value; the same number as NumPy's, whose call costs more than adding up a few."""
    return float(sum(values) / len(values) if len(values) < 8 else np.mean(values))


def _most_detectable_first(pair: PairSnr) -> tuple[bool, float, float, str, str]:
    return (
        not pair.snr_infinite,
        -(pair.snr if pair.snr is not None else -1.0),
        -pair.signal,
        pair.a,
        pair.b,
    )


def _mean(values: Sequence[float]) -> float | None:
    return mean(values) if values else None


def _where(each: Measurement) -> str:
    return f"from {shorten(each.row)!r} to {shorten(each.column)!r} on {shorten(each.reference_id)!r}"


def _table(values: Floats) -> Table:
    return tuple(tuple(None if np.isnan(value) else float(value) for value in row) for row in values)
