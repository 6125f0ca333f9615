"""Reports of a check in all their forms: they say the same, nothing hostile gets through, a picture is a picture."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from check_results import SPECS, environment, facts, hostile_sample, sample
from hypothesis import given
from hypothesis import strategies as st
from page_parser import Page

from fpforensics.common.config import claim_of, parse_config
from fpforensics.common.errors import MissingDependencyError
from fpforensics.verifier.check import CheckResult
from fpforensics.verifier.distance import Cell
from fpforensics.verifier.environment_diff import compare_environments
from fpforensics.verifier.report import (
    caveats,
    heatmap,
    html,
    log_scale,
    text,
)


def test_the_lineup_says_whole_what_each_member_ran_as() -> None:
    """The weights are pinned by digest in what is run: that is no difference, and a short name of one would mislead."""
    result = sample()
    nf4 = parse_config("quant=bnb-nf4")
    ran = msgspec.structs.replace(nf4, weights_digest="sha256:" + "0" * 64, matmul="fp32-rounded")
    (member,) = [each for each in result.lineup if each.id == "quant=bnb-nf4"]
    result = msgspec.structs.replace(result, lineup=(msgspec.structs.replace(member, config=nf4, runs_as=ran),))
    printed, page = text.render(result), Page(html.render(result)).text
    for shown in (printed, page):
        assert str(claim_of(ran)) in shown
    assert "quant=bnb-nf4,attn=sdpa" in str(claim_of(ran)) and "matmul=fp32-rounded" in str(claim_of(ran))


def test_what_is_under_test_is_no_software_difference() -> None:
    lie = compare_environments(
        environment(),
        facts(quantization_kernel="bnb"),
        environment(),
        facts(),
        tested={"quantization"},
    )
    result = sample(environment=lie)
    printed, page = text.render(result), Page(html.render(result)).text
    assert "What the claim or the lineup is about:\n  ✓ quantization: prover=bnb, verifier=none" in printed
    assert "⚠" not in printed and "unexpected" not in page
    assert "quantization under test" in " ".join(page.split())


def test_ink_is_readable_on_every_page() -> None:
    """Where a cell is neither light nor dark, its ink is mixed by the same rule on both kinds of pages."""
    rules = [each for each in html.render(sample()).splitlines() if "--switch" in each]
    assert len(rules) == 3  # light, dark, and what uses it


def test_verdicts_reasons_and_what_it_cannot_tell_are_in_text_and_page() -> None:
    caught = sample(true="quant=bnb-nf4")
    printed, page = text.render(caught), Page(html.render(caught)).text
    for shown in (printed, page):
        assert "INCONSISTENT" in shown
        assert "further from the claimed config than rounding explains" in shown
        assert "quant=bnb-nf4, which contradicts the claim, fits better" in shown
        assert "Could not be run here, so were not compared: attn=flash_attention_2." in shown
        assert "no error rate is known for this verdict" in shown
    assert printed.splitlines()[-1] == "✗ INCONSISTENT"


def test_an_error_rate_is_named_where_a_calibration_gave_one() -> None:
    result = sample()
    (row,) = result.rows
    calibrated = msgspec.structs.replace(row, config_id="other", calibration="h100-cpu-1", alpha=0.01)
    only = " ".join(caveats(msgspec.structs.replace(result, rows=(calibrated,))))
    assert "The error rate is that of the calibration h100-cpu-1" in only and "fixed" not in only
    both = " ".join(caveats(msgspec.structs.replace(result, rows=(row, calibrated))))
    assert f"no error rate is known for the verdict on {row.config_id}." in both and "h100-cpu-1" in both


def test_kernel_classes_and_bit_identity_are_named() -> None:
    result = sample(rows=SPECS, claim="", same=((SPECS[0], SPECS[3]),), identical=True)
    named = f"{SPECS[0]} = {SPECS[3]}"
    printed, page = text.render(result), Page(html.render(result)).text
    for shown in (printed, page):
        assert f"The claim covers a kernel class: {named}" in shown
        assert "one kernel class" in shown and "identical" in shown and "inf" in shown
        assert "nan" not in shown.lower()
    assert f"Kernel class (bit-identical on this machine): {named}" in printed


def test_a_result_that_went_over_the_wire_prints_the_same() -> None:
    result = sample(rows=SPECS, claim="", identical=True)
    received = msgspec.json.decode(msgspec.json.encode(result), type=CheckResult)
    assert text.render(received) == text.render(result)
    assert html.render(received) == html.render(result)


def test_hostile_strings_reach_the_page_as_text() -> None:
    rendered = html.render(hostile_sample())
    page, plain = Page(rendered), Page(html.render(sample()))
    assert page.tags <= plain.tags | {"wbr"}
    assert page.attributes <= plain.attributes
    page.require_harmless()
    assert all(c.isprintable() or c == "\n" for c in rendered)
    assert "<script>alert(1)</script>" in page.text and "{{7*7}}" in page.text


def test_page_stands_alone() -> None:
    page = html.render(sample())
    assert "://" not in page and "url(" not in page and "@import" not in page
    assert "default-src 'none'" in page and "prefers-color-scheme: dark" in page


def test_page_shows_layers_in_noise_floors() -> None:
    result = sample()
    lines = html.layer_lines(result.rows[0], result.matrices)
    assert len(lines) == len(result.rows[0].noise) == 14
    first = lines[0]
    logprobs = next(each for each in result.matrices if each.phase == first.phase and not each.layer)
    noise = next(each.noise for each in result.rows[0].noise if each.cell == Cell(first.phase, "logprobs"))
    own = logprobs.aggregate[0][0]
    assert own is not None and first.members[0].own and first.members[0].shown == f"{own / noise:.2f}"


@pytest.mark.parametrize("make", [sample, hostile_sample, lambda: sample(rows=SPECS, identical=True)])
def test_picture_is_a_picture_with_something_in_it(make: Callable[[], CheckResult], tmp_path: Path) -> None:
    import matplotlib.image

    path = tmp_path / "heat.png"
    heatmap.render_png(make(), path)
    pixels = matplotlib.image.imread(path)
    assert 500 < pixels.shape[0] < 4000 and 800 < pixels.shape[1] < 4000
    assert len(np.unique(pixels[..., :3].sum(axis=2))) > 100


@pytest.mark.parametrize(("module", "call"), [("jinja2", html.render), ("matplotlib.figure", None)])
def test_what_is_not_installed_is_named_with_its_install_command(
    module: str, call: Callable[[CheckResult], str] | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError) as caught:
        call(sample()) if call else heatmap.render_png(sample(), tmp_path / "never.png")
    assert "pip install '.[report]'" in caught.value.diagnostics()
    assert not list(tmp_path.iterdir())


def test_an_auditor_needs_neither_torch_nor_a_plotting_library() -> None:
    code = (
        "import sys; from fpforensics.verifier.report import heatmap, html, text;"
        "print(sorted({'torch', 'transformers', 'matplotlib', 'jinja2', 'grpc'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@given(st.lists(st.one_of(st.just(0.0), st.just(float("nan")), st.floats(1e-12, 1e12)), min_size=1))
def test_colours_keep_the_order_of_the_distances(values: list[float]) -> None:
    array = np.array(values)
    scaled = log_scale(array)
    assert np.array_equal(np.isnan(scaled), np.isnan(array))
    known = ~np.isnan(array)
    assert ((scaled[known] >= 0) & (scaled[known] <= 1)).all()
    assert np.array_equal(scaled[known] == 0, array[known] == 0)
    order = np.argsort(array[known], kind="stable")
    assert (np.diff(scaled[known][order]) >= 0).all()
