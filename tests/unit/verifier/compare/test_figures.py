"""Full logits compared: by hand, against plain loops, and with the published per-position values."""

from __future__ import annotations

import math
import statistics
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fpforensics.common.errors import Error, EvidenceError, UsageError
from fpforensics.common.signals import DTYPES, Array
from fpforensics.verifier.compare import figures
from fpforensics.verifier.compare.figures import (
    absolute_gaps,
    by_position,
    chosen_token_error,
    join,
    measure,
    summarize,
)
from fpforensics.verifier.compare.median import MedianSearch
from fpforensics.verifier.compare.result import PositionComparison, Summary

# The published comparison of TP=1 with TP=4 (Qwen3-1.7B, five prompt positions): per-position detail, as printed.
LOGP_TP1 = np.array([-2.3221, -0.4478, -0.6793, -0.0462, -0.6568])
LOGP_TP4 = np.array([-2.0310, -0.4513, -0.6524, -0.0521, -0.6363])


def compared(a: Array, b: Array) -> tuple[Summary, tuple[PositionComparison, ...]]:
    """Both views of one part, at positions from 7."""
    search = MedianSearch()
    for show in (search.count, search.refine):
        for gaps in absolute_gaps(a, b):
            show(gaps)
    rows = measure(np.arange(7, 7 + len(a)), a, b)
    return summarize(rows, a.shape[1], search.median()), by_position(rows)


def test_the_published_figures_follow_from_the_published_positions() -> None:
    error = chosen_token_error(LOGP_TP1, LOGP_TP4)
    assert f"{error.mean_abs:.4f}" == "0.0696"
    assert f"{error.max_abs:.4f}" == "0.2911"
    assert f"{error.signed_mean:.4f}" == "-0.0658"
    assert error.std is not None
    assert f"{error.std:.4f}" == "0.1268"  # dividing by n would print 0.1134
    assert error.token_mult_prob_error is not None
    assert f"{error.token_mult_prob_error:.3f}x" == "1.079x"


def test_two_tokens_by_hand() -> None:
    """p = (1/4, 3/4), q = (1/2, 1/2)."""
    summary, (position,) = compared(np.array([[0.0, math.log(3)]]), np.array([[5.0, 5.0]]))
    assert (position.position, position.token, position.top1_match, position.top5_shared) == (7, 1, False, 2)
    assert position.logp_a == pytest.approx(math.log(3 / 4))
    assert position.delta == pytest.approx(math.log(3 / 2))
    assert position.ratio == pytest.approx(1.5)
    assert position.kl_ab == pytest.approx(math.log(1 / 2) / 4 + 3 * math.log(3 / 2) / 4)
    assert position.kl_ba == pytest.approx(math.log(2) / 2 + math.log(2 / 3) / 2)
    assert position.total_variation == pytest.approx(1 / 4)
    assert position.max_abs == 5.0
    assert position.cosine == pytest.approx(1 / math.sqrt(2))
    assert summary.logits.median_abs == pytest.approx((5 + 5 - math.log(3)) / 2)
    assert summary.chosen.std is None
    assert summary.chosen.token_mult_prob_error == pytest.approx(1.5)
    assert summary.agreement.top5_slots == 2  # a vocabulary of two has no five


def naive(a: Array, b: Array) -> dict[str, Any]:
    """The definitions once more, in plain loops and Python's own arithmetic."""
    gaps, rows = [], []
    for x, y in zip(a.astype(float).tolist(), b.astype(float).tolist(), strict=True):
        gaps += [abs(p - q) for p, q in zip(x, y, strict=True)]
        norm_x, norm_y = (math.log(math.fsum(math.exp(value) for value in row)) for row in (x, y))
        log_x, log_y = [value - norm_x for value in x], [value - norm_y for value in y]
        token = x.index(max(x))
        tops = [set(sorted(range(len(row)), key=lambda i, row=row: (-row[i], i))[:5]) for row in (x, y)]  # type: ignore[misc]
        rows.append({
            "cosine": math.fsum(p * q for p, q in zip(x, y, strict=True)) / math.hypot(*x) / math.hypot(*y),
            "token": token,
            "delta": log_x[token] - log_y[token],
            "top1": token == y.index(max(y)),
            "top5": len(tops[0] & tops[1]),
            "kl_ab": math.fsum(math.exp(p) * (p - q) for p, q in zip(log_x, log_y, strict=True)),
            "kl_ba": math.fsum(math.exp(q) * (q - p) for p, q in zip(log_x, log_y, strict=True)),
            "tv": math.fsum(abs(math.exp(p) - math.exp(q)) for p, q in zip(log_x, log_y, strict=True)) / 2,
        })  # fmt: skip
    return {"gaps": gaps} | {name: [row[name] for row in rows] for name in rows[0]}


@pytest.mark.parametrize("block", [1, 57, 58 * 3, 1 << 18], ids=["a row", "under a row", "three rows", "all"])
@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32", "f64"])
def test_every_figure_against_plain_loops(dtype: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "_BLOCK_ELEMENTS", block)
    rng = np.random.default_rng(5)
    a = (3 * rng.normal(size=(7, 58))).astype(DTYPES[dtype])
    b = (a.astype(np.float64) + rng.normal(size=a.shape) * np.array([[0, 1e-5, 1e-3, 0.02, 0.1, 0.5, 3]]).T).astype(
        DTYPES[dtype]
    )
    expected = naive(a, b)
    summary, positions = compared(a, b)

    assert summary.positions == 7
    assert summary.logits.elements == 7 * 58
    assert summary.logits.max_abs == max(expected["gaps"])
    assert summary.logits.mean_abs == pytest.approx(statistics.fmean(expected["gaps"]), rel=1e-12)
    assert summary.logits.median_abs == statistics.median(map(float, np.float32(expected["gaps"])))
    for above in summary.logits.shares_above:
        assert above.share == sum(gap > above.threshold for gap in expected["gaps"]) / (7 * 58)
    assert summary.logits.cosine_min == pytest.approx(min(expected["cosine"]), rel=1e-12)
    assert summary.logits.cosine_mean == pytest.approx(statistics.fmean(expected["cosine"]), rel=1e-12)

    delta = expected["delta"]
    assert summary.chosen.mean_abs == pytest.approx(statistics.fmean(map(abs, delta)), abs=1e-13)
    assert summary.chosen.max_abs == pytest.approx(max(map(abs, delta)), abs=1e-13)
    assert summary.chosen.signed_mean == pytest.approx(statistics.fmean(delta), abs=1e-13)
    assert summary.chosen.std == pytest.approx(statistics.stdev(delta), abs=1e-13)
    assert summary.chosen.token_mult_prob_error == pytest.approx(statistics.fmean(math.exp(abs(d)) for d in delta))

    for name, found in (("kl_ab", "kl_ab"), ("kl_ba", "kl_ba"), ("tv", "total_variation")):
        assert getattr(summary.divergence, f"{found}_mean") == pytest.approx(
            statistics.fmean(expected[name]), abs=1e-13
        )
        assert getattr(summary.divergence, f"{found}_max") == pytest.approx(max(expected[name]), abs=1e-13)
        np.testing.assert_allclose([getattr(each, found) for each in positions], expected[name], atol=1e-13)
    assert summary.agreement.top1_matches == sum(expected["top1"])
    assert (summary.agreement.top5_shared, summary.agreement.top5_slots) == (sum(expected["top5"]), 35)

    assert [each.position for each in positions] == list(range(7, 14))
    assert [each.token for each in positions] == expected["token"]
    assert [each.top1_match for each in positions] == expected["top1"]
    assert [each.top5_shared for each in positions] == expected["top5"]
    np.testing.assert_allclose([each.delta for each in positions], delta, atol=1e-13)
    np.testing.assert_allclose([each.max_abs for each in positions], np.reshape(expected["gaps"], (7, 58)).max(axis=1))
    np.testing.assert_allclose(
        [each.mean_abs for each in positions], np.reshape(expected["gaps"], (7, 58)).mean(axis=1)
    )


LOGITS = st.integers(1, 4).flatmap(
    lambda rows: st.integers(1, 9).flatmap(
        lambda width: st.tuples(
            *(arrays.arrays(np.float64, (rows, width), elements=st.floats(-60, 60, width=16)) for _ in "ab")
        )
    )
)


@settings(deadline=None)
@given(LOGITS)
def test_what_must_hold_for_any_logits(pair: tuple[Array, Array]) -> None:
    (there, positions), (back, reverse) = compared(*pair), compared(*reversed(pair))
    assert there.logits == back.logits
    assert there.agreement == back.agreement
    assert (there.divergence.kl_ab_mean, there.divergence.kl_ba_max) == (
        back.divergence.kl_ba_mean,
        back.divergence.kl_ab_max,
    )
    for each, other in zip(positions, reverse, strict=True):
        assert each.total_variation == other.total_variation
        assert 0 <= each.total_variation <= 1 + 1e-12
        assert each.kl_ab >= 0
        # Pinsker: what the distributions shift bounds the divergence from below
        assert min(each.kl_ab, each.kl_ba) >= 2 * each.total_variation**2 - 1e-12
        assert each.cosine is None or -1 <= each.cosine <= 1
        assert each.ratio is not None
        assert each.ratio >= 1
        assert each.mean_abs <= each.max_abs
    assert there.logits.median_abs <= np.float32(there.logits.max_abs)
    assert there.chosen.max_abs == max(abs(each.delta) for each in positions)
    assert b"null" not in msgspec.json.encode(there.divergence)


@settings(deadline=None)
@given(LOGITS)
def test_logits_compared_with_themselves(pair: tuple[Array, Array]) -> None:
    logits, _ = pair
    summary, positions = compared(logits, logits.copy())
    assert (summary.logits.max_abs, summary.logits.mean_abs, summary.logits.median_abs) == (0, 0, 0)
    assert [above.share for above in summary.logits.shares_above] == [0, 0]
    assert set(msgspec.structs.astuple(summary.divergence)) == {0.0}
    assert (summary.chosen.max_abs, summary.chosen.token_mult_prob_error) == (0, 1)
    assert (summary.agreement.top1_share, summary.agreement.top5_share) == (1, 1)
    for each, row in zip(positions, logits, strict=True):
        assert each.cosine == pytest.approx(1) if row.any() else each.cosine is None


@given(LOGITS, st.floats(-50, 50))
def test_a_constant_added_to_all_logits_changes_no_probability(pair: tuple[Array, Array], shift: float) -> None:
    logits, _ = pair
    summary, _ = compared(logits, logits + shift)
    assert summary.chosen.max_abs == pytest.approx(0, abs=1e-10)
    assert summary.divergence.total_variation_max == pytest.approx(0, abs=1e-10)


def test_the_lowest_id_of_equals_is_chosen() -> None:
    a = np.array([[1, 2, 2, 0, 2, 0, 0, 0, 0]], ml_dtypes.bfloat16)  # top five: 1, 2, 4, then 0, then 3 of the zeros
    b = np.array([[0, 0, 2, 0, 0, 0, 0, 0, 0]], ml_dtypes.bfloat16)  # top five: 2, then 0, 1, 3, 4 of the zeros
    _, (position,) = compared(a, b)
    assert (position.token, position.top1_match, position.top5_shared) == (1, False, 5)
    b[0, 8] = 1  # 2, 8, then 0, 1, 3
    assert compared(a, b)[1][0].top5_shared == 4


def test_logits_that_are_all_zero_have_no_direction() -> None:
    zeros = np.zeros((1, 6))
    summary, (position,) = compared(zeros, zeros + 1)
    assert (position.cosine, summary.logits.cosine_min, summary.logits.cosine_mean) == (None, None, None)
    summary, _ = compared(np.array([[0.0, 0.0], [1.0, 1.0]]), np.array([[1.0, 2.0], [3.0, 3.0]]))
    assert summary.logits.cosine_mean == pytest.approx(1)


def test_numbers_at_the_edges_of_float64() -> None:
    a, b = np.array([[1e30, 0.0], [1e-320, 2e-320]]), np.array([[0.0, 1e30], [1e-320, 2e-320]])
    summary, (far, near) = compared(a, b)
    assert (far.ratio, summary.chosen.token_mult_prob_error) == (None, None)
    assert (far.delta, far.kl_ab, far.total_variation, far.cosine) == (1e30, 1e30, 1, 0)
    assert near.cosine == pytest.approx(1)
    assert "NaN" not in str(msgspec.structs.asdict(summary))


def test_parts_are_joined_in_order() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 5, 11))
    whole = measure(np.arange(5), a, b)
    parts = join([measure(np.arange(2), a[:2], b[:2]), measure(np.arange(2, 5), a[2:], b[2:])])
    assert by_position(parts) == by_position(whole)
    assert summarize(parts, 11, 0.5) == summarize(whole, 11, 0.5)


@pytest.mark.parametrize(
    ("a", "b", "problem"),
    [
        (np.zeros((2, 3)), np.zeros((2, 4)), r"\(2, 3\) and \(2, 4\)"),
        (np.zeros((0, 3)), np.zeros((0, 3)), r"\(0, 3\)"),
        (np.zeros(3), np.zeros(3), r"\(3,\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(a: Array, b: Array, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        measure(np.arange(len(a)), a, b)


def test_positions_must_be_one_for_each_row() -> None:
    with pytest.raises(UsageError, match="2 positions for 3 rows"):
        measure(np.arange(2), np.zeros((3, 4)), np.zeros((3, 4)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e31])
@pytest.mark.parametrize("side", ["A", "B"])
def test_logits_that_no_model_computes_are_refused(value: float, side: str) -> None:
    bad, good = np.array([[0.0, value]]), np.zeros((1, 2))
    with pytest.raises(EvidenceError, match=f"logits of {side}"):
        measure(np.arange(1), *((bad, good) if side == "A" else (good, bad)))


@pytest.mark.parametrize(
    ("a", "b"), [([], []), ([0.0], [0.0, 1.0]), ([[0.0]], [[0.0]]), ([-math.inf], [0.0]), ([math.nan], [0.0])]
)
def test_log_probabilities_that_have_no_error_are_refused(a: list[Any], b: list[Any]) -> None:
    with pytest.raises(UsageError, match="log-probabilit"):
        chosen_token_error(np.array(a), np.array(b))


@given(
    st.lists(
        arrays.arrays(
            np.float32,
            st.integers(0, 9),
            elements=st.floats(0, 2.0**100, width=32) | st.sampled_from([0.0, -0.0, 0.03125, 0.0625, 1e-45, 3.0e38]),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_the_median_is_exact_however_the_numbers_come(parts: list[Array]) -> None:
    parts = [np.abs(part) for part in parts]
    everything = sorted(float(value) for part in parts for value in part)
    search = MedianSearch()
    for part in parts:
        search.count(part)
    if not everything:
        with pytest.raises(Error, match="no numbers"):
            search.median()
        return
    for part in reversed(parts):
        search.refine(part)
    assert search.median() == statistics.median(everything)


def test_a_median_needs_the_same_numbers_twice() -> None:
    search = MedianSearch()
    search.count(np.ones(3, np.float32))
    with pytest.raises(Error, match="different numbers"):
        search.median()
    search.refine(np.ones(2, np.float32))
    with pytest.raises(Error, match="different numbers"):
        search.median()
    with pytest.raises(Error, match="negative"):
        search.count(-np.ones(1, np.float32))
