"""AUC and TPR with known answers, and intervals that know that the prompt is the unit."""

from __future__ import annotations

import numpy as np
import roc


def test_scores_that_never_overlap_and_scores_that_are_the_same() -> None:
    honest = np.arange(480.0).reshape(24, 20)
    apart = roc.separation(honest, honest + 1000)
    assert (apart.auc.value, apart.tpr.value, apart.honest) == (1.0, 1.0, 480)
    same = roc.separation(honest, honest)
    assert same.auc.value == 0.5
    assert same.tpr.value <= 0.01
    below = roc.separation(honest, honest - 1000)
    assert (below.auc.value, below.tpr.value) == (0.0, 0.0)


def test_ties_count_half_and_a_constant_score_catches_nothing() -> None:
    nothing = np.zeros((24, 4))
    found = roc.separation(nothing, nothing)
    assert (found.auc.value, found.tpr.value) == (0.5, 0.0)


def test_auc_is_the_share_of_pairs() -> None:
    rng = np.random.default_rng(0)
    honest, lies = rng.integers(0, 9, (6, 5)).astype(float), rng.integers(2, 11, (6, 5)).astype(float)
    pairs = lies.reshape(-1, 1) - honest.reshape(1, -1)
    assert np.isclose(roc.auc(honest, lies), (pairs > 0).mean() + (pairs == 0).mean() / 2)


def test_at_most_one_honest_batch_in_a_hundred_is_above_the_threshold() -> None:
    honest = np.arange(1000.0).reshape(10, 100)
    lies = np.full((10, 100), 990.0)  # above 99 % of the honest ones: 9 of them are higher
    assert roc.separation(honest, lies).tpr.value == 1.0
    assert roc.separation(honest, lies - 1).tpr.value == 0.0
    few = np.arange(24.0).reshape(24, 1)  # with fewer than a hundred batches, above all of them
    assert roc.separation(few, np.full((24, 1), 23.0)).tpr.value == 0.0
    assert roc.separation(few, np.full((24, 1), 23.5)).tpr.value == 1.0


def test_intervals_are_wider_when_batches_of_a_prompt_agree() -> None:
    rng = np.random.default_rng(1)
    scattered, offset = rng.standard_normal((2, 24, 64)), rng.standard_normal((2, 24, 1))
    alone = roc.separation(scattered[0], scattered[1] + 0.5).auc
    alike = roc.separation(offset[0] + 0.01 * scattered[0], offset[1] + 0.5 + 0.01 * scattered[1]).auc
    assert alone.low < alone.value < alone.high
    assert alike.high - alike.low > 3 * (alone.high - alone.low)
