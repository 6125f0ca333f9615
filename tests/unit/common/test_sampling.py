"""Token choice: greedy ties, Gumbel-max frequencies, the nucleus, and noise that depends on nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fpforensics.common.errors import UsageError
from fpforensics.common.sampling import check_sampling, choose, gumbel_noise, gumbel_noise_of, nucleus
from fpforensics.common.signals import Sampling

LOGPROBS = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    tied = np.array([-3.0, -1.0, -1.0, -2.0], dtype=np.float32)
    assert choose(tied, Sampling(), "ref_0", 0) == 1


def test_sampled_frequencies_follow_the_distribution() -> None:
    sampling = Sampling(temperature=1.0)
    drawn = [choose(LOGPROBS, sampling, "ref_0", step) for step in range(4000)]
    shares = np.bincount(drawn, minlength=4) / len(drawn)
    # four standard errors of the largest share
    assert np.abs(shares - np.exp(LOGPROBS)).max() < 4 * np.sqrt(0.25 / len(drawn))


def test_temperature_sharpens() -> None:
    cold = Sampling(temperature=0.25)
    drawn = np.array([choose(LOGPROBS, cold, "ref_0", step) for step in range(500)])
    expected = np.exp(4 * LOGPROBS[0]) / np.exp(4 * LOGPROBS).sum()
    assert abs((drawn == 0).mean() - expected) < 4 * np.sqrt(0.25 / 500)


def test_top_p_never_leaves_the_nucleus() -> None:
    sampling = Sampling(temperature=1.0, top_p=0.6)
    assert {choose(LOGPROBS, sampling, "ref_0", step) for step in range(300)} == {0, 1}


def test_a_tiny_top_p_is_greedy() -> None:
    sampling = Sampling(temperature=2.0, top_p=1e-9)
    assert {choose(LOGPROBS, sampling, "ref_0", step) for step in range(50)} == {0}


@given(
    arrays(np.float64, st.integers(1, 40), elements=st.floats(-30, 0)),
    st.floats(0.01, 0.99),
)
def test_nucleus_is_the_smallest_set_that_reaches_top_p(scores: np.ndarray, top_p: float) -> None:
    kept = nucleus(scores, top_p)
    probabilities = np.exp(scores) / np.exp(scores).sum()
    assert probabilities[kept].sum() >= top_p - 1e-9
    assert kept.any()
    if kept.sum() > 1:
        assert probabilities[kept].sum() - probabilities[kept].min() < top_p + 1e-9
    if not kept.all():
        assert scores[kept].min() >= scores[~kept].max()


def test_noise_depends_on_seed_reference_and_step() -> None:
    base = gumbel_noise(7, "ref_0", 3, 100)
    assert np.array_equal(base, gumbel_noise(7, "ref_0", 3, 100))
    # a longer draw starts with the shorter one, so the vocabulary's padding does not matter
    assert np.array_equal(base, gumbel_noise(7, "ref_0", 3, 900)[:100])
    for other in (
        gumbel_noise(8, "ref_0", 3, 100),
        gumbel_noise(7, "ref_1", 3, 100),
        gumbel_noise(7, "ref_0", 4, 100),
    ):
        assert not np.intersect1d(base, other).size


@given(st.lists(st.integers(0, 499), min_size=1, max_size=9), st.integers(0, 2**64), st.integers(0, 300))
def test_the_noise_of_some_tokens_is_that_of_all(ids: list[int], seed: int, step: int) -> None:
    every = gumbel_noise(seed, "ref_0", step, 500)
    assert np.array_equal(gumbel_noise_of(seed, "ref_0", step, np.array(ids)), every[ids])


def test_noise_is_pinned() -> None:
    """Another release must draw the same noise, or old evidence could not be sampled again."""
    assert gumbel_noise(0, "ref_0", 0, 3) == pytest.approx(PINNED, abs=1e-12)


def test_negative_and_huge_seeds_are_taken_modulo_2_to_64() -> None:
    assert np.array_equal(gumbel_noise(-1, "r", 0, 4), gumbel_noise(2**64 - 1, "r", 0, 4))


@pytest.mark.parametrize(
    "bad",
    [
        Sampling(max_new_tokens=0),
        Sampling(temperature=-0.1),
        Sampling(temperature=1e-4),
        Sampling(temperature=float("nan")),
        Sampling(temperature=float("inf")),
        Sampling(top_p=0.0),
        Sampling(top_p=1.5),
    ],
)
def test_meaningless_sampling_is_refused(bad: Sampling) -> None:
    with pytest.raises(UsageError):
        check_sampling(bad)


PINNED = [0.18254178460017223, 0.5085031209686701, 1.8066810050594813]
