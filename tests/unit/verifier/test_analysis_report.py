"""Reports of an analysis: published numbers where the published tables have them, and nothing hostile gets through."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from lab_experiments import PUBLISHED, QUANT, config, published, ranked, rich, write
from lab_reports import HOSTILE, after, numbers, rendered
from page_parser import Page

from fpforensics.common.errors import EvidenceError, MissingDependencyError
from fpforensics.common.lab.reader import open_experiment
from fpforensics.common.lab.run import Run, RunInfo, RunSignals
from fpforensics.verifier.analysis.summary import SummaryRow, failed
from fpforensics.verifier.report import analysis_text

LAB = Path(__file__).resolve().parents[4] / "shared" / "lab"


def test_text_prints_the_published_study(tmp_path: Path) -> None:
    text, page = rendered(*published(tmp_path))
    lines = text.splitlines()
    heads = ["H100_awq", "H100_awq_marlin", "H100_gptq_marlin"]
    for phase, tables in PUBLISHED.items():
        part = after(lines, f"CROSS-HARDWARE COMPARISON ({phase.upper()})")
        assert part[1].strip() == "Rows = claimed config, Cols = verified config"
        for reference, table in enumerate(tables):
            below = after(part, f"--- ref_{reference} ---", "Logprobs (L2 distance):")
            assert below[0].split() == heads
            for name, row, line in zip(QUANT, table, below[1:4], strict=True):
                assert line.split() == [f"A100_{name}", *(f"{value:.2e}" for value in row)]
    # From distances of three digits: the last one of a mean may differ from the published one.
    aggregate = after(lines, "CROSS-HARDWARE COMPARISON (PREFILL)", "AGGREGATE (average across references):")
    assert numbers(aggregate[4:7]) == [
        pytest.approx(row, rel=2e-3)
        for row in ([4.61e-02, 4.85e-02, 4.25], [4.92e-02, 5.29e-02, 4.25], [4.16, 4.15, 4.57e-02])
    ]
    analysis = after(lines, "SNR ANALYSIS", "Off-diagonal (meaningful pairs only, kernel classes excluded):")
    assert analysis[0].startswith("  Logprobs - Count: 6, Mean: 2.82e+00, SNR: 58.")
    assert analysis[0].endswith("× → CLEARLY DETECTABLE (Strong)")
    pairs = after(lines, "PAIRWISE SNR SUMMARY TABLE: LOGPROBS (PREFILL)")[3:6]
    assert [(line.partition("  ")[0], line.rpartition("  ")[2]) for line in pairs] == [
        ("awq vs gptq_marlin", "CLEARLY DETECTABLE (Strong)"),
        ("awq_marlin vs gptq_marlin", "CLEARLY DETECTABLE (Strong)"),
        ("awq vs awq_marlin", "NOT RELIABLY DETECTABLE (Not Detectable)"),
    ]
    assert numbers(pairs) == [
        pytest.approx(row, rel=3e-3)
        for row in ([4.21, 4.59e-02, 91.7], [4.20, 4.93e-02, 85.2], [4.88e-02, 4.95e-02, 1.0])
    ]
    assert numbers(after(lines, "PREFILL vs DECODE COMPARISON")[1:3]) == [
        pytest.approx([58.44], rel=1e-3),
        pytest.approx([52.40], rel=1e-3),
    ]
    shown = Page(page).text
    assert (
        analysis[0].partition("SNR: ")[2].partition(" ")[0] in shown
        and "4.25e+00" in shown
        and "CLEARLY DETECTABLE" in shown
    )


def test_one_file_is_told_whole(tmp_path: Path) -> None:
    text, page = rendered(rich(tmp_path / "rich.json"))
    lines, shown = text.splitlines(), Page(page).text
    assert "Mode:       WITHIN ONE FILE (2 kinds of hardware)" in lines
    assert after(lines, "  ✗ torch_version:")[:2] == [
        "      2.9.0: A_bs1, A_bs2, B_bs1, B_bs2",
        "      2.8.0: A_bs4, B_bs4",
    ]
    for phase in ("PREFILL", "DECODE"):
        part = after(lines, f"WITHIN ONE FILE COMPARISON ({phase})")
        titles = (
            "--- ref_0 ---", "--- ref_1 ---", "AGGREGATE (average across references):", "SNR ANALYSIS",
            "Kernel classes (nothing can tell these configs apart):", "LAYER BY LAYER",
            f"PAIRWISE SNR ANALYSIS ({phase})", f"PAIRWISE SNR SUMMARY TABLE: HIDDEN STATES ({phase})",
            f"FOUR QUESTIONS ({phase})",
        )  # fmt: skip
        after(part, *titles)
        questions = after(part, f"FOUR QUESTIONS ({phase})")
        assert "  ? A_bs1: one repetition" in questions
        assert "  ✓ A_bs2: bit-identical" in questions
        assert "  ✗ B_bs4: bit-identical in logprobs; differs in key vectors, hidden states" in questions
        assert "  NVIDIA A vs NVIDIA B" in questions
    assert "  Logprobs: B_bs1 = B_bs2" in lines
    assert sum(line.endswith("one kernel class") for line in lines) == 6
    layers = after(lines, "LAYER BY LAYER")
    assert [line.split()[:3] for line in layers[2:8]] == [
        [kind, what, layer] for kind, what in (("Key", "vectors"), ("Hidden", "states")) for layer in ("1", "2", "12")
    ]
    for said in (
        "A_bs1 and A_bs4 diverged at step 2 on ref_0: no decode distance",
        "Logprobs: 18 positions not compared, for none of the canonical ids was listed on both sides",
    ):
        assert f"  {said}" in lines and said in shown
    # B_bs4 was not run on ref_1, and B lists none of A's tokens on ref_0 of prefill.
    table = after(lines, "--- ref_1 ---", "Key vectors (L2 distance):")[1:7]
    assert [line.split()[6] for line in table] == ["—"] * 6
    assert after(lines, "--- ref_0 ---", "Logprobs (L2 distance):")[1].split()[4:] == ["—", "—", "—"]
    assert "—" in shown


def test_a_question_says_that_tokens_diverged(tmp_path: Path) -> None:
    """There are two values on one machine: to say that they are needed would be untrue."""

    def run(name: str, token: int, logprob: float) -> Run:
        signals = RunSignals(ranked({1: logprob}))
        return Run(RunInfo(0, name, "ref_0", 0, tokens=(token,)), {"prefill": signals, "decode": signals})

    configurations = [config("A_1", "A", "sdpa"), config("A_2", "A", "eager")]
    runs = [run("A_1", 5, -1.0), run("A_2", 6, -1.5)]
    text, page = rendered(write(tmp_path / "a.json", configurations, runs))
    said = "no decode distance, for the tokens diverged, from step 0 on at the earliest (1 of 1 pair)"
    decode = after(text.splitlines(), "FOUR QUESTIONS (DECODE)")
    assert f"Logprobs: — {said}" in decode and f"Logprobs: {said}." in Page(page).text
    assert "needs two values of quant_method on one machine" not in text + page
    # Where it is so, it is still said what an answer needs.
    assert "Logprobs: — not measured, needs one quant_method on two machines" in decode
    rows = [line for line in text.splitlines() if line.startswith("quantization ")]
    assert [line.split("  ")[-1].strip() for line in rows] == ["—", "tokens diverged from step 0 on"]


def test_a_question_says_that_no_run_could_be_compared(tmp_path: Path) -> None:
    def run(name: str, token: int) -> Run:
        return Run(RunInfo(0, name, "ref_0", 0), {"prefill": RunSignals(ranked({token: -1.0}))})

    configurations = [config("A_1", "A", "sdpa"), config("A_2", "A", "eager")]
    text, _ = rendered(write(tmp_path / "a.json", configurations, [run("A_1", 5), run("A_2", 6)]))
    assert "Logprobs: — not measured between the 1 pair that could answer it: see what was not compared" in text


def test_numbers_are_finite_and_infinity_is_a_word(tmp_path: Path) -> None:
    text, page = rendered(rich(tmp_path / "rich.json"))
    for shown in (text, Page(page).text):
        assert not re.search(r"\bnan\b|infinity", shown, re.IGNORECASE)
    assert "SNR: inf" in text and "SNR inf" in page


def test_a_table_that_would_be_too_wide_numbers_its_columns(tmp_path: Path) -> None:
    text, _ = rendered(rich(tmp_path / "rich.json", prefix="a-rather-long-name,"))
    lines = after(text.splitlines(), "WITHIN ONE FILE COMPARISON (PREFILL)")
    assert lines[2] == "   [1] a-rather-long-name,A_bs1"
    assert any(line.split() == ["[1]", "[2]", "[3]", "[4]", "[5]", "[6]"] for line in lines)


def test_hostile_strings_reach_the_terminal_and_the_page_as_text(tmp_path: Path) -> None:
    plain = Page(rendered(rich(tmp_path / "plain.json"))[1])
    hostile = rich(
        tmp_path / "rich.json", prefix=HOSTILE, experiment_type=HOSTILE, model=HOSTILE, variable_tested=HOSTILE
    )
    other = rich(
        tmp_path / "other.json", prefix=HOSTILE, experiment_type="x", model="y" * 5000, variable_tested=HOSTILE
    )
    for text, rendered_page in (rendered(hostile), rendered(hostile, other)):
        assert all(c.isprintable() or c == "\n" for c in text + rendered_page)
        assert "\\x1b[2J" in text
        assert not any(line.startswith("✓ equal") for line in text.splitlines())
        page = Page(rendered_page)
        page.require_harmless()
        assert page.tags <= plain.tags | {"wbr", "ul", "li"}
        assert "<script>alert(1)</script>" in page.text and "{{7*7}}" in page.text


def test_the_page_stands_alone(tmp_path: Path) -> None:
    for observed in (None, rich(tmp_path / "other.json")):
        page = rendered(rich(tmp_path / "rich.json"), observed)[1]
        Page(page).require_harmless()
        assert "://" not in page and "url(" not in page and "@import" not in page
        assert "default-src 'none'" in page and "prefers-color-scheme: dark" in page


def test_the_summary_has_a_row_for_each_cell() -> None:
    found: dict[str, Any] = {
        "file": f"a/{HOSTILE}.json", "hardware": ("NVIDIA H100", HOSTILE), "experiment": "batch_size", "variable": HOSTILE,
        "phase": "prefill",
    }  # fmt: skip
    rows = [
        SummaryRow(
            **found, signal="logprobs", baseline_l2=0.5264, max_signal_l2=0.6923, snr=1.315,
            snr_infinite=False, detectability="Weak",
        ),
        SummaryRow(
            **found, signal="key_vectors", baseline_l2=0.0, max_signal_l2=2e-5, snr=None, snr_infinite=True,
            detectability="Strong",
        ),
        SummaryRow(
            **found, signal="hidden_states", baseline_l2=None, max_signal_l2=12.5, snr=None, snr_infinite=False,
            detectability="",
        ),
    ]  # fmt: skip
    text = analysis_text.render_summary([*rows, failed("b.json", EvidenceError("runs: an empty list", "in b.json"))])
    assert all(c.isprintable() or c == "\n" for c in text)
    lines = after(text.splitlines(), "DETECTABILITY SUMMARY")
    for name in (
        "File",
        "Hardware",
        "Experiment",
        "Variable",
        "Phase",
        "Signal",
        "Baseline L2",
        "Max Signal L2",
        "SNR",
    ):
        assert name in lines[1]
    assert all(line.startswith("a/\\x1b[2J") and "NVIDIA H100, \\x1b[2J" in line for line in lines[3:6])
    assert lines[6].startswith("b.json ") and lines[6].endswith("—  error: runs: an empty list (in b.json)")
    assert [line.split()[-4:] for line in lines[3:6]] == [
        ["0.5264", "0.6923", "1.31×", "Weak"],
        ["0.0000", "2.00e-05", "inf", "Strong"],
        ["—", "12.5000", "n/a", "—"],
    ]


def test_max_signal_is_not_called_the_largest_distance(tmp_path: Path) -> None:
    """On each machine 2 and 4 are further apart than either is from 1: the plan's sketch does not look at that pair."""

    def run(name: str, logprob: float) -> Run:
        return Run(RunInfo(0, name, "ref_0", 0), {"prefill": RunSignals(ranked({1: logprob}))})

    made = {"A_1": -10.0, "A_2": -9.0, "A_4": -12.0, "B_1": -10.5}
    configurations = [config(name, name[0], int(name[-1])) for name in made]
    experiment = write(tmp_path / "a.json", configurations, (run(*each) for each in made.items()))
    text, page = rendered(experiment)
    (line,) = [each for each in text.splitlines() if each.startswith("quantization ")]
    assert line.split()[-4:] == ["0.5000", "2.0000", "4.00×", "Moderate"]
    assert experiment.metadata["variable_tested"] == "quant_method"
    for shown in (text, " ".join(Page(page).text.split())):
        assert "Max signal: the largest distance from a machine's first config to another one on that machine." in shown
        assert "seen within one hardware? (against its first config)" in shown


def test_a_missing_jinja2_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingDependencyError, match="jinja2"):
        rendered(rich(tmp_path / "rich.json"))


@pytest.mark.skipif(not LAB.is_dir(), reason="the published files are not here")
def test_real_tensor_parallel_files_print_the_published_numbers() -> None:
    claimed = open_experiment(LAB / "tensor_parallel_A100.json")
    text, page = rendered(claimed, open_experiment(LAB / "tensor_parallel_H100.json"), "first")
    aggregate = after(text.splitlines(), "AGGREGATE (average across references):")[4:7]
    assert [line.split()[1:] for line in aggregate] == [
        ["3.60e-01", "2.88e-01", "2.99e-01"],
        ["2.40e-01", "2.33e-01", "3.09e-01"],
        ["2.41e-01", "3.25e-01", "3.55e-01"],
    ]
    assert "  Logprobs: 3.16e-01" in text.splitlines()
    assert "  Logprobs - Count: 6, Mean: 2.84e-01, SNR: 0.90×" in text.splitlines()
    for shown in ("3.60e-01", "2.88e-01", "0.90×", "NOT RELIABLY DETECTABLE"):
        assert shown in Page(page).text


@pytest.mark.skipif(not LAB.is_dir(), reason="the published files are not here")
def test_real_batch_size_file_prints_the_known_baselines() -> None:
    text, page = rendered(open_experiment(LAB / "batch_size_4gpus.json"))
    for known in ("0.495769", "0.526376", "0.449527", "0.548924", "0.576388", "0.456233"):
        assert f" 1    {known}\n" in text
        assert known in Page(page).text
    assert text.count(": bit-identical") == 12
    assert "H100-PCIe_bs1 = H100-PCIe_bs2 = H100-PCIe_bs4; A40_bs2 = A40_bs4" in text
