"""A row whose own repetitions differed: its noise, as far as it is believed, can excuse and never vouch."""

from __future__ import annotations

from collections.abc import Mapping

from fpforensics.common.evidence import Repetitions
from fpforensics.verifier.decision import Member, RowVerdict, decide_row
from fpforensics.verifier.distance import Cell
from fpforensics.verifier.repeats import noise_factors, with_own_noise

LOGPROBS = Cell("decode", "logprobs")
EARLY = Cell("decode", "hidden_states", "1")
NOISE = {LOGPROBS: 0.5, EARLY: 0.01}


def repeated(floors: float | None, *, bit_identical: bool = False) -> Repetitions:
    """Repetitions that lay ``floors`` noise floors apart in every cell."""
    return Repetitions(
        count=3,
        bit_identical=bit_identical,
        wall_seconds=(1.0, 1.0, 1.0),
        wall_mean=1.0,
        wall_variance=0.0,
        first_divergence="ref_0, decode, position 50, logprobs: |Δ| = 0.01",
        noise={} if floors is None else {str(cell): value * floors for cell, value in NOISE.items()},
    )


def decide(distance: float, rival: float, repetitions: Repetitions) -> RowVerdict:
    """Evidence at ``distance`` noise floors from the claimed config, and at ``rival`` from one that contradicts the claim."""

    def again(factors: Mapping[Cell, float]) -> RowVerdict:
        members = [
            Member(name, fits, {"ref_0": {cell: value * floors for cell, value in NOISE.items()}})
            for name, fits, floors in (("claimed", True, distance), ("other", False, rival))
        ]
        noise = {cell: value * factors.get(cell, 1.0) for cell, value in NOISE.items()}
        return decide_row(config_id="claimed", claim="quant=none", members=members, noise=noise)

    return with_own_noise(again({}), repetitions, NOISE, again)


def test_what_own_noise_explains_is_inconclusive_and_no_more() -> None:
    row = decide(3.0, 100.0, repeated(1.8))
    assert row.verdict == "INCONCLUSIVE"  # though 100 / 3 floors apart would be CONSISTENT by the ratio
    assert row.reasons[0].startswith("the prover's own repetitions differed from ref_0, decode, position 50")
    assert "by up to 1.80 noise floors, at decode/" in row.reasons[0]
    assert "3.00 noise floors over all layers, limit 2" in row.reasons[2]
    assert row.floors == 3.0 and all(each.noise == NOISE[each.cell] for each in row.noise)


def test_little_noise_excuses_little() -> None:
    assert decide(3.0, 100.0, repeated(1.2)).verdict == "INCONSISTENT"
    assert decide(3.0, 100.0, repeated(None)).verdict == "INCONSISTENT"
    assert decide(3.0, 100.0, repeated(-5.0)).verdict == "INCONSISTENT"


def test_noise_is_believed_up_to_what_rounding_makes() -> None:
    row = decide(5.0, 100.0, repeated(1e9))
    assert row.verdict == "INCONSISTENT"
    assert "1e+09 noise floors" in row.reasons[-1] and "(believed up to 2)" in row.reasons[-1]
    assert set(noise_factors(repeated(1e9), NOISE).values()) == {2.0}


def test_a_config_that_fits_better_is_not_hidden() -> None:
    assert decide(3.0, 0.5, repeated(2.0)).verdict == "INCONSISTENT"


def test_a_consistent_row_stays_so_and_says_that_it_was_noisy() -> None:
    row = decide(0.9, 20.0, repeated(0.7))
    assert row.verdict == "CONSISTENT"
    assert row.reasons[-1].endswith("by up to 0.70 noise floors, at decode/logprobs: not held to equality")
    assert decide(0.9, 20.0, repeated(None)).reasons[-1].endswith("by how much is not stated")


def test_a_row_that_repeated_in_every_bit_is_excused_nothing() -> None:
    row = decide(3.0, 100.0, repeated(2.0, bit_identical=True))
    assert row.verdict == "INCONSISTENT" and "repetitions" not in str(row.reasons)
    assert noise_factors(repeated(2.0, bit_identical=True), NOISE) == {}
