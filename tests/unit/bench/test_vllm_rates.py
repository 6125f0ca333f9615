"""Many prompts of vLLM on an H200 against a CPU: honest claims stand, and early layers see ranks and dtypes."""

from __future__ import annotations

import pytest
from vllm_rates import RUNS, Recorded, load, rejected, rejected_by_logprobs, rejected_together


@pytest.fixture(scope="module")
def recorded() -> Recorded:
    return load()


@pytest.mark.parametrize("run", RUNS)
def test_honest_prompts_are_not_accused(recorded: Recorded, run: str) -> None:
    assert rejected(recorded, run, run, 16).mean() <= 0.01
    assert rejected_together(recorded, run, run, 3, wanted=200) == 0.0


@pytest.mark.parametrize(("ran", "claimed"), [("tp=1", "tp=2"), ("tp=2", "tp=1")])
def test_early_layers_see_ranks_where_log_probabilities_do_not(recorded: Recorded, ran: str, claimed: str) -> None:
    assert rejected(recorded, ran, claimed, 64).mean() > 0.7
    assert rejected_together(recorded, ran, claimed, 3, wanted=200) > 0.75
    assert rejected_by_logprobs(recorded, ran, claimed, 64) < 0.02


@pytest.mark.parametrize(("ran", "claimed"), [("dtype=fp16", "tp=1"), ("tp=1", "dtype=fp16")])
def test_dtypes_are_told_apart_at_eight_positions(recorded: Recorded, ran: str, claimed: str) -> None:
    assert rejected(recorded, ran, claimed, 8).min() == 1.0
