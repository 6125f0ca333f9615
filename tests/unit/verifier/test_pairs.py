"""Pairs of configs: the published studies' cases, both kinds of resolved, and the error rate on simulated prompts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fpforensics.common.errors import UsageError
from fpforensics.common.lab.reader import open_experiment
from fpforensics.verifier.analysis import analyze
from fpforensics.verifier.pairs import decide_aggregate, decide_pair, decide_pairs, holm, t_quantile, tolerance

LAB = Path(__file__).parents[4] / "shared" / "lab"
# Published quantization study, prefill: per reference, rows awq, awq_marlin, gptq_marlin.
QUANT = np.array(
    [
        [[4.41e-02, 6.56e-02, 4.74e00], [4.86e-02, 8.24e-02, 4.73e00], [4.72e00, 4.70e00, 2.29e-02]],
        [[5.70e-02, 5.25e-02, 4.01e00], [3.26e-02, 3.50e-02, 3.98e00], [3.80e00, 3.79e00, 6.34e-02]],
        [[4.12e-02, 3.96e-02, 4.01e00], [4.44e-02, 3.09e-02, 4.01e00], [3.85e00, 3.87e00, 4.14e-02]],
        [[4.20e-02, 3.61e-02, 4.26e00], [7.11e-02, 6.35e-02, 4.28e00], [4.27e00, 4.26e00, 5.51e-02]],
    ]
)


def of(matrix: np.ndarray, a: int, b: int) -> tuple[list[float], list[float]]:
    return ((matrix[:, a, b] + matrix[:, b, a]) / 2).tolist(), ((matrix[:, a, a] + matrix[:, b, b]) / 2).tolist()


def test_published_quantization_study() -> None:
    assert decide_pair(*of(QUANT, 0, 2)).verdict == "DETECTABLE"
    assert decide_pair(*of(QUANT, 1, 2)).verdict == "DETECTABLE"
    assert decide_pair(*of(QUANT, 0, 1)).verdict != "DETECTABLE"


@pytest.mark.parametrize(
    ("signal", "noise", "verdict"),
    [
        ((12.9 + 12.7) / 2, (0.851 + 0.723) / 2, "DETECTABLE"),  # eager, sdpa: keys, prefill
        ((3.52 + 8.38) / 2, (0.748 + 0.246) / 2, "DETECTABLE"),  # logprobs, prefill
        ((4.48 + 2.37) / 2, (0.778 + 0.453) / 2, "DETECTABLE"),  # keys, decode
        ((0.594 + 0.687) / 2, (0.723 + 0.834) / 2, "NOT_DETECTABLE"),  # sdpa, flash_attention_2
        ((0.226 + 0.199) / 2, (0.246 + 0.179) / 2, "NOT_DETECTABLE"),
    ],
)
def test_published_attention_study_from_its_aggregates(signal: float, noise: float, verdict: str) -> None:
    assert decide_aggregate(signal, noise, prompts=6).verdict == verdict


def test_published_tensor_parallel_study_is_never_detectable() -> None:
    if not LAB.exists():
        pytest.skip("the published recordings are not beside this repository")
    with (
        open_experiment(LAB / "tensor_parallel_A100.json") as a100,
        open_experiment(LAB / "tensor_parallel_H100.json") as h100,
    ):
        for canonical in ("first", "claimed"):
            cell = analyze(a100, h100, canonical=canonical)["prefill"]["logprobs"]  # type: ignore[arg-type]
            assert len(cell.pairwise) == 3
            for pair in cell.pairwise:
                assert pair.decision is not None
                assert pair.decision.verdict in ("UNRESOLVED", "NOT_DETECTABLE")
                assert pair.decision.prompts == 3


def test_without_noise_equality_decides() -> None:
    assert decide_pair([0.1, 0.2], [0.0, 0.0]).verdict == "DETECTABLE"
    assert decide_pair([0.0, 0.0], [0.0, 0.0]).verdict == "NOT_DETECTABLE"
    assert decide_pair([0.0, 0.2], [0.0, 0.0]).verdict == "UNRESOLVED"


def test_a_ratio_beyond_float64_has_no_number() -> None:
    """Rather than an overflow, or an infinity that JSON has no word for."""
    for found in (
        decide_pair([1e300], [1e-300]),
        decide_pair([1e300, 1e301], [1e-300, 1e-301]),
        decide_aggregate(1e300, 1e-300),
    ):
        assert (found.verdict, found.snr) == ("DETECTABLE", None)
    assert decide_pair([1e308, 1e308], [0.0, 5e-324]).snr is None
    assert decide_aggregate(1e-300, 1e300).verdict == "NOT_DETECTABLE"
    assert decide_pair([3.0], [2.0]).snr == pytest.approx(1.5, rel=1e-12)
    assert decide_aggregate(3.0, 2.0).snr == pytest.approx(1.5, rel=1e-12)


def test_more_prompts_resolve_and_their_number_is_said() -> None:
    open_ = decide_pair([3.0, 4.0, 3.5], [1.0, 1.3, 0.9])
    assert open_.verdict == "UNRESOLVED"
    assert open_.prompts_needed is not None and open_.prompts_needed > 3
    rng = np.random.default_rng(0)
    many = decide_pair((3.5 * np.exp(rng.normal(0, 0.15, 64))).tolist(), np.exp(rng.normal(0, 0.18, 64)).tolist())
    assert many.verdict == "DETECTABLE"


def test_tolerance_factors_are_the_tabulated_ones() -> None:
    """Odeh and Owen's tables: n = 4 and 10, 95 % confidence."""
    assert tolerance(4, 0.9) == pytest.approx(4.162, rel=0.02)
    assert tolerance(10, 0.99) == pytest.approx(3.981, rel=0.02)
    assert t_quantile(4) == pytest.approx(2.353, rel=0.02)


@pytest.mark.parametrize("count", [3, 6, 24])
def test_configs_that_are_the_same_are_hardly_ever_called_detectable(count: int) -> None:
    rng = np.random.default_rng(count)
    found = [
        decide_pair(np.exp(rng.normal(0, 0.4, count)).tolist(), np.exp(rng.normal(0, 0.4, count)).tolist()).verdict
        for _ in range(500)
    ]
    assert found.count("DETECTABLE") == 0
    far = [
        decide_pair(
            (2.0 * np.exp(rng.normal(0, 0.4, count))).tolist(), np.exp(rng.normal(0, 0.4, count)).tolist()
        ).verdict
        for _ in range(500)
    ]
    assert far.count("NOT_DETECTABLE") <= 0.08 * len(far), "an equivalence test errs at most one time in twenty"


def test_holm_stops_at_the_first_that_fails() -> None:
    assert holm([0.04, 0.001, 0.02]) == [1, 2, 0]
    assert holm([0.04, 0.001, 0.03]) == [1], "0.03 > 0.05 / 2, and 0.04 comes after it"
    assert holm([0.06]) == []
    assert holm([]) == []


def test_many_pairs_need_more_than_one_does() -> None:
    rng = np.random.default_rng(1)
    signal, noise = (4.3 * np.exp(rng.normal(0, 0.25, 8))).tolist(), np.exp(rng.normal(0, 0.25, 8)).tolist()
    alike = (noise[::-1], noise)
    assert decide_pair(signal, noise).verdict == "DETECTABLE"
    together = decide_pairs([(signal, noise), *([alike] * 30)])
    assert together[0].verdict == "UNRESOLVED"
    assert together[0].prompts_needed is not None and together[0].prompts_needed > 8
    assert {each.verdict for each in together[1:]} <= {"NOT_DETECTABLE", "UNRESOLVED"}


def test_wrong_input_is_refused() -> None:
    with pytest.raises(UsageError, match="2 signals and 1 noises"):
        decide_pair([1.0, 2.0], [1.0])
