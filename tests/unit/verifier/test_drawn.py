"""Sampled tokens: what a seed draws is never doubted, whatever is listed; what it does not draw is, once a listed token beats it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fpforensics.common.sampling import choose, gumbel_noise
from fpforensics.common.signals import Array, Sampling
from fpforensics.verifier.drawn import Position, contradiction

VOCABULARY = 60


def listed(logprobs: Array, token: int, count: int, step: int = 0) -> Position:
    """The highest ``count`` log-probabilities, as engines list them: of equals, any."""
    shuffled = np.random.default_rng(count).permutation(len(logprobs))
    ids = shuffled[np.argsort(-logprobs[shuffled], kind="stable")][:count]
    return Position(ids.astype(np.int32), logprobs[ids], token, float(logprobs[token]), step)


def distribution(seed: int, spread: float, ties: bool) -> Array:
    logits = np.random.default_rng(seed).normal(0, spread, VOCABULARY)
    logits = np.round(logits) if ties else logits
    logits -= logits.max()
    return (logits - np.log(np.exp(logits).sum())).astype(np.float32)


drawings = st.builds(
    Sampling,
    temperature=st.floats(1e-3, 100),
    top_p=st.just(1.0) | st.floats(0.01, 1.0),
    seed=st.integers(0, 2**64 - 1),
)


@settings(deadline=None, max_examples=300)
@given(
    sampling=drawings,
    logprobs=st.builds(distribution, st.integers(0, 999), st.floats(0.01, 300), st.booleans()),
    count=st.integers(1, VOCABULARY),
    step=st.integers(0, 99),
)
def test_what_was_drawn_is_never_doubted(sampling: Sampling, logprobs: Array, count: int, step: int) -> None:
    token = choose(logprobs, sampling, "ref_0", step)
    assert contradiction(listed(logprobs, token, count, step), sampling, "ref_0", VOCABULARY) == ""


@settings(deadline=None)
@given(
    sampling=drawings,
    logprobs=st.builds(distribution, st.integers(0, 999), st.floats(0.5, 5), st.just(False)),
    other=st.integers(0, VOCABULARY - 1),
)
def test_where_all_is_listed_no_other_token_passes(sampling: Sampling, logprobs: Array, other: int) -> None:
    drawn = choose(logprobs, sampling, "ref_0", 3)
    scores = logprobs / sampling.temperature + gumbel_noise(sampling.seed, "ref_0", 3, VOCABULARY)
    assume(other == drawn or abs(scores[drawn] - scores[other]) > 1e-4 / sampling.temperature)  # no near tie
    said = contradiction(listed(logprobs, other, VOCABULARY, 3), sampling, "ref_0", VOCABULARY)
    assert (said == "") == (other == drawn)


def test_of_equals_at_the_end_of_the_list_the_unlisted_one_may_have_been_drawn() -> None:
    logprobs = np.log(np.array([0.6, 0.2, 0.2], dtype=np.float32))
    for seed in range(200):
        sampling = Sampling(temperature=1.0, top_p=0.7, seed=seed)
        token = choose(logprobs, sampling, "ref_0", 0)
        ids = np.array([0, 2], np.int32)
        at = Position(ids, logprobs[ids], token, float(logprobs[token]), 0)
        assert contradiction(at, sampling, "ref_0", 3) == ""


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_two_of_sixty_say_enough_of_the_nucleus(temperature: float) -> None:
    logprobs = distribution(3, 2.0, ties=False)
    second = listed(logprobs, int(np.argsort(-logprobs)[1]), 2)
    first_share = 1 / float(np.exp((logprobs - logprobs.max()) / temperature).sum())
    wide, narrow = (Sampling(temperature=temperature, top_p=share * first_share) for share in (1.2, 0.8))
    assert "nucleus" not in contradiction(second, wide, "ref_0", VOCABULARY)
    assert "nucleus" in contradiction(second, narrow, "ref_0", VOCABULARY)


def test_of_ten_that_are_listed_most_foreign_tokens_are_beaten() -> None:
    sampling = Sampling(temperature=1.0)
    rng = np.random.default_rng(0)
    doubted = [
        contradiction(
            listed(distribution(number, 3.0, ties=False), int(rng.integers(VOCABULARY)), 10, number),
            sampling,
            "ref_0",
            VOCABULARY,
        )
        != ""
        for number in range(300)
    ]
    assert np.mean(doubted) > 0.8


def test_what_lies_outside_the_nucleus_is_said() -> None:
    logprobs = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))
    sampling = Sampling(temperature=1.0, top_p=0.4)
    assert contradiction(listed(logprobs, 3, 4), sampling, "ref_0", 4) == "it lies outside the nucleus of 0.4"
    assert contradiction(listed(logprobs, 0, 4), sampling, "ref_0", 4) == ""


def test_another_seed_reference_or_step_draws_another_token() -> None:
    logprobs, sampling = distribution(1, 1.0, ties=False), Sampling(temperature=1.0, seed=5)
    drawn = [choose(logprobs, sampling, "ref_0", step) for step in range(20)]

    def doubted(other: Sampling, reference: str, shift: int) -> bool:
        return any(
            contradiction(listed(logprobs, token, VOCABULARY, step + shift), other, reference, VOCABULARY)
            for step, token in enumerate(drawn)
        )

    assert not doubted(sampling, "ref_0", 0)
    assert doubted(Sampling(temperature=1.0, seed=6), "ref_0", 0)
    assert doubted(sampling, "ref_1", 0)
    assert doubted(sampling, "ref_0", 1)
