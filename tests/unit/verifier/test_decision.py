"""The interim rule: each of its steps, controls and inverse controls, and what must not change its answer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fpforensics.common.errors import Error, ReplayError, UsageError
from fpforensics.common.signals import Phase, Signal
from fpforensics.verifier.decision import Member, RowVerdict, combine_rows, decide_row
from fpforensics.verifier.distance import Cell

LOGPROBS = Cell("decode", "logprobs")
EARLY = Cell("decode", "hidden_states", "1")
LAST = Cell("decode", "hidden_states", "last")
NOISE = {LOGPROBS: 0.5, EARLY: 0.01, LAST: 2.0}


def member(name: str, fits: bool, floors: float, noise: Mapping[Cell, float] = NOISE, references: int = 2) -> Member:
    """A member at ``floors`` noise floors in every cell of every reference."""
    cells = {cell: value * floors for cell, value in noise.items()}
    return Member(name, fits, {f"ref_{index}": cells for index in range(references)})


def decide(*members: Member, noise: Mapping[Cell, float] = NOISE, **extra: Any) -> RowVerdict:
    return decide_row(config_id="claimed", claim="attn=sdpa", members=members, noise=noise, **extra)


def test_bit_identical_to_the_claimed_config_is_consistent() -> None:
    row = decide(member("claimed", True, 0), member("eager", False, 0.01))
    assert (row.verdict, row.floors, row.snr, row.snr_infinite) == ("CONSISTENT", 0.0, None, True)
    assert row.label == "TRIVIALLY DETECTABLE"
    assert row.reasons == ("bit-identical to claimed",)


def test_kernel_class_across_the_claim_is_inconclusive_and_named() -> None:
    row = decide(
        member("claimed", True, 0), member("twin", False, 0), member("other", False, 9),
        kernel_classes=[("other", "another"), ("twin", "claimed")],
    )  # fmt: skip
    assert row.verdict == "INCONCLUSIVE"
    assert "twin" in row.reasons[0] and "other" not in row.reasons[0]
    assert row.kernel_class == ("claimed", "twin")
    assert row.label == "NOT RELIABLY DETECTABLE"


def test_kernel_class_within_the_claim_is_consistent() -> None:
    row = decide(member("claimed", True, 0), member("twin", True, 0), member("other", False, 9))
    assert row.verdict == "CONSISTENT"
    assert row.fits == ("claimed", "twin")


def test_bit_identical_to_a_contradicting_member_alone_is_inconsistent() -> None:
    row = decide(member("claimed", True, 0.001), member("eager", False, 0))
    assert row.verdict == "INCONSISTENT"
    assert row.nearest == "eager"
    assert row.reasons == ("bit-identical to eager, contradicting the claim",)
    assert decide(member("claimed", True, 50), member("eager", False, 0)).verdict == "INCONSISTENT"


def test_further_than_rounding_explains_is_inconsistent_even_if_nothing_fits_better() -> None:
    row = decide(member("claimed", True, 20), member("eager", False, 400))
    assert row.verdict == "INCONSISTENT"
    assert "20.00 noise floors over all layers, limit 2" in row.reasons[0]
    assert len(row.reasons) == 1
    named = decide(member("claimed", True, 20), member("nf4", False, 1))
    assert "nf4, which contradicts the claim, fits better: claimed is 20.00 times as far" in named.reasons[1]


def test_a_contradicting_member_that_fits_better_is_named() -> None:
    row = decide(member("claimed", True, 1.9), member("eager", False, 0.5), member("nf4", False, 30))
    assert row.verdict == "INCONSISTENT"
    assert "eager, which contradicts the claim, fits better" in row.reasons[0]


def test_contradicting_members_all_much_further_is_consistent() -> None:
    row = decide(member("claimed", True, 0.9), member("nf4", False, 20), member("int8", False, 4))
    assert (row.verdict, row.nearest, row.label, row.second_label) == (
        "CONSISTENT", "claimed", "MARGINALLY DETECTABLE", "Moderate",
    )  # fmt: skip
    assert row.snr == pytest.approx(4 / 0.9)
    assert "int8, the nearest that contradicts the claim, is 4.44 times as far" in row.reasons[1]


def test_not_told_apart_is_inconclusive_and_names_only_the_near_ones() -> None:
    row = decide(member("claimed", True, 0.9), member("nf4", False, 20), member("eager", False, 1.0))
    assert row.verdict == "INCONCLUSIVE"
    assert "not told apart from eager," in row.reasons[1]
    nearer = decide(member("claimed", True, 1.0), member("eager", False, 0.9))
    assert (nearer.verdict, nearer.nearest) == ("INCONCLUSIVE", "eager")


def test_nothing_that_contradicts_decides_nothing_but_identity() -> None:
    row = decide(member("claimed", True, 1.1))
    assert (row.verdict, row.snr, row.snr_infinite, row.label) == ("INCONCLUSIVE", None, False, "")
    assert "no member of the lineup contradicts" in row.reasons[1]
    identity = decide(member("claimed", True, 1.1), identity_only=True)
    assert identity.verdict == "CONSISTENT"
    assert "rests on the noise floor alone" in identity.reasons[1]
    assert decide(member("claimed", True, 2.1), identity_only=True).verdict == "INCONSISTENT"


def test_equality_says_nothing_about_what_was_not_replayed() -> None:
    assert decide(member("claimed", True, 0)).verdict == "INCONCLUSIVE"
    assert decide(member("claimed", True, 0), identity_only=True).verdict == "CONSISTENT"


def test_another_config_that_fits_the_words_of_the_claim_is_no_excuse() -> None:
    """Ran eager and nf4, declared sdpa, claims sdpa: sdpa with nf4 is near, and is not what was declared."""
    row = decide(member("claimed", True, 22.8), member("sdpa,nf4", True, 0.7), member("eager", False, 22.9))
    assert row.verdict == "INCONSISTENT"


def test_best_fitting_member_speaks_for_the_claim() -> None:
    row = decide(member("claimed", True, 1.9), member("attn=sdpa,tp=2", True, 1), member("eager", False, 10))
    assert (row.verdict, row.nearest, row.floors) == ("CONSISTENT", "attn=sdpa,tp=2", pytest.approx(1.0))


def test_signals_weigh_the_same_however_many_layers_they_have() -> None:
    cells = {LOGPROBS: 0.5 * 2, EARLY: 0.01 * 4, LAST: 2.0 * 8}
    row = decide(Member("claimed", True, {"ref_0": cells}))
    assert row.floors == pytest.approx((2 + (4 + 8) / 2) / 2)


def test_cells_without_a_noise_floor_are_left_out_and_said_so() -> None:
    noise = NOISE | {EARLY: 0.0}
    far_there = Member("claimed", True, {"ref_0": {LOGPROBS: 0.5, EARLY: 7.0, LAST: 2.0}})
    row = decide(far_there, noise=noise)
    assert row.floors == pytest.approx(1.0)
    assert row.reasons[-1] == "left out, having no noise floor: decode/hidden_states/1"
    assert [each.used for each in row.noise] == [False, True, True]
    silent = Member("claimed", True, {"ref_0": {LOGPROBS: 0.5, EARLY: 0.0, LAST: 2.0}})
    kept = decide(silent, noise=noise)
    assert kept.floors == pytest.approx((1 + (0 + 1) / 2) / 2) and all(each.used for each in kept.noise)


def test_without_any_noise_floor_only_equality_decides() -> None:
    none = dict.fromkeys(NOISE, 0.0)
    apart = decide(member("claimed", True, 1), member("nf4", False, 9), noise=none)
    assert (apart.verdict, apart.floors, apart.nearest, apart.label) == ("INCONCLUSIVE", None, "", "")
    equal = decide(member("claimed", True, 0), member("nf4", False, 9), noise=none)
    assert (equal.verdict, equal.nearest) == ("CONSISTENT", "claimed")
    assert decide(member("claimed", True, 1), member("nf4", False, 0), noise=none).verdict == "INCONSISTENT"


def test_references_are_counted_one_by_one() -> None:
    ours = {"ref_0": {LOGPROBS: 0.4}, "ref_1": {LOGPROBS: 0.5}, "ref_2": {LOGPROBS: 0.9}}
    theirs = {"ref_0": {LOGPROBS: 0.5}, "ref_1": {LOGPROBS: 0.5}, "ref_2": {LOGPROBS: 0.5}}
    row = decide(Member("claimed", True, ours), Member("eager", False, theirs), noise={LOGPROBS: 0.5})
    assert {score.id: score.nearest_in for score in row.scores} == {"claimed": 2, "eager": 2}
    assert row.references == 3


def test_values_stay_finite_however_small_the_noise_floor() -> None:
    row = decide(member("claimed", True, 1e300), member("eager", False, 1), noise=dict.fromkeys(NOISE, 5e-324))
    assert row.verdict == "INCONSISTENT"
    text = msgspec.json.encode(row).decode()
    assert '"floors":null' not in text.partition('"scores"')[2]
    assert msgspec.json.decode(text, type=RowVerdict) == row


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_a_value_that_is_no_distance_is_refused(bad: float) -> None:
    with pytest.raises(ReplayError, match=r"distance .* to 'claimed' on 'ref_0'"):
        decide(Member("claimed", True, {"ref_0": NOISE | {EARLY: bad}}))
    with pytest.raises(ReplayError, match="decode/hidden_states/1: noise floor"):
        decide(member("claimed", True, 1), noise=NOISE | {EARLY: bad})


def test_a_lineup_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(UsageError, match="holds for no member"):
        decide(member("eager", False, 1))
    with pytest.raises(UsageError, match="nothing was measured"):
        decide(Member("claimed", True, {"ref_0": {}}))
    with pytest.raises(Error, match="same id"):
        decide(member("claimed", True, 1), member("claimed", False, 1))
    with pytest.raises(Error, match="'eager' and 'claimed' hold different references or cells"):
        decide(member("claimed", True, 1), member("eager", False, 1, references=3))
    with pytest.raises(Error, match="no noise floor for decode/hidden_states/1"):
        decide(member("claimed", True, 1), noise={LOGPROBS: 0.5, LAST: 2.0})


def test_one_bad_row_spoils_a_bundle_and_one_open_row_leaves_it_open() -> None:
    good, bad = decide(member("claimed", True, 1), member("nf4", False, 9)), decide(member("claimed", True, 9))
    open_ = decide(member("claimed", True, 1), member("eager", False, 1))
    assert combine_rows([good, good]) == "CONSISTENT"
    assert combine_rows([good, open_]) == "INCONCLUSIVE"
    assert combine_rows([open_, good, bad]) == "INCONSISTENT"
    with pytest.raises(UsageError, match="no row was checked"):
        combine_rows([])


# Control and inverse control: configs as points, evidence as the true point plus another platform's rounding.
PHASES_SIGNALS: tuple[tuple[Phase, Signal], ...] = (("prefill", "logprobs"), ("decode", "hidden_states"))


def synthetic_row(claimed: str, true: str, seed: int, apart: float) -> RowVerdict:
    """Evidence of ``true`` under the claim ``claimed``; configs are ``apart`` times the noise apart."""
    rng = np.random.default_rng(seed)
    names, width, positions = ("sdpa", "nf4", "int8"), 64, 24
    noise: dict[Cell, list[float]] = {}
    distances: dict[str, dict[str, dict[Cell, float]]] = {name: {} for name in names}
    for reference in ("ref_0", "ref_1"):
        for phase, signal in PHASES_SIGNALS:
            cell = Cell(phase, signal, "1" if signal == "hidden_states" else "")
            configs = {name: apart / np.sqrt(2) * rng.normal(size=(positions, width)) for name in names}
            replays = {name: configs[name] + 0.7 * rng.normal(size=(positions, width)) for name in names}
            evidence = configs[true] + 0.7 * rng.normal(size=(positions, width))
            noise.setdefault(cell, []).append(_mean_l2(replays[claimed], configs[claimed]) * np.sqrt(2))
            for name in names:
                distances[name].setdefault(reference, {})[cell] = _mean_l2(evidence, replays[name])
    members = [Member(name, name == claimed, distances[name]) for name in names]
    return decide_row(
        config_id=claimed,
        claim=f"quant={claimed}",
        members=members,
        noise={cell: float(np.mean(values)) for cell, values in noise.items()},
    )


def _mean_l2(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b, axis=1).mean())


@pytest.mark.parametrize("seed", range(8))
def test_honest_claim_passes_and_the_same_evidence_under_a_false_claim_is_caught(seed: int) -> None:
    honest = synthetic_row("sdpa", "sdpa", seed, apart=20)
    false = synthetic_row("sdpa", "nf4", seed, apart=20)
    assert (honest.verdict, honest.nearest) == ("CONSISTENT", "sdpa")
    assert honest.floors == pytest.approx(1.0, rel=0.2)
    assert (false.verdict, false.nearest) == ("INCONSISTENT", "nf4")


@pytest.mark.parametrize("seed", range(8))
def test_configs_closer_than_the_noise_are_never_decided(seed: int) -> None:
    assert synthetic_row("sdpa", "sdpa", seed, apart=0.5).verdict == "INCONCLUSIVE"
    assert synthetic_row("sdpa", "nf4", seed, apart=0.5).verdict == "INCONCLUSIVE"


positive = st.floats(1e-6, 1e6)


@st.composite
def lineups(draw: st.DrawFn) -> tuple[list[Member], dict[Cell, float]]:
    cells = draw(st.lists(st.sampled_from(sorted(NOISE)), min_size=1, unique=True))
    noise = {cell: draw(positive) for cell in cells}
    count = draw(st.integers(1, 5))
    members = [
        Member(
            f"config {index}",
            index == 0 or draw(st.booleans()),
            {reference: {cell: draw(positive) for cell in cells} for reference in ("ref_0", "ref_1")},
        )
        for index in range(count)
    ]
    return members, noise


@given(lineups(), st.integers(-40, 40))
def test_units_do_not_matter(lineup: tuple[list[Member], dict[Cell, float]], exponent: int) -> None:
    members, noise = lineup
    scaled = [
        Member(
            each.id,
            each.fits,
            {
                reference: {cell: math.ldexp(value, exponent) for cell, value in cells.items()}
                for reference, cells in each.per_reference.items()
            },
        )
        for each in members
    ]
    before = decide(*members, noise=noise)
    after = decide(*scaled, noise={cell: math.ldexp(value, exponent) for cell, value in noise.items()})
    assert msgspec.structs.replace(after, noise=()) == msgspec.structs.replace(before, noise=())


@given(lineups(), st.data())
def test_order_of_the_lineup_does_not_matter(
    lineup: tuple[list[Member], dict[Cell, float]], data: st.DataObject
) -> None:
    members, noise = lineup
    assert decide(*data.draw(st.permutations(members)), noise=noise) == decide(*members, noise=noise)


@given(lineups())
def test_identical_evidence_is_always_consistent(lineup: tuple[list[Member], dict[Cell, float]]) -> None:
    members, noise = lineup
    same = {reference: dict.fromkeys(cells, 0.0) for reference, cells in members[0].per_reference.items()}
    cells = {reference: dict.fromkeys(held, 1.0) for reference, held in members[0].per_reference.items()}
    row = decide(Member("same", True, same), *members, Member("contradicting", False, cells), noise=noise)
    assert (row.verdict, row.nearest, row.floors) == ("CONSISTENT", "same", 0.0)


@given(lineups())
def test_the_verdict_follows_from_the_scores(lineup: tuple[list[Member], dict[Cell, float]]) -> None:
    members, noise = lineup
    row = decide(*members, noise=noise)
    fits = [score.floors for score in row.scores if score.fits and score.floors is not None]
    out = [score.floors for score in row.scores if not score.fits and score.floors is not None]
    # No member is called "claimed": the best fitting one stands for it.
    if row.verdict == "CONSISTENT":
        assert min(fits) <= 2 and min(out) > 3 * min(fits)
    elif row.verdict == "INCONSISTENT":
        assert min(fits) > 2 or min(fits) > 3 * min(out)
    else:
        assert min(fits) <= 2 and (not out or (min(out) <= 3 * min(fits) and min(fits) <= 3 * min(out)))
    assert row.reasons
