"""The report as one self-contained page: no scripts, nothing fetched, every value escaped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fpforensics.common.config import claim_of
from fpforensics.common.signals import PHASES, Phase
from fpforensics.verifier.decision import RowVerdict
from fpforensics.verifier.distance import POOLED
from fpforensics.verifier.environment_diff import mismatches
from fpforensics.verifier.matrix import MatrixReport, Table
from fpforensics.verifier.report import (
    NO_SCALE,
    OVER_ALL_LAYERS,
    SAME_KERNELS,
    SIGNAL_TITLES,
    calibrated,
    caveats,
    floors,
    headline,
    layers,
    log_scale,
    misfits,
    noted,
    p_value,
    pair_decision,
    pair_scale,
    row_snr,
    scale,
)
from fpforensics.verifier.report.pages import Heat, heat_rows, render_page

if TYPE_CHECKING:
    from fpforensics.verifier.check import CheckResult


@dataclass(frozen=True)
class LayerLine:
    """One cell of the trace (phase, signal, layer) with every member's distance in noise floors."""

    phase: Phase
    signal: str
    layer: str
    members: tuple[Heat, ...]


def render(result: CheckResult) -> str:
    """The page. Raises :class:`MissingDependencyError` where jinja2 is not installed."""
    shown = [matrix for phase in PHASES for matrix in headline(result.matrices, phase)]
    return render_page(
        "page.html",
        result=result,
        some_infinite=any(matrix.snr_infinite for matrix in shown),
        some_unfit=any(misfits(matrix, result.rows) for matrix in shown),
        phases=[phase for phase in PHASES if headline(result.matrices, phase)],
        headline=lambda phase: headline(result.matrices, phase),
        layers=lambda phase: layers(result.matrices, phase),
        matrix_rows=_matrix_rows,
        layer_lines=lambda row: layer_lines(row, result.matrices),
        row_snr=row_snr,
        calibrated=calibrated,
        p_value=p_value,
        misfits=lambda matrix: misfits(matrix, result.rows),
        scale=scale,
        pair_scale=pair_scale,
        pair_decision=pair_decision,
        over_all_layers=OVER_ALL_LAYERS,
        noted=noted,
        no_scale=NO_SCALE,
        same_kernels=SAME_KERNELS,
        run_as=lambda member: str(claim_of(member.runs_as)),
        bar=bar,
        caveats=caveats(result),
        mismatches=mismatches(result.environment),
    )


def layer_lines(row: RowVerdict, matrices: tuple[MatrixReport, ...]) -> list[LayerLine]:
    """One row's distances in noise floors, cell by cell, for the members in the order of ``row.scores``."""
    found = {(each.phase, each.signal, each.layer): each for each in matrices if each.layer != POOLED}
    noise = {(each.cell.phase, each.cell.signal, each.cell.layer): each.noise for each in row.noise}
    members = [score.id for score in row.scores]
    lines: list[tuple[tuple[Phase, str, str], list[float]]] = []
    for key, matrix in found.items():
        if row.config_id in matrix.rows and noise.get(key):
            aggregate = dict(zip(matrix.columns, matrix.aggregate[matrix.rows.index(row.config_id)], strict=True))
            values = [aggregate.get(name) for name in members]
            in_floors = [np.nan if value is None else value / noise[key] for value in values]
            lines.append(((key[0], SIGNAL_TITLES[key[1]], key[2]), in_floors))
    if not lines:
        return []
    scaled = log_scale(np.array([values for _, values in lines]))
    return [
        LayerLine(
            *key,
            tuple(
                Heat(
                    "—" if np.isnan(value) else floors(value),
                    None if np.isnan(heat) else float(heat),
                    name == row.config_id,
                )
                for name, value, heat in zip(members, values, heats, strict=True)
            ),
        )
        for (key, values), heats in zip(lines, scaled, strict=True)
    ]


def bar(row: RowVerdict, value: float | None) -> str:
    """The length of a member's bar in percent, by log(1 + noise floors)."""
    longest = max((score.floors or 0.0 for score in row.scores), default=0.0)
    if not value:
        return "0"
    return f"{100 * np.log1p(value) / np.log1p(max(longest, 3.0)):.1f}"


def _matrix_rows(matrix: MatrixReport, values: Table) -> list[tuple[str, list[Heat]]]:
    return heat_rows(matrix.rows, matrix.columns, values, lambda row, column: row == column)
