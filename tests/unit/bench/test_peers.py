"""The statistics of other detectors: nothing to see in equal vectors, a pass for rounding, a fail for four-bit weights."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import peers
import pytest

BF16 = np.dtype(ml_dtypes.bfloat16)


def states(positions: int = 32, width: int = 576, seed: int = 0) -> np.ndarray:
    """(M, D) float32, with the few large dimensions that hidden states have."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((positions, width)) * np.geomspace(0.3, 30, width)).astype(np.float32)


def moved(rows: np.ndarray, by: float) -> np.ndarray:
    """The same rows, every value off by about this share of itself."""
    return rows * (1 + by * np.random.default_rng(9).standard_normal(rows.shape).astype(np.float32))


def test_equal_vectors_measure_nothing() -> None:
    rows = states().astype(BF16)
    found = peers.toploc(rows, rows.copy())
    assert (found.mismatches, found.mean, found.median, found.passes) == (0, 0, 0, True)
    assert not peers.projected_distance(rows, rows.copy(), peers.projection(576, 8)).any()


def test_toploc_passes_rounding_and_fails_four_bit_weights() -> None:
    rows = states()
    honest = peers.toploc(rows.astype(BF16), moved(rows, 2**-8).astype(BF16))
    assert honest.passes
    assert honest.mismatches > 0
    assert honest.mean > 0
    assert not peers.toploc(rows.astype(BF16), moved(rows, 0.3).astype(BF16)).passes


def test_toploc_counts_exponents_and_mantissas() -> None:
    rows = np.array([[1.0, -2.0, 4.0, 0.5]], BF16)
    other = np.array([[1.0 + 3 / 128, -4.0, 4.0 + 4 / 32, 0.25]], BF16)
    found = peers.toploc(rows, other, top=3)
    assert (found.mismatches, found.mean, found.median) == (1, 3.5, 3.5)  # the -2 has another exponent
    # Its own three largest are the verifier's; where the claim lists another index, that is a mismatch.
    swapped = np.array([[0.25, -2.0, 4.0, 0.5]], BF16)
    assert peers.toploc(rows, swapped, top=3).mismatches == 1
    assert peers.toploc(rows, -rows, top=3).mismatches == 0  # the published statistic looks at no signs


def test_toploc_of_nothing_in_common_is_the_worst() -> None:
    low, high = np.array([[1.0, 1.0, 0.0, 0.0]], BF16), np.array([[0.0, 0.0, 1.0, 1.0]], BF16)
    assert peers.toploc(low, high, top=2) == peers.Toploc(2, 128, 128)


@pytest.mark.parametrize(
    ("numbers", "passes"), [((38, 10, 8), True), ((39, 0, 0), False), ((0, 10.1, 0), False), ((0, 0, 8.5), False)]
)
def test_toploc_thresholds_are_the_published_ones(numbers: tuple[float, float, float], passes: bool) -> None:
    assert peers.Toploc(*numbers).passes is passes


def test_chunks_are_of_32_tokens() -> None:
    assert peers.chunks(64) == [slice(0, 32), slice(32, 64)]
    assert peers.chunks(3) == [slice(0, 3)]


def test_projection_is_orthonormal_and_from_its_seed() -> None:
    columns = peers.projection(576, 16)
    np.testing.assert_allclose(columns.T @ columns, np.eye(16), atol=1e-12)
    np.testing.assert_array_equal(columns, peers.projection(576, 16))
    assert not np.allclose(columns, peers.projection(576, 16, seed=1))


def test_projected_distance_estimates_the_distance_and_grows_with_it() -> None:
    rows, columns = states(512), peers.projection(576, 16)
    near, far = moved(rows, 0.01), moved(rows, 0.1)
    true = np.linalg.norm(rows - near, axis=1)
    estimated = peers.projected_distance(rows, near, columns, np.float64)
    assert np.mean(estimated) == pytest.approx(np.mean(true), rel=0.05)
    assert (
        peers.projected_distance(rows, far, columns).mean() > 5 * peers.projected_distance(rows, near, columns).mean()
    )


def test_token_margin_is_zero_for_the_greedy_choice_and_capped() -> None:
    logits = np.array([[1.0, 3.0, 2.75], [5.0, 1.0, 0.0]], np.float32)
    np.testing.assert_array_equal(peers.token_margins(logits, np.array([1, 0])), [0, 0])
    np.testing.assert_array_equal(peers.token_margins(logits, np.array([2, 1])), [0.25, peers.MOST_MARGIN])


def test_final_norm_is_the_models_own() -> None:
    torch = pytest.importorskip("torch")
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    rows, weight = states().astype(BF16), states(1, 576, seed=3)[0].astype(BF16)
    norm = LlamaRMSNorm(576, eps=1e-5).to(torch.bfloat16)
    norm.weight.data = torch.from_numpy(weight.astype(np.float32)).to(torch.bfloat16)
    expected = norm(torch.from_numpy(rows.astype(np.float32)).to(torch.bfloat16)).float().detach().numpy()
    found = peers.final_norm(rows, weight, 1e-5).astype(np.float32)
    assert (found == expected).mean() > 0.999  # the sum of squares in another order may round elsewhere
    np.testing.assert_allclose(found, expected, rtol=2**-7)
