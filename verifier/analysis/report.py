"""From distances between configs to matrices, SNR, kernel classes and the answers to the plan's questions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import reduce
from itertools import combinations

import msgspec
import numpy as np

from fpforensics.common.signals import PHASES, SIGNALS, Signal
from fpforensics.verifier.analysis.measure import Measurements, Member
from fpforensics.verifier.analysis.missing import not_compared
from fpforensics.verifier.analysis.result import (
    SIDES,
    About,
    Analysis,
    Asked,
    CellAnalysis,
    Comparison,
    Diverged,
    PairAnalysis,
    Side,
    Unanswered,
)
from fpforensics.verifier.distance import POOLED, Cell, Floats
from fpforensics.verifier.matrix import DistanceMatrix, Ratio, Table, kernel_classes, labels, mean, ratio

KERNEL_CLASS = 1e-9
"""Configs nearer than this are one kernel class (published quantization study: "equivalent pairs")."""


def report_of(measured: Measurements, about: About) -> Analysis:
    """Everything measured, as values; ``about`` says of what."""
    analysis: Analysis = {}
    for phase in PHASES:
        signals: dict[Signal, CellAnalysis] = {}
        for signal in SIGNALS:
            cells = [cell for cell in measured.distances if (cell.phase, cell.signal) == (phase, signal)]
            if not cells:
                continue
            if signal == "logprobs":
                signals[signal] = _cell(measured, about, cells[0], measured.distances[cells[0]], {})
            else:
                cells.sort(key=lambda cell: int(cell.layer.removeprefix("layer_")))
                layers = {cell.layer: _cell(measured, about, cell, measured.distances[cell], {}) for cell in cells}
                pooled = Cell(phase, signal, POOLED)
                signals[signal] = _cell(measured, about, pooled, _pooled(measured, cells), layers)
        if signals:
            analysis[phase] = signals
    return analysis


def _pooled(measured: Measurements, cells: Sequence[Cell]) -> dict[str, Floats]:
    """The mean over layers; NaN where a layer is missing, so that every entry pools the same layers."""
    pooled = {}
    missing = np.full((len(measured.members),) * 2, np.nan)
    for reference in measured.references:
        tables = [measured.distances[cell].get(reference) for cell in cells]
        if any(each is not None for each in tables):
            pooled[reference] = np.mean([missing if each is None else each for each in tables], axis=0)
    return pooled


def _cell(
    measured: Measurements, about: About, cell: Cell, tables: dict[str, Floats], per_layer: dict[str, CellAnalysis]
) -> CellAnalysis:
    rows = [index for index, each in enumerate(measured.members) if each.side == 0]
    columns = [index for index, each in enumerate(measured.members) if each.side == 1] or rows
    two = columns is not rows
    matrix, everyone = _matrix(measured, cell, tables, rows, columns, by_value=two), _mean_table(list(tables.values()))
    classes = _kernel_classes(measured, everyone)
    # Between two experiments a class is one of values: what one side cannot tell apart, no matrix can.
    by_key = [{measured.members[i].value if two else measured.members[i].id for i in members} for members in classes]
    named: dict[tuple[str, ...], tuple[Side, ...]] = {}
    for members in classes:
        names = tuple(measured.members[i].id for i in members)
        named[names] = (*named.get(names, ()), SIDES[measured.members[members[0]].side])
    off_diagonal = _mean_or_none(every := matrix.off_diagonal())
    apart = _mean_or_none(meant := matrix.off_diagonal(by_key) if by_key else every)
    snr, meaningful = (ratio(signal, matrix.diagonal_mean) for signal in (off_diagonal, apart))
    baseline, within, across = _questions(measured, everyone)
    answers: dict[Asked, tuple[Comparison, ...]] = {
        "cross_hardware_baseline": baseline,
        "within_hardware": within,
        "across_hardware": across,
    }
    return CellAnalysis(
        about=about,
        configs=matrix.rows,
        observed_configs=matrix.columns,
        matrix=_values(matrix.aggregate),
        per_reference={name: _values(matrix.values[i]) for i, name in enumerate(matrix.references)},
        diagonal_mean=matrix.diagonal_mean,
        off_diagonal_mean=off_diagonal,
        off_diagonal_count=len(every),
        snr=snr.value,
        snr_infinite=snr.infinite,
        snr_meaningful=meaningful.value,
        snr_meaningful_infinite=meaningful.infinite,
        meaningful_mean=apart,
        meaningful_count=len(meant),
        label=labels(meaningful)[0],
        pairwise=tuple(_pairs(measured, matrix, by_value=two)),
        kernel_classes=tuple(named),
        kernel_class_sides=tuple(named.values()),
        reproducible=_all_reproducible(measured, cell, per_layer),
        cross_hardware_baseline=baseline,
        within_hardware=within,
        across_hardware=across,
        diverged=_diverged_in(measured, rows, columns) if cell.phase == "decode" else (),
        not_compared=not_compared(measured, [Cell(cell.phase, cell.signal, layer) for layer in per_layer] or [cell]),
        uncompared=_count_uncompared(measured, cell, rows, columns),
        unanswered=tuple(_unanswered(measured, cell, [name for name, found in answers.items() if not found])),
        per_layer=per_layer,
    )


def _matrix(
    measured: Measurements,
    cell: Cell,
    tables: dict[str, Floats],
    rows: list[int],
    columns: list[int],
    *,
    by_value: bool,
) -> DistanceMatrix:
    def keys(indices: list[int]) -> tuple[str, ...]:
        return tuple(measured.members[i].value for i in indices) if by_value else ()

    return DistanceMatrix(
        cell,
        tuple(measured.members[i].id for i in rows),
        tuple(measured.members[i].id for i in columns),
        tuple(tables),
        np.array([table[np.ix_(rows, columns)] for table in tables.values()]),
        keys(rows),
        keys(columns),
    )


def _pairs(measured: Measurements, matrix: DistanceMatrix, *, by_value: bool) -> Iterator[PairAnalysis]:
    """Named by config ids: those of the rows where they have the value."""
    named: dict[str, Member] = {}
    for member in measured.members:
        named.setdefault(member.value if by_value else member.id, member)
    for each in matrix.pairwise():
        a, b = named[each.a], named[each.b]
        yield PairAnalysis(
            pair=(a.id, b.id),
            values=(a.value, b.value),
            signal=each.signal,
            noise=each.noise,
            snr=each.snr,
            snr_infinite=each.snr_infinite,
            label=each.label,
            decision=each.decision,
        )


def _kernel_classes(measured: Measurements, everyone: Floats) -> list[list[int]]:
    """Indices of members of one experiment that are nearer than :data:`KERNEL_CLASS`, both ways."""
    near = np.fmax(everyone, everyone.T) < KERNEL_CLASS
    both = near & ~np.isnan(everyone) & ~np.isnan(everyone.T)
    pairs = [
        (f"{i:06}", f"{j:06}")
        for i, j in combinations(range(len(measured.members)), 2)
        if both[i, j] and measured.members[i].side == measured.members[j].side
    ]
    return [[int(name) for name in members] for members in kernel_classes(pairs)]


def _all_reproducible(measured: Measurements, cell: Cell, per_layer: dict[str, CellAnalysis]) -> dict[str, bool | None]:
    """By config id; one id in both experiments is reproducible if it is in both."""
    found: dict[str, bool | None] = {}
    for member in measured.members:
        equal = _reproducible(measured, cell, member, per_layer)
        found[member.id] = equal if member.id not in found else _both(found[member.id], equal)
    return found


def _reproducible(
    measured: Measurements, cell: Cell, member: Member, per_layer: dict[str, CellAnalysis]
) -> bool | None:
    if per_layer:
        every = [_reproducible(measured, Cell(cell.phase, cell.signal, layer), member, {}) for layer in per_layer]
        return reduce(_both, every)
    equal = measured.identical.get((cell, member.side, member.id))
    return measured.said.get((member.side, member.id)) if equal is None else equal


def _both(one: bool | None, other: bool | None) -> bool | None:
    return False if False in (one, other) else None if None in (one, other) else True


def _questions(
    measured: Measurements, everyone: Floats
) -> tuple[tuple[Comparison, ...], tuple[Comparison, ...], tuple[Comparison, ...]]:
    """The plan's questions 2 to 4: across machines with one value, within a machine, across both."""
    found: dict[Asked, list[Comparison]] = {
        "cross_hardware_baseline": [],
        "within_hardware": [],
        "across_hardware": [],
    }
    entries = everyone.tolist()
    for question, i, j in _asked(measured.members):
        ours, theirs = measured.members[i], measured.members[j]
        # Between two experiments only the claimed one has claims; within one, both directions count.
        both = (entries[i][j],) if ours.side != theirs.side else (entries[i][j], entries[j][i])
        directions = [value for value in both if not math.isnan(value)]
        if directions:
            found[question].append(
                Comparison(
                    configs=(ours.id, theirs.id),
                    hardware=(ours.configuration.hardware, theirs.configuration.hardware),
                    values=(ours.value, theirs.value),
                    sides=(SIDES[ours.side], SIDES[theirs.side]),
                    distance=mean(directions),
                )
            )
    baseline, within, across = found.values()
    noise = _mean_or_none([each.distance for each in baseline])
    return tuple(baseline), _with_snr(within, noise), _with_snr(across, noise)


def _asked(members: Sequence[Member]) -> Iterator[tuple[Asked, int, int]]:
    """The pairs that answer each question.

    As in the plan's sketch, another value is compared with that of the machine's first config.
    """
    first = {each.machine: index for index, each in reversed(list(enumerate(members)))}
    for (i, ours), (j, theirs) in combinations(enumerate(members), 2):
        of_first = first[ours.machine] == i
        if ours.machine == theirs.machine:
            if of_first:
                yield "within_hardware", i, j
        elif ours.value == theirs.value:
            yield "cross_hardware_baseline", i, j
        elif of_first or first[theirs.machine] == j:
            yield "across_hardware", i, j


def _unanswered(measured: Measurements, cell: Cell, questions: Sequence[Asked]) -> Iterator[Unanswered]:
    for question in questions:
        pairs = {(i, j) for asked, i, j in _asked(measured.members) if asked == question}
        apart = [(i, j, each.step) for i, j, each in measured.diverged if (i, j) in pairs and cell.phase == "decode"]
        if pairs:
            yield Unanswered(
                question=question,
                pairs=len(pairs),
                diverged=len({(i, j) for i, j, _ in apart}),
                step=min((step for _, _, step in apart), default=None),
            )


def _diverged_in(measured: Measurements, rows: list[int], columns: list[int]) -> tuple[Diverged, ...]:
    return tuple(each for i, j, each in measured.diverged if i in rows and j in columns)


def _count_uncompared(measured: Measurements, cell: Cell, rows: list[int], columns: list[int]) -> int:
    if cell.signal != "logprobs":
        return 0
    return sum(measured.uncompared.get((cell.phase, i, j), 0) for i in rows for j in columns)


def _with_snr(comparisons: Sequence[Comparison], noise: float | None) -> tuple[Comparison, ...]:
    found = []
    for each in comparisons:
        snr = ratio(each.distance, noise) if noise is not None else Ratio()
        found.append(msgspec.structs.replace(each, snr=snr.value, snr_infinite=snr.infinite, label=labels(snr)[0]))
    return tuple(found)


def _mean_table(tables: Sequence[Floats]) -> Floats:
    """The mean over the tables that hold an entry; NaN where none does."""
    stacked = np.array(tables)
    measured = ~np.isnan(stacked)
    sums = np.where(measured, stacked, 0.0).sum(axis=0)
    return np.where(measured.any(axis=0), sums / np.maximum(measured.sum(axis=0), 1), np.nan)


def _mean_or_none(values: Sequence[float]) -> float | None:
    return mean(values) if values else None


def _values(table: Floats) -> Table:
    return tuple(tuple(None if math.isnan(value) else value for value in row) for row in table.tolist())
