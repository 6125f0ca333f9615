"""How far repetitions lie apart: by tensor, the largest over references, and only where the same was computed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fpforensics.common.signals import PhaseTrace, Trace
from fpforensics.prover.noise import widen


def trace(shift: float = 0.0, tokens: tuple[int, ...] = (5, 6, 7)) -> Trace:
    """Two positions a phase; hidden states of four numbers, all moved by ``shift``."""
    ids = np.array([[1, 2, 3], [4, 5, 6]], np.int32)
    phase = PhaseTrace(
        positions=np.array([0, 1], np.int32),
        logprob_ids=ids,
        logprobs=np.array([[-1.0, -2.0, -3.0], [-1.0, -1.5, -4.0]], np.float32),
        chosen_logprobs=np.array([-1.0, -1.0], np.float32),
        hidden_states={"1": np.ones((2, 4), np.float32) + np.float32(shift)},
    )
    return Trace("ref_0", np.array(tokens, np.int32), phase, phase)


def swapped(given: Trace, *, at: int, new_id: int | None = None) -> Trace:
    """Position ``at`` of decode lists its first two tokens the other way round, or another token in place of its last."""
    ids, values = given.decode.logprob_ids.copy(), given.decode.logprobs.copy()
    if new_id is None:
        ids[at, :2], values[at, :2] = ids[at, 1::-1].copy(), values[at, 1::-1].copy()
    else:
        ids[at, 2] = new_id
    return replace(given, decode=replace(given.decode, logprob_ids=ids, logprobs=values))


def test_the_mean_length_of_differences_the_largest_over_repetitions() -> None:
    noise: dict[str, float] = {}
    for shift in (0.5, 0.25):
        widen(noise, [trace()], [trace(shift)])
    assert noise["prefill/hidden_states/1"] == noise["decode/hidden_states/1"] == pytest.approx(1.0)  # 4 numbers by 0.5
    assert noise["decode/logprobs"] == 0.0


def test_what_follows_another_token_is_not_compared() -> None:
    noise: dict[str, float] = {}
    widen(noise, [trace()], [trace(0.5, tokens=(5, 9, 7))])
    assert set(noise) == {"prefill/hidden_states/1", "prefill/logprobs", "prefill/chosen_logprobs"}


def test_log_probabilities_are_compared_by_token_where_the_same_are_listed() -> None:
    noise: dict[str, float] = {}
    widen(noise, [trace()], [swapped(trace(), at=1)])
    assert noise["decode/logprobs"] == 0.0
    again = trace()
    again.decode.logprobs[0, 0] -= 3.0
    widen(noise, [trace()], [swapped(again, at=1, new_id=99)])
    assert noise["decode/logprobs"] == pytest.approx(3.0)
