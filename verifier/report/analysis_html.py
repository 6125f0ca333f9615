"""An analysis as one self-contained page: no scripts, nothing fetched, every value escaped."""

from __future__ import annotations

from functools import partial

from fpforensics.verifier.analysis import CellAnalysis
from fpforensics.verifier.analysis.environment import mismatches
from fpforensics.verifier.matrix import Ratio, Table, labels
from fpforensics.verifier.report import analysis_words as words
from fpforensics.verifier.report.analysis_view import Study
from fpforensics.verifier.report.pages import Heat, heat_rows, render_page


def render(study: Study) -> str:
    """The page of one experiment, or of one against another.

    Raises :class:`MissingDependencyError` where jinja2 is not installed.
    """

    def heat(cell: CellAnalysis, values: Table) -> list[tuple[str, list[Heat]]]:
        return heat_rows(cell.configs, cell.observed_configs, values, study.is_own)

    return render_page(
        "analysis.html",
        study=study,
        heat=heat,
        label_of=label_of,
        mismatches=mismatches(study.environment),
        by_hardware=partial(words.by_hardware, two=study.two),
        diverged=partial(words.diverged, two=study.two),
        classes=words.classes,
        figure=words.figure,
        setting=words.setting,
        values_of=words.values_of,
    )


def label_of(value: float | None, infinite: bool) -> tuple[str, str]:
    """An SNR's label on the published scale, after the word of the plan's scale that colours it."""
    published, plan = labels(Ratio(value, infinite))
    return plan.partition(" ")[0], published
