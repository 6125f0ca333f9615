"""Reports of an analysis as text and as a page, and the way around in them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fpforensics.common.lab.reader import Experiment
from fpforensics.verifier.analysis import Canonical, analyze
from fpforensics.verifier.report import analysis_html, analysis_text
from fpforensics.verifier.report.analysis_view import Study

HOSTILE = "\x1b[2J\x07\u202e<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{7*7}}\r\n✓ equal"


def rendered(
    claimed: Experiment, observed: Experiment | None = None, canonical: Canonical = "claimed"
) -> tuple[str, str]:
    study = Study(analyze(claimed, observed, canonical=canonical), claimed, observed)
    return analysis_text.render(study), analysis_html.render(study)


def after(lines: Sequence[str], *titles: str) -> list[str]:
    """The lines after the first one that is the last of ``titles``, sought after the one before it."""
    rest = list(lines)
    for title in titles:
        rest = rest[rest.index(title) + 1 :]
    return rest


def numbers(lines: Sequence[str]) -> list[list[float]]:
    """The figures of each line."""
    return [[float(each) for each in re.findall(r"(?<=\s)\d[\d.]*(?:e[-+]\d\d)?(?=×|\s|$)", line)] for line in lines]
