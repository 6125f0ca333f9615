"""The built-in profile and the whole decision, on evidence that was recorded on an H100 and on a CPU."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
from bench_modules import bench_module

from fpforensics.verifier.coverage import enough_prompts
from fpforensics.verifier.lanes import ALPHA
from fpforensics.verifier.profile import built_in_profile


@pytest.fixture(scope="module")
def decision() -> ModuleType:
    """``bench/decision.py``, which reads the recorded distances."""
    return bench_module("decision")


def test_built_in_profile_is_what_the_recorded_scores_give() -> None:
    honest = bench_module("honest")
    assert honest.build_profile(honest.load()) == built_in_profile()


def test_built_in_profile_counts_texts_and_has_enough_of_them() -> None:
    """One text under several configs, both ways and in several windows is one prompt: else the least p would be a pretence."""
    honest = bench_module("honest").load()
    assert honest.scores.shape[2] >= enough_prompts(ALPHA)
    for pool in built_in_profile().pools:
        assert pool.prompts == pool.noise_prompts == honest.scores.shape[2]
        assert len(pool.floors) >= pool.prompts * len(honest.rows)


def test_the_most_unusual_honest_prompt_does_not_depend_on_how_often_each_was_cut() -> None:
    """A part is held against one prompt in as many as there are, not against the extreme of all their windows."""
    for pool in built_in_profile().pools:
        beyond = sum(value > pool.far for value in pool.floors), sum(value < pool.least_margin for value in pool.margin)
        assert max(beyond) <= len(pool.floors) // pool.prompts
        assert pool.far < pool.floors[-1] and pool.least_margin > pool.margin[0]


def test_accuracy_of_early_layers_on_recorded_evidence(decision: ModuleType) -> None:
    """The published finding: block 1's hidden state tells the four kernels apart, the logits do not."""
    directions = decision.load()
    assert decision.accuracy(directions, "hidden_states/1", 64) == 1.0
    assert decision.accuracy(directions, "hidden_states/1", 16) > 0.98
    assert decision.accuracy(directions, "logprobs", 64) < 0.7


@pytest.mark.parametrize(("prompts", "count"), [(1, 3), (3, 16), (8, 64)])
def test_error_rates_of_whole_verdicts_on_recorded_evidence(decision: ModuleType, prompts: int, count: int) -> None:
    """Honest claims are not accused, gross lies are always caught; the profile holds none of these prompts."""
    rng, profile = np.random.default_rng(1), built_in_profile()
    accused = honest = vouched = 0
    for case in decision.cases(decision.load()):
        found = decision.verdicts(case, profile, prompts, count, 20, rng)
        if case.honest:
            accused, honest, vouched = accused + found["INCONSISTENT"], honest + 20, vouched + found["CONSISTENT"]
            continue
        assert found["CONSISTENT"] == 0, (case.row, case.claimed)
        if case.claimed not in decision.KERNELS or case.row not in decision.KERNELS:
            assert found["INCONSISTENT"] == 20, (case.row, case.claimed)
        elif count >= 16:
            assert found["INCONSISTENT"] >= 18, (case.row, case.claimed)
    assert honest == 300
    assert accused / honest <= ALPHA
    if count >= 16:
        assert vouched / honest >= 0.9
