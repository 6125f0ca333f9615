"""Neighbours of the measured row: distinct, of the same length, and the same for prover and verifier."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fpforensics.common.engines.transformers_batch import with_neighbours
from fpforensics.common.signals import CapturePlan, generation_positions


@given(st.lists(st.integers(0, 63), min_size=1, max_size=40), st.integers(1, 12))
def test_neighbours_are_distinct_and_row_0_is_measured(ids: list[int], batch: int) -> None:
    rows = with_neighbours(np.array(ids, np.int32), batch, 64)
    assert rows.shape == (batch, len(ids)) and rows.dtype == np.int64
    assert rows[0].tolist() == ids
    assert len({row.tobytes() for row in rows}) == batch
    assert rows.min() >= 0 and rows.max() < 64
    assert np.array_equal(rows, with_neighbours(np.array(ids, np.int64), batch, 64))


def test_neighbours_of_a_varied_prompt_are_rotations() -> None:
    ids = np.arange(10)
    for row in with_neighbours(ids, 4, 64)[1:]:
        assert any(np.array_equal(row, np.roll(ids, -offset)) for offset in range(1, 10))


@given(st.integers(1, 50), st.integers(1, 50), st.integers(0, 60), st.integers(0, 60))
def test_positions_are_the_last_of_each_phase(prompt: int, output: int, prefill: int, decode: int) -> None:
    plan = CapturePlan(prefill_positions=prefill, decode_positions=decode)
    in_prompt, in_output = generation_positions(prompt, output, plan)
    assert in_prompt.tolist() == list(range(prompt))[max(0, prompt - prefill) :]
    fed = list(range(prompt, prompt + output - 1))
    assert in_output.tolist() == (fed if decode == 0 else fed[max(0, len(fed) - decode) :])
