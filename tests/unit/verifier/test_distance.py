"""Distances: the published definition, by hand and on the published tensor-parallel recordings."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fpforensics.common.errors import EvidenceError, ReplayError
from fpforensics.common.signals import PhaseTrace, Trace
from fpforensics.verifier.distance import (
    POOLED,
    Cell,
    SignalKey,
    mean_l2,
    position_distances,
    ranked_distances,
    rows_l2,
    trace_distances,
    with_pooled,
)

LAB = Path(__file__).parents[4] / "shared" / "lab"


def phase_trace(positions: int = 3, seed: int = 0, layers: tuple[str, ...] = ("1", "last")) -> PhaseTrace:
    rng = np.random.default_rng(seed)
    return PhaseTrace(
        positions=np.arange(10, 10 + positions, dtype=np.int32),
        logprob_ids=np.tile(np.arange(4, dtype=np.int32), (positions, 1)),
        logprobs=-rng.random((positions, 4)).astype(np.float32),
        chosen_logprobs=np.zeros(positions, np.float32),
        hidden_states={layer: rng.normal(size=(positions, 8)).astype(ml_dtypes.bfloat16) for layer in layers},
        key_vectors={layer: rng.normal(size=(positions, 6)).astype(np.float16) for layer in layers},
    )


def trace(seed: int = 0, decode_positions: int = 3) -> Trace:
    ids = np.arange(decode_positions + 1, dtype=np.int32)
    return Trace("ref_0", ids, phase_trace(2, seed), phase_trace(decode_positions, seed + 1))


def test_l2_per_position_in_float64_by_hand() -> None:
    claimed = phase_trace(2, layers=("1",))
    shift = np.array([[0, 0, 3, 4], [0, 0, 0, 0]], np.float32)
    replay = replace(claimed, logprobs=claimed.logprobs * 0, key_vectors={"1": claimed.key_vectors["1"] * 0})
    claimed = replace(claimed, logprobs=shift)
    distances = position_distances(claimed, replay)
    assert distances[SignalKey("logprobs")].tolist() == [5.0, 0.0]
    by_hand = [np.sqrt(sum(float(x) ** 2 for x in row)) for row in claimed.key_vectors["1"]]
    assert distances[SignalKey("key_vectors", "1")].dtype == np.float64
    np.testing.assert_allclose(distances[SignalKey("key_vectors", "1")], by_hand, rtol=1e-15)
    assert distances[SignalKey("hidden_states", "1")].tolist() == [0.0, 0.0]


def test_long_traces_are_measured_in_blocks_without_a_seam() -> None:
    rng = np.random.default_rng(0)
    claimed, replay = rng.normal(size=(2, 1300, 8)).astype(np.float32)
    base = replace(phase_trace(1300, layers=()), hidden_states={"1": claimed})
    measured = position_distances(base, replace(base, hidden_states={"1": replay}))
    expected = np.linalg.norm(claimed.astype(np.float64) - replay.astype(np.float64), axis=1)
    np.testing.assert_allclose(measured[SignalKey("hidden_states", "1")], expected, rtol=1e-14)


def test_one_bit_is_a_distance_and_no_bit_is_exactly_zero() -> None:
    claimed = trace()
    assert set(trace_distances(claimed, claimed).values()) == {0.0}
    rows = claimed.decode.hidden_states["last"].copy()
    rows.view(np.uint16)[1, 3] ^= 1
    decode = replace(claimed.decode, hidden_states=dict(claimed.decode.hidden_states) | {"last": rows})
    changed = trace_distances(claimed, replace(claimed, decode=decode))
    assert [cell for cell, distance in changed.items() if distance] == [Cell("decode", "hidden_states", "last")]


def test_mean_over_positions_per_cell_and_pooled_mean_over_layers() -> None:
    claimed, other = trace(0), trace(5)
    replay = replace(
        other,
        prefill=replace(other.prefill, logprob_ids=claimed.prefill.logprob_ids),
        decode=replace(other.decode, logprob_ids=claimed.decode.logprob_ids),
    )
    distances = trace_distances(claimed, replay)
    rows = position_distances(claimed.decode, replay.decode)
    assert distances[Cell("decode", "logprobs")] == pytest.approx(rows[SignalKey("logprobs")].mean())
    pooled = with_pooled(distances)
    layers = [distances[Cell("decode", "key_vectors", layer)] for layer in ("1", "last")]
    assert pooled[Cell("decode", "key_vectors", POOLED)] == pytest.approx(sum(layers) / 2)
    assert Cell("decode", "logprobs", POOLED) not in pooled
    assert with_pooled(pooled) == pooled


def test_a_phase_without_positions_has_no_cells() -> None:
    claimed = trace(decode_positions=0)
    assert {cell.phase for cell in trace_distances(claimed, claimed)} == {"prefill"}


@given(arrays.arrays(np.float32, (2, 3, 4), fill=st.just(0.5), elements=st.floats(-(2.0**99), 2.0**99, width=32)))
def test_symmetric_nonnegative_and_zero_only_for_equal_values(pair: Any) -> None:
    base = phase_trace(3, layers=())
    ours, theirs = replace(base, hidden_states={"1": pair[0]}), replace(base, hidden_states={"1": pair[1]})
    key = SignalKey("hidden_states", "1")
    forth, back = position_distances(ours, theirs)[key], position_distances(theirs, ours)[key]
    assert np.array_equal(forth, back) and (forth >= 0).all()
    assert np.array_equal(forth == 0, (pair[0] == pair[1]).all(axis=1))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"positions": np.array([10, 11, 13], np.int32)}, "positions differ at index 2: 12 .* 13"),
        ({"positions": np.array([10, 11], np.int32)}, r"positions differ: \(3,\) .* \(2,\)"),
        ({"logprob_ids": np.ones((3, 4), np.int32)}, "canonical token ids differ"),
        ({"logprobs": np.ones((3, 3), np.float32)}, "logprobs: the claimed trace has shape"),
        ({"hidden_states": {"1": np.ones((3, 8), np.float32)}}, "hidden_states: .* layers 1, last, .* 1$"),
        ({"key_vectors": {"1": np.ones((3, 6)), "last": np.ones((3, 5))}}, "key_vectors/last: .* shape"),
    ],
)
def test_what_cannot_be_compared_is_refused(change: dict[str, Any], says: str) -> None:
    claimed = phase_trace(3)
    with pytest.raises(EvidenceError, match=says):
        position_distances(claimed, replace(claimed, **change))


def test_not_finite_is_refused_and_the_side_is_named() -> None:
    good = phase_trace(3)
    bad = replace(good, logprobs=np.full((3, 4), np.nan, np.float32))
    with pytest.raises(EvidenceError, match="claimed value is not finite"):
        position_distances(bad, good)
    with pytest.raises(ReplayError, match="replayed value is not finite"):
        position_distances(good, bad)


def test_traces_of_other_references_or_tokens_are_refused() -> None:
    claimed = trace()
    with pytest.raises(EvidenceError, match="'ref_0', a replay of 'ref_1'"):
        trace_distances(claimed, replace(claimed, reference_id="ref_1"))
    with pytest.raises(EvidenceError, match="output ids of 'ref_0' differ at index 0"):
        trace_distances(claimed, replace(claimed, output_ids=claimed.output_ids + 1))


def test_ranked_distances_compare_by_id_not_by_rank() -> None:
    ours = np.array([[7, 5, 9]]), np.array([[-0.1, -2.0, -3.0]])
    theirs = np.array([[9, 7, 4]]), np.array([[-3.5, -0.2, -6.0]])
    assert ranked_distances(ours, theirs, np.array([[9, 7]])).tolist() == [pytest.approx(np.hypot(0.5, 0.1))]
    assert ranked_distances(ours, theirs, np.array([[9, 5]])).tolist() == [0.5], "5 is not listed on the other side"
    assert np.isnan(ranked_distances(ours, theirs, np.array([[5, 8]]))).all(), "none is listed on both sides"


def test_ranked_distances_ignore_padding() -> None:
    padded = np.array([[7, -1]]), np.array([[-0.5, np.nan]])
    assert ranked_distances(padded, padded, np.array([[7, -1]])).tolist() == [0.0]
    assert np.isnan(ranked_distances(padded, padded, np.array([[-1, -1]]))).all()


@pytest.mark.parametrize("traces", [1, 2, 5])
def test_mean_l2_is_the_mean_of_rows_l2(traces: int) -> None:
    rng = np.random.default_rng(0)
    stack = [rng.normal(size=(7, 33)) for _ in range(traces)]
    means = mean_l2(stack)
    for i, ours in enumerate(stack):
        for j, theirs in enumerate(stack):
            assert means[i, j] == pytest.approx(rows_l2(ours, theirs, "rows").mean(), rel=1e-12)
    assert (np.diag(means) == 0).all()


def test_equal_traces_are_exactly_zero_apart() -> None:
    rows = np.random.default_rng(0).normal(size=(3, 3584)) * 1e3
    assert mean_l2([rows, rows.copy()]).tolist() == [[0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("apart", [1e-12, 1e-6, 1e-3, 0.1, 0.5, 1.0])
def test_traces_much_nearer_to_each_other_than_to_the_first(apart: float) -> None:
    """Where |a|² + |b|² - 2ab would cancel, in some positions or in all, and down to nothing."""
    rng = np.random.default_rng(0)
    first, near = rng.normal(size=(5, 301)), 9 + rng.normal(size=(5, 301))
    others = [near, near + apart * rng.normal(size=near.shape), near.copy()]
    others[1][2] = near[2] + rng.normal(size=301)
    means = mean_l2([first, *others])
    for i, ours in enumerate([first, *others]):
        for j, theirs in enumerate([first, *others]):
            plain = [
                math.sqrt(math.fsum((x - y) ** 2 for x, y in zip(*rows, strict=True)))
                for rows in zip(ours, theirs, strict=True)
            ]
            assert means[i, j] == pytest.approx(math.fsum(plain) / 5, rel=1e-13)
    assert means[1, 3] == 0.0


def test_a_distance_beyond_float64_is_infinite_and_no_nan() -> None:
    huge = [np.full((2, 3), value) for value in (-1e200, 0.0, 1e200, 1e200)]
    assert mean_l2(huge).tolist() == [
        [0, math.inf, math.inf, math.inf],
        [math.inf, 0, math.inf, math.inf],
        [math.inf, math.inf, 0, 0],
        [math.inf, math.inf, 0, 0],
    ]


def test_one_changed_value_among_traces_is_a_distance_from_all_others() -> None:
    trace = np.random.default_rng(0).normal(size=(7, 6))
    other = trace.copy()
    other[3, 2] = np.nextafter(other[3, 2], 9.0)
    assert (mean_l2([trace, other, trace.copy()]) > 0).tolist() == [
        [False, True, False],
        [True, False, True],
        [False, True, False],
    ]


@given(st.data(), st.integers(1, 3))
def test_ranked_distances_are_those_of_a_plain_loop(data: st.DataObject, rows_at_once: int) -> None:
    """Ragged lists, and in any blocks of rows."""
    position = st.dictionaries(st.integers(0, 5), st.floats(-9, 0), min_size=1, max_size=4)
    ours, theirs, source = (data.draw(st.lists(position, min_size=5, max_size=5)) for _ in range(3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fpforensics.verifier.distance._BLOCK_MATCHES", 16 * rows_at_once)
        distances = ranked_distances(_padded(ours), _padded(theirs), _padded(source)[0])
    for distance, here, there, ids in zip(distances, ours, theirs, source, strict=True):
        common = here.keys() & there.keys() & ids.keys()
        if common:
            assert distance == pytest.approx(sum((here[i] - there[i]) ** 2 for i in common) ** 0.5, rel=1e-12)
        else:
            assert np.isnan(distance)


def _padded(lists: list[dict[int, float]]) -> tuple[Any, Any]:
    ids, values = np.full((len(lists), 4), -1), np.full((len(lists), 4), np.nan)
    for row, each in enumerate(lists):
        ids[row, : len(each)], values[row, : len(each)] = list(each), list(each.values())
    return ids, values
