"""One picture of a check: claimed × verified heat maps, a row for each signal and a column for each phase."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fpforensics.common.errors import MissingDependencyError
from fpforensics.common.signals import PHASES, SIGNALS
from fpforensics.verifier.matrix import MatrixReport
from fpforensics.verifier.report import NO_SCALE, SAME_KERNELS, SIGNAL_TITLES, clean, headline, log_scale, misfits, snr

if TYPE_CHECKING:
    from fpforensics.verifier.check import CheckResult

_VERDICT_COLOURS = {"CONSISTENT": "#1a7f4b", "INCONSISTENT": "#b3261e", "INCONCLUSIVE": "#8a6100"}
_INK, _FAINT = "#1d2530", "#66707d"
_COLOURS = ("#f4f1e8", "#c9ddd9", "#7fb0c2", "#3a76a3", "#173a6b")
_SOFT_BREAK, _HARD_BREAK = 16, 20  # characters in a line of a label
_WIDEST = 12_000  # pixels


def render_png(result: CheckResult, path: Path) -> None:
    """Write the picture. Raises :class:`MissingDependencyError` where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError:
        raise MissingDependencyError("the heat map", "matplotlib", "pip install '.[report]'") from None

    panels = {(each.signal, each.phase): each for phase in PHASES for each in headline(result.matrices, phase)}
    phases = [phase for phase in PHASES if any(key[1] == phase for key in panels)]
    signals = [signal for signal in SIGNALS if any(key[0] == signal for key in panels)]
    rows = max(len(each.rows) for each in panels.values())
    columns = max(len(each.columns) for each in panels.values())
    lines = max(_wrapped(name).count("\n") + 1 for each in panels.values() for name in each.columns)
    notes = ["verified config · mean L2 distance, log colour scale for each map"]
    if any(misfits(matrix, result.rows) for matrix in panels.values()):
        notes.append(NO_SCALE)
    if any(matrix.snr_infinite for matrix in panels.values()):
        notes.append(f"inf: {SAME_KERNELS}")
    width = 1.9 + len(phases) * max(1.1 * columns + 0.3, 3.0)
    figure = Figure(
        figsize=(width, 1.15 + 0.15 * len(notes) + 0.17 * lines + len(signals) * (0.52 * rows + 0.6)),
        dpi=min(150.0, _WIDEST / width),
        layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08, wspace=0.03, hspace=0.03),
        facecolor="white",
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(signals), len(phases), squeeze=False)
    for i, signal in enumerate(signals):
        for j, phase in enumerate(phases):
            matrix = panels.get((signal, phase))
            if matrix is None:
                axes[i, j].set_axis_off()
            else:
                unfit = bool(misfits(matrix, result.rows))
                _draw(axes[i, j], matrix, first=j == 0, lowest=i == len(signals) - 1, unfit=unfit)
    claim = clean(result.claim, 90) or "each row's own declaration"
    title = figure.suptitle(f"{result.verdict}   claim: {claim}", weight="bold", size=12, x=0.02, ha="left")
    title.set(color=_VERDICT_COLOURS[result.verdict], parse_math=False)
    figure.supxlabel("\n".join(notes), color=_FAINT, size=8)
    figure.supylabel("claimed config", color=_FAINT, size=8)
    figure.savefig(path, format="png", metadata={"Software": "fpforensics"})


def _draw(axis: Any, matrix: MatrixReport, *, first: bool, lowest: bool, unfit: bool) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    values = np.array(matrix.aggregate, dtype=np.float64)  # None becomes NaN
    heat = log_scale(values)
    colours = LinearSegmentedColormap.from_list("distance", _COLOURS).with_extremes(bad="#ffffff")
    axis.imshow(heat, cmap=colours, vmin=0.0, vmax=1.0, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        own = matrix.rows[row] == matrix.columns[column]
        ink = "white" if heat[row, column] > 0.55 else _INK
        axis.text(
            column,
            row,
            "—" if np.isnan(value) else "0" if value == 0 else f"{value:.2e}",
            ha="center",
            va="center",
            size=8.5,
            weight="bold" if own else "normal",
            color=ink,
        ).set_in_layout(False)  # inside its axes anyway, and costly to lay out
        if own:
            _outline(axis, row, column, ink)
    ratio = "no scale" if unfit else f"SNR {snr(matrix.snr_meaningful, matrix.snr_meaningful_infinite)}"
    title = f"{SIGNAL_TITLES[matrix.signal]}, {matrix.phase}"
    axis.set_title(title, loc="left", size=9.5, weight="bold", color=_INK)
    axis.set_title(ratio, loc="right", size=8.5, color=_FAINT)
    _ticks(axis.xaxis, matrix.columns if lowest else [""] * len(matrix.columns))
    _ticks(axis.yaxis, matrix.rows if first else [""] * len(matrix.rows))
    axis.set_xticks(np.arange(len(matrix.columns) + 1) - 0.5, minor=True)
    axis.set_yticks(np.arange(len(matrix.rows) + 1) - 0.5, minor=True)
    axis.grid(which="minor", color="white", linewidth=2)
    axis.tick_params(which="both", length=0, labelsize=7.5, labelcolor=_INK)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _outline(axis: Any, row: int, column: int, ink: str) -> None:
    from matplotlib.patches import Rectangle

    corner = (column - 0.46, row - 0.44)
    frame = Rectangle(corner, 0.92, 0.88, fill=False, edgecolor=ink, linewidth=1.3)
    axis.add_patch(frame).set_in_layout(False)


def _ticks(axis: Any, names: Sequence[str]) -> None:
    axis.set_ticks(range(len(names)), [_wrapped(name) for name in names])
    for label in axis.get_ticklabels():
        label.set_parse_math(False)  # a hostile name must not be typeset as a formula


def _wrapped(name: str) -> str:
    """A config id on several lines: broken after commas, and within a part only if that alone is too long."""
    lines: list[str] = []
    for part in re.findall("[^,]*,|[^,]+$", clean(name, 96)):
        pieces = [part[start : start + _HARD_BREAK] for start in range(0, len(part), _HARD_BREAK)]
        if lines and len(lines[-1]) + len(pieces[0]) <= _SOFT_BREAK:
            lines[-1] += pieces.pop(0)
        lines += pieces
    return "\n".join(lines)
