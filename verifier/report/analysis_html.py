"""An analysis as one self-contained page: no scripts, nothing fetched, every value escaped."""

from __future__ import annotations

from fpforensics.common.lab.reader import Experiment
from fpforensics.verifier.analysis import Analysis, Canonical, CellAnalysis
from fpforensics.verifier.analysis.environment import mismatches
from fpforensics.verifier.matrix import Ratio, Table, labels
from fpforensics.verifier.report import analysis_view
from fpforensics.verifier.report.pages import Heat, heat_rows, render_page


def render(analysis: Analysis, claimed: Experiment, observed: Experiment | None, canonical: Canonical, top: int) -> str:
    """The page of one experiment, or of one against another; ``canonical`` and ``top`` say how it was analyzed.

    Raises :class:`MissingDependencyError` where jinja2 is not installed.
    """
    study = analysis_view.Study(analysis, claimed, observed, canonical, top)

    def heat(cell: CellAnalysis, values: Table) -> list[tuple[str, list[Heat]]]:
        return heat_rows(cell.configs, cell.observed_configs, values, study.is_own)

    return render_page(
        "analysis.html",
        study=study,
        heat=heat,
        label_of=label_of,
        mismatches=mismatches(study.environment),
        by_hardware=analysis_view.by_hardware,
        classes=analysis_view.classes,
        diverged=analysis_view.diverged,
        figure=analysis_view.figure,
        setting=analysis_view.setting,
        values_of=analysis_view.values_of,
    )


def label_of(value: float | None, infinite: bool) -> tuple[str, str]:
    """An SNR's label on the published scale, after the word of the plan's scale that colours it."""
    published, plan = labels(Ratio(value, infinite))
    return plan.partition(" ")[0], published
