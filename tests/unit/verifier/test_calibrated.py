"""The calibrated decision: its lanes, its rule, and its error rates on evidence that was recorded on an H100 and on a CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fpforensics.common.config import parse_config
from fpforensics.common.errors import EvidenceError
from fpforensics.verifier.calibrated import Calibration, Part, judge
from fpforensics.verifier.distance import Cell
from fpforensics.verifier.lanes import ALPHA, LANES, prompts_to_settle, sign_test
from fpforensics.verifier.lanes import test_member as lanes_of
from fpforensics.verifier.profile import Pool, built_in_profile, read_profile
from fpforensics.verifier.score import EARLY, Scores, score, worth_in_positions

ROOT = Path(__file__).parents[3]
POOL = Pool(
    positions=16,
    prompts=999,
    noise_prompts=999,
    floors=tuple(np.linspace(0.2, 0.8, 999).tolist()),
    noise=tuple(np.linspace(0.9, 1.1, 999).tolist()),
    margin=tuple(np.linspace(-0.2, 0.9, 999).tolist()),
)


def replaced(pool: Pool, **changes: object) -> Pool:
    """``pool`` with other fields."""
    return msgspec.structs.replace(pool, **changes)


def scores(**floors: float) -> Scores:
    """Eight prompts at these many floors from each member, with evidence as noisy as it should be."""
    return Scores(
        references=tuple(f"ref_{index}" for index in range(8)),
        positions=16,
        distance=dict(floors),
        floors=dict(floors),
        noise=dict.fromkeys(floors, 1.0),
        by_prompt={name: (value,) * 8 for name, value in floors.items()},
    )


def calibration(measured: Scores, *uncovered: str, wider: Sequence[str] = ()) -> Calibration:
    return Calibration(measured, POOL, "test", set(measured.distance) - set(uncovered), wider)


def test_honest_evidence_is_consistent_and_its_neighbour_rejected() -> None:
    found = judge("sdpa", ["sdpa"], ["eager"], calibration(scores(sdpa=0.5, eager=0.75)))
    assert found.verdict == "CONSISTENT"
    assert found.tested["eager"].lane == "lineup"
    assert found.tested["eager"].rejected(ALPHA)


def test_the_same_evidence_under_the_false_claim_is_inconsistent() -> None:
    found = judge("eager", ["eager"], ["sdpa"], calibration(scores(sdpa=0.5, eager=0.75)))
    assert found.verdict == "INCONSISTENT"
    assert "sdpa, which contradicts the claim, fits better: eager is 1.50 times as far" in found.reasons[1]


def test_further_than_honest_evidence_is_inconsistent_whatever_the_lineup() -> None:
    found = judge("sdpa", ["sdpa"], [], calibration(scores(sdpa=1.4)))
    assert (found.verdict, found.tested["sdpa"].lane) == ("INCONSISTENT", "absolute")


def test_evidence_with_too_little_noise_of_its_own_is_inconsistent() -> None:
    measured = msgspec.structs.replace(scores(sdpa=0.5, eager=0.75), noise={"sdpa": 0.1})
    found = judge("sdpa", ["sdpa"], ["eager"], calibration(measured))
    assert (found.verdict, found.tested["sdpa"].lane) == ("INCONSISTENT", "noise")
    assert "too good to be this config" in found.reasons[0]


def test_every_lane_of_the_built_in_profile_can_reject_at_the_level() -> None:
    for pool in built_in_profile().pools:
        assert LANES * pool.p_floors(1e9) <= ALPHA
        assert LANES * pool.p_noise(0.0) <= ALPHA
        assert LANES * pool.p_margin(-1e9) <= ALPHA


def test_a_pool_of_one_prompt_has_an_extreme() -> None:
    pool = Pool(positions=1, prompts=1, noise_prompts=1, floors=(0.5,), noise=(1.0,), margin=(0.2,))
    assert (pool.far, pool.least_margin) == (0.5, 0.2)
    thirty = tuple(number / 100 for number in range(30))
    assert replaced(pool, prompts=30, floors=thirty).far == 0.29


def test_a_member_of_the_same_kind_neither_accuses_nor_is_cleared() -> None:
    """batch=2 may differ from batch=1 by a bit: that it lies as near says nothing."""
    measured = replace(calibration(scores(one=0.5, two=0.5)), kinds={"one": "sdpa", "two": "sdpa"})
    assert judge("one", ["one"], ["two"], measured).verdict == "INCONCLUSIVE"
    apart = replace(measured, kinds={"one": "sdpa", "two": "eager"})
    assert judge("one", ["one"], ["two"], apart).verdict != "INCONSISTENT"


def test_a_tie_never_rejects() -> None:
    assert sign_test([0.0] * 9) == 1.0


def test_two_members_alike_leave_it_open_and_are_named() -> None:
    measured = scores(sdpa=0.5, twin=0.56, far=20.0)
    found = judge("sdpa", ["sdpa"], ["twin", "far"], calibration(measured))
    assert found.verdict == "INCONCLUSIVE"
    assert "not told apart from twin" in found.reasons[1]
    assert "far" not in found.reasons[1]


def test_how_many_prompts_would_settle_it_is_what_larger_pools_say() -> None:
    measured = msgspec.structs.replace(scores(sdpa=0.5, twin=0.56), per_prompt=4)
    wide = msgspec.structs.replace(POOL, positions=32, margin=tuple(np.linspace(0.2, 0.9, 999).tolist()))
    sixteen = msgspec.structs.replace(wide, positions=16)
    open_ = calibration(measured)
    assert judge("sdpa", ["sdpa"], ["twin"], open_).prompts_needed is None
    assert judge("sdpa", ["sdpa"], ["twin"], replace(open_, larger=(sixteen,))).prompts_needed == 8
    assert judge("sdpa", ["sdpa"], ["twin"], replace(open_, larger=(wide,))).prompts_needed is None, "sums count for 16"


def test_a_profile_that_can_reject_nothing_vouches_for_nothing() -> None:
    few = replace(calibration(scores(sdpa=0.9, eager=0.7)), pool=msgspec.structs.replace(POOL, prompts=4))
    found = judge("sdpa", ["sdpa"], ["eager"], few)
    assert found.verdict == "INCONCLUSIVE"
    assert "p = 0.6 is the least that this profile can give" in found.reasons[0]


def test_a_kernel_class_is_no_rival_but_stays_open() -> None:
    measured = scores(sdpa=0.5, twin=0.5)
    found = judge("sdpa", ["sdpa"], ["twin"], calibration(measured), [("sdpa", "twin")])
    assert found.verdict == "INCONCLUSIVE"


def test_nothing_that_contradicts_is_inconclusive_but_for_identity() -> None:
    measured = calibration(scores(sdpa=0.5))
    assert judge("sdpa", ["sdpa"], [], measured).verdict == "INCONCLUSIVE"
    assert judge("sdpa", ["sdpa"], [], measured, identity_only=True).verdict == "CONSISTENT"


def test_an_uncovered_member_is_rejected_by_a_limit_or_by_the_sign_test_alone() -> None:
    far = judge("sdpa", ["sdpa"], ["nf4"], calibration(scores(sdpa=0.5, nf4=18.0), "nf4"))
    assert (far.verdict, far.tested["nf4"].lane) == ("CONSISTENT", "limit")
    near = msgspec.structs.replace(scores(sdpa=0.5, odd=0.8), by_prompt={"sdpa": (0.5,) * 8, "odd": (0.4, 0.8) * 4})
    assert judge("sdpa", ["sdpa"], ["odd"], calibration(near, "odd")).verdict == "INCONCLUSIVE"


def test_a_wider_dtype_is_rejected_where_its_own_evidence_could_not_be() -> None:
    measured = calibration(scores(sdpa=0.5, anchor=1.0), "anchor", wider=["anchor"])
    assert judge("sdpa", ["sdpa"], ["anchor"], measured).verdict == "CONSISTENT"


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=30))
def test_p_values_are_conformal(pool: list[float]) -> None:
    """A member of the pool itself is never rarer than its rank says, and nothing is below 1 / (n + 1)."""
    held = Pool(
        positions=1,
        prompts=len(pool),
        noise_prompts=1,
        floors=tuple(sorted(pool)),
        noise=(1.0,),
        margin=tuple(sorted(pool)),
    )
    assert held.p_floors(max(pool)) >= 2 / (len(pool) + 1) - 1e-12
    assert held.p_floors(max(pool) * 2) == pytest.approx(1 / (len(pool) + 1))
    assert held.p_margin(min(pool) / 2) == pytest.approx(1 / (len(pool) + 1))
    ranks = [held.p_floors(value) for value in sorted(pool)]
    assert ranks == sorted(ranks, reverse=True)


def test_sign_test_is_exact() -> None:
    assert sign_test([-1.0] * 7) == pytest.approx(2**-7)
    assert sign_test([-1.0] * 6 + [1.0]) == pytest.approx(8 / 128)
    assert sign_test([1.0, -1.0]) == pytest.approx(3 / 4)


def test_prompts_to_settle() -> None:
    needed = prompts_to_settle([-1.0] * 4, ALPHA)
    assert needed == math.ceil(math.log2(LANES / ALPHA))
    assert prompts_to_settle([1.0, -1.0], ALPHA) is None


def test_score_is_in_floors_and_weighs_positions_alike() -> None:
    cells = {
        Cell(phase, key.signal, key.layer): value
        for phase, value in (("prefill", 1.0), ("decode", 4.0))
        for key in EARLY
    }  # type: ignore[arg-type]
    floor = dict.fromkeys(cells, 2.0)
    found = score(
        claimed="a",
        distances={"a": {"ref_0": cells}, "b": {"ref_0": {cell: 3 * value for cell, value in cells.items()}}},
        own_noise={"a": {"ref_0": floor}},
        to_anchor={"ref_0": floor},
        counts={"ref_0": {"prefill": 2, "decode": 1}},
    )
    assert found is not None
    assert found.distance == {"a": pytest.approx(1.0), "b": pytest.approx(3.0)}
    assert found.noise == {"a": pytest.approx(1.0)}
    assert found.positions == 3


def test_no_score_without_an_early_layer() -> None:
    late = {Cell("prefill", "hidden_states", "last"): 1.0}
    arguments = {
        "claimed": "a",
        "distances": {"a": {"r": late}},
        "own_noise": {"a": {"r": late}},
        "to_anchor": {"r": late},
    }
    assert score(**arguments, counts={"r": {"prefill": 1}}) is None  # type: ignore[arg-type]


def test_positions_of_many_prompts_are_not_worth_their_sum() -> None:
    assert worth_in_positions([3] * 24) == 16
    assert worth_in_positions([3] * 3) == 4
    assert worth_in_positions([64]) == 64
    assert worth_in_positions([64, 64]) == 64


def test_built_in_profile_covers_what_was_recorded_and_nothing_else() -> None:
    profile = built_in_profile()
    assert [pool.positions for pool in profile.pools] == [1, 3, 8, 16, 64]
    assert all(profile.covers(parse_config(spec)) for spec in ("", "attn=eager", "dtype=fp16", "quant=torchao-int8"))
    assert not any(
        profile.covers(parse_config(spec)) for spec in ("dtype=fp32", "compile=true", "quant=bnb-nf4", "attn=flex")
    )
    small, large = profile.pool(15), profile.pool(10_000)
    assert small is not None and small.positions == 8
    assert large is not None and large.positions == 64


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text.replace(b'"format":1', b'"format":9'), "has format 9"),
        (lambda text: text[:-20], "is not JSON"),
        (lambda text: text.replace(b'"positions":1,', b'"positions":0,'), "is empty or not sorted"),
        (lambda text: text.replace(b'"dtypes"', b'"dtypez"'), "is malformed"),
    ],
)
def test_a_damaged_profile_is_refused(change: object, said: str) -> None:
    text = msgspec.json.encode(built_in_profile())
    with pytest.raises(EvidenceError, match=said):
        read_profile(change(text), "the profile")  # type: ignore[operator]


def test_the_lanes_never_accuse_evidence_at_the_pools_middle() -> None:
    assert not lanes_of("sdpa", scores(sdpa=0.5, eager=0.8), POOL, ["eager"]).rejected(0.5)


@pytest.mark.parametrize(
    ("odd", "verdict"),
    [
        ({"sdpa": 0.5, "eager": 0.75}, "CONSISTENT"),
        ({"sdpa": 1.5, "eager": 2.0}, "INCONCLUSIVE"),
        ({"sdpa": 0.75, "eager": 0.5}, "INCONCLUSIVE"),
    ],
)
def test_a_part_unlike_any_honest_evidence_is_not_outvoted_by_the_rest(odd: dict[str, float], verdict: str) -> None:
    parts = (Part("ref_0", scores(sdpa=0.5, eager=0.75), POOL), Part("decode", scores(**odd), POOL))
    measured = replace(calibration(scores(sdpa=0.5, eager=0.75)), parts=parts)
    found = judge("sdpa", ["sdpa"], ["eager"], measured)
    assert found.verdict == verdict
    assert ("decode" in found.reasons[1]) == (verdict == "INCONCLUSIVE")


def test_nearer_than_honest_evidence_from_another_kind_of_device_is_not_vouched_for() -> None:
    near = calibration(scores(sdpa=0.05, eager=0.75))
    found = judge("sdpa", ["sdpa"], ["eager"], near, apart=True)
    assert found.verdict == "INCONCLUSIVE"
    assert "too good to vouch for" in found.reasons[0]
    assert judge("sdpa", ["sdpa"], ["eager"], near).verdict == "CONSISTENT", "two CPUs may be as near as they like"
