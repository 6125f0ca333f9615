"""What an SNR means in a report, and where it means nothing: in text, page and picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from check_results import SPECS, sample
from page_parser import Page

from fpforensics.verifier.check import CheckResult
from fpforensics.verifier.distance import Cell
from fpforensics.verifier.matrix import Measurement, build_matrices
from fpforensics.verifier.report import (
    NO_SCALE,
    SAME_KERNELS,
    heatmap,
    html,
    misfits,
    pair_scale,
    scale,
    text,
)

LABELS = ("TRIVIALLY DETECTABLE", "CLEARLY DETECTABLE", "MARGINALLY DETECTABLE", "NOT RELIABLY DETECTABLE")


def test_a_caught_lie_has_no_scale() -> None:
    """Its diagonal is the distance to the false claim: labels by it would say of the lie that it cannot be detected."""
    caught = sample(true="quant=bnb-nf4")
    assert caught.verdict == "INCONSISTENT"
    assert all(each.label == "NOT RELIABLY DETECTABLE" for each in caught.matrices)
    printed, page = text.render(caught), Page(html.render(caught)).text
    for shown in (printed, page):
        assert not any(label in shown for label in LABELS)
        assert "Not Detectable" not in shown
        assert NO_SCALE in shown
    assert printed.count(f"→ {NO_SCALE}") == 6  # two phases, three signals


def test_a_diagonal_that_is_not_the_smallest_of_its_row_has_no_scale() -> None:
    matrix = build_matrices(
        Measurement(row="a", column=column, reference_id="r", distances={Cell("prefill", "logprobs"): distance})
        for column, distance in (("a", 2.0), ("b", 1.0), ("c", 90.0))
    )[0].to_report()
    rows = sample().rows
    assert misfits(matrix, rows) == {"a"}
    assert scale(matrix, {"a"}) == NO_SCALE != scale(matrix, ()) == "CLEARLY DETECTABLE (Strong)"
    (b,) = [pair for pair in matrix.pairwise if pair.b == "b"]
    assert pair_scale(b, {"a"}) == "no scale" and pair_scale(b, ()) == "NOT RELIABLY DETECTABLE (Not Detectable)"
    equal = msgspec.structs.replace(matrix, aggregate=((1.0, 1.0, 90.0),))
    assert misfits(equal, rows) == frozenset()


def test_an_honest_claim_keeps_its_labels() -> None:
    honest = sample(columns=(SPECS[0], "quant=bnb-nf4"))
    printed, page = text.render(honest), Page(html.render(honest)).text
    for shown in (printed, page):
        assert "CLEARLY DETECTABLE" in shown and NO_SCALE not in shown and SAME_KERNELS not in shown


def test_a_zero_diagonal_says_what_it_does_not_say() -> None:
    result = sample(rows=SPECS, claim="", identical=True)
    printed, page = text.render(result), Page(html.render(result)).text
    for shown in (printed, page):
        assert f"inf ({SAME_KERNELS})" in shown
        assert f"inf: {SAME_KERNELS}" in shown


def written(result: CheckResult, path: Path) -> str:
    """Every text of the picture."""
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    drawn: list[str] = []
    with pytest.MonkeyPatch.context() as patch:

        def savefig(figure: Figure, *_: Any, **__: Any) -> None:
            drawn.extend(each.get_text() for each in figure.findobj(Text))

        patch.setattr(Figure, "savefig", savefig)
        heatmap.render_png(result, path)
    return "\n".join(drawn)


def test_the_picture_has_no_scale_either(tmp_path: Path) -> None:
    caught = written(sample(true="quant=bnb-nf4"), tmp_path / "never.png")
    assert caught.count("no scale") == 7 and NO_SCALE in caught and "SNR" not in caught
    honest = written(sample(columns=(SPECS[0], "quant=bnb-nf4")), tmp_path / "never.png")
    assert "SNR" in honest and "no scale" not in honest
    same = written(sample(rows=SPECS, claim="", identical=True), tmp_path / "never.png")
    assert f"inf: {SAME_KERNELS}" in same


def test_a_calibrated_row_shows_its_p_values() -> None:
    result = sample()
    first, *rest = result.rows
    scores = tuple(
        msgspec.structs.replace(score, p_value=p, rejected=p is None or p < 0.01)
        for score, p in zip(first.scores, (1.0, 0.0083, None, *[1.0] * len(first.scores)), strict=False)
    )
    scores = (*scores[:-1], msgspec.structs.replace(scores[-1], p_value=None, rejected=False))
    row = msgspec.structs.replace(
        first, scores=scores, calibration="the profile", alpha=0.01, p_value=0.7, positions=16
    )
    calibrated = msgspec.structs.replace(result, rows=(row, *rest))
    for shown in (text.render(calibrated), html.render(calibrated)):
        assert f"Calibrated by the profile; level 0.01; {row.references} prompts, worth 16 positions" in shown
        assert "p of the claim 0.7" in shown
        assert "0.0083" in shown
        assert "limit" in shown
        assert "not tested" in shown and "p —" not in shown and "claim —" not in shown
        assert "Noise floors, all layers" in shown and "p, early layers" in shown
    single = msgspec.structs.replace(row, references=1, positions=1, p_value=None)
    assert "level 0.01; 1 prompt, worth 1 position of one" in text.render(
        msgspec.structs.replace(calibrated, rows=(single, *rest))
    )
    for shown in (text.render(result), html.render(result)):
        assert "Calibrated by" not in shown and "not tested" not in shown and "early layers</th>" not in shown
        assert (
            "Noise floors, all layers" in shown and "noise floors from" in shown and "over all layers, within" in shown
        )
