"""The decision without a calibration: equality first, then two fixed limits, which have no error rate.

Arithmetic on :class:`~fpforensics.verifier.members.MemberScore` alone. D_in is the best
score of a member for which the claim holds, D_out of one which contradicts it. In order:

 0. Some member is bit-identical, though the bundle states another kind of device: INCONSISTENT, too good to come from there.
 1. A fitting member is bit-identical: CONSISTENT, or INCONCLUSIVE if a contradicting one is too.
 2. Only a contradicting member is bit-identical: INCONSISTENT. So is evidence that no member equals, where prover and verifier
    share hardware, software and kernels: there the test is equality (:mod:`fpforensics.verifier.exact`).
 3. The claimed config itself, which is the row's declaration with the claim applied, is more than 2 noise floors away:
    INCONSISTENT, rounding does not explain the distance. That another config fits the words of the claim is no excuse.
 4. Nothing in the lineup contradicts the claim: INCONCLUSIVE, unless it is about identity alone (which model): no config can
    contradict that, and CONSISTENT rests on the noise floor.
 5. D_in / D_out is more than 3: INCONSISTENT, a contradicting member fits better.
 6. D_out / D_in is more than 3: CONSISTENT.
 7. Otherwise INCONCLUSIVE, naming the contradicting members that are not told apart.

Rule 4 comes before a CONSISTENT of rule 1 too: equality with one config says nothing about a config that was not replayed.
Without a usable noise floor only rules 0 to 2 can decide.
"""

from __future__ import annotations

from collections.abc import Sequence

from fpforensics.verifier.calibrated import Verdict
from fpforensics.verifier.exact import Setting
from fpforensics.verifier.matrix import ratio
from fpforensics.verifier.members import MemberScore

MAX_FLOORS = 2.0
"""Noise floors from the claimed config that rounding may explain: honest evidence measured 0 to 1.16, int8 weights 2.2."""
MIN_RATIO = 3.0
"""How many times nearer than another a member must be to be told apart: the published scale's lowest step."""
_UNOPPOSED = "no member of the lineup contradicts the claim"


def by_equality(
    claimed: MemberScore,
    fitting: list[MemberScore],
    contradicting: list[MemberScore],
    identity_only: bool,
    setting: Setting,
) -> tuple[Verdict, tuple[str, ...]] | None:
    """Rules 0 to 2 of the module's docstring; None where bits decide nothing. Both lists best first, ``fitting`` not empty."""
    equal_in = [score.id for score in fitting if score.bit_identical]
    equal_out = [score.id for score in contradicting if score.bit_identical]
    # 0.
    if setting.apart and (equal_in or equal_out):
        said = f"bit-identical to {listed(equal_in + equal_out)} as computed here, though the bundle states {setting.stated}"
        return "INCONSISTENT", (f"{said}: too good to come from another kind of device",)
    # 1.
    if equal_in and equal_out:
        return "INCONCLUSIVE", (
            f"bit-identical to {listed(equal_in)}, for which the claim holds, and to {listed(equal_out)}, "
            "contradicting it: one kernel class on this machine, nothing can tell them apart",
        )
    if equal_in and (contradicting or identity_only):
        return "CONSISTENT", (f"bit-identical to {listed(equal_in)}",)
    if equal_in:
        return "INCONCLUSIVE", (f"bit-identical to {listed(equal_in)}, but {_UNOPPOSED}: add one that does",)
    # 2.
    if equal_out:
        return "INCONSISTENT", (f"bit-identical to {listed(equal_out)}, contradicting the claim",)
    if setting.shared and setting.first_difference:
        return "INCONSISTENT", (
            "the bundle states this verifier's own hardware, software and kernels, where honest evidence is bit-identical",
            f"it first differs from {claimed.id} at {setting.first_difference}",
        )
    return None


def by_limits(
    claimed: MemberScore, fitting: list[MemberScore], contradicting: list[MemberScore], identity_only: bool
) -> tuple[Verdict, tuple[str, ...]]:
    """Rules 3 to 7 of the module's docstring. Both lists best first, ``fitting`` not empty."""
    d_in = fitting[0].floors
    if d_in is None or claimed.floors is None:
        return "INCONCLUSIVE", ("no cell has a noise floor to measure the distance by",)
    # 3.
    if claimed.floors > MAX_FLOORS:
        return "INCONSISTENT", (
            f"further from the claimed config than rounding explains: {number(claimed.floors)} noise floors over all "
            f"layers, limit {MAX_FLOORS:g}",
            *_better(claimed, contradicting),
        )
    resting = (
        f"{number(d_in)} noise floors from {fitting[0].id} over all layers, within the fixed limit of {MAX_FLOORS:g}"
    )
    # 4.
    if not contradicting:
        if identity_only:
            return "CONSISTENT", (resting, f"{_UNOPPOSED}: this rests on the noise floor alone")
        return "INCONCLUSIVE", (resting, f"{_UNOPPOSED}: add one that does")
    best = contradicting[0]
    # 5.
    if ratio(d_in, best.floors).exceeds(MIN_RATIO):
        return "INCONSISTENT", _better(fitting[0], contradicting)
    # 6.
    if ratio(best.floors, d_in).exceeds(MIN_RATIO):
        times = _times(best.floors, d_in)
        return "CONSISTENT", (
            resting,
            f"{best.id}, the nearest that contradicts the claim, is {times} as far over all layers",
        )
    # 7.
    alike = [score.id for score in contradicting if not ratio(score.floors, d_in).exceeds(MIN_RATIO)]
    return "INCONCLUSIVE", (resting, f"not told apart from {listed(alike)}, contradicting the claim")


def _better(fitting: MemberScore, contradicting: Sequence[MemberScore]) -> tuple[str, ...]:
    """The sentence that names a clearly better contradicting member, if there is one."""
    if not contradicting or not ratio(fitting.floors, contradicting[0].floors).exceeds(MIN_RATIO):
        return ()
    best = contradicting[0]
    times = _times(fitting.floors, best.floors)
    return (f"{best.id}, which contradicts the claim, fits better: {fitting.id} is {times} as far over all layers",)


def number(value: float) -> str:
    """A number of noise floors, or of times."""
    return f"{value:.2f}" if value < 1000 else f"{value:.3g}"


def listed(ids: Sequence[str]) -> str:
    """Ids in the order of the alphabet."""
    return ", ".join(sorted(ids))


def _times(far: float | None, near: float | None) -> str:
    times = ratio(far, near)
    return "infinitely" if times.value is None else f"{number(times.value)} times"
