"""A suite's results as one self-contained page: the summary first, then each experiment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fpforensics.common.signals import PHASES, Phase
from fpforensics.verifier.analysis import Analysis
from fpforensics.verifier.analysis.environment import FieldComparison
from fpforensics.verifier.matrix import MatrixReport, PairSnr, Table
from fpforensics.verifier.report import SIGNAL_TITLES, headline, layers
from fpforensics.verifier.report.analysis_words import diverged
from fpforensics.verifier.report.pages import Heat, heat_rows, render_page
from fpforensics.verifier.suite.files import ExperimentReport, Written
from fpforensics.verifier.suite.forensics import TOLERANCE
from fpforensics.verifier.suite.model import Suite

MARKS = {"finished": "✓", "skipped": "–", "blocked": "–", "failed": "✗", "stopped": "✗", "open": "…"}


@dataclass(frozen=True)
class Map:
    """One heat map with its caption."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, list[Heat]]]


def render(suite: Suite, written: Written, files: Sequence[str]) -> str:
    """The page; ``files`` are the names of what lies beside it. Needs jinja2."""
    return render_page(
        "suite.html",
        suite=suite,
        written=written,
        files=files,
        phases=PHASES,
        marks=MARKS,
        tolerance=TOLERANCE,
        own_maps=lambda name, phase: list(_own_maps(written.analyses.get(name, {}), phase)),
        diverged_of=lambda name, phase: _diverged(written.analyses.get(name, {}), phase),
        matrix_maps=lambda matrices, phase: [
            Map(SIGNAL_TITLES[each.signal], each.columns, _heat(each.rows, each.columns, each.aggregate))
            for each in headline(matrices, phase)
        ],
        matrices_of=lambda matrices, phase: list(headline(matrices, phase)),
        layers_of=lambda matrices, phase: list(layers(matrices, phase)),
        pairs_of=_pairs,
        differing=_differing,
        own_layers=lambda name, phase: list(_own_layers(written.analyses.get(name, {}), phase)),
    )


def _own_maps(analysis: Analysis, phase: Phase) -> Iterator[Map]:
    """What one machine measured of itself: distances between its configs."""
    for signal, cell in analysis.get(phase, {}).items():
        yield Map(SIGNAL_TITLES[signal], cell.configs, _heat(cell.configs, cell.observed_configs, cell.matrix))


def _diverged(analysis: Analysis, phase: Phase) -> list[str]:
    """The runs of one machine that have no decode distance, whatever the signal."""
    found = dict.fromkeys(each for cell in analysis.get(phase, {}).values() for each in cell.diverged)
    return [diverged(each, two=False) for each in found]


def _own_layers(analysis: Analysis, phase: Phase) -> Iterator[tuple[str, str, float | None, float | None]]:
    """(signal, layer, mean distance between configs, largest from the baseline), layer by layer."""
    for signal, cell in analysis.get(phase, {}).items():
        for layer, single in cell.per_layer.items():
            largest = max((each.distance for each in single.within_hardware), default=None)
            yield SIGNAL_TITLES[signal], layer, single.off_diagonal_mean, largest


def _pairs(matrices: Sequence[MatrixReport], phase: Phase) -> list[tuple[str, PairSnr]]:
    return [(SIGNAL_TITLES[each.signal], pair) for each in headline(matrices, phase) for pair in each.pairwise]


def _differing(report: ExperimentReport) -> list[FieldComparison]:
    return [each for each in report.environment if not each.equal]


def _heat(rows: Sequence[str], columns: Sequence[str], values: Table) -> list[tuple[str, list[Heat]]]:
    return heat_rows(rows, columns, values, lambda row, column: row == column)
