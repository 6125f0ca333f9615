"""The calibrated rule: a claim is judged by which members of the lineup could have made the evidence.

In order, after equality has been looked at (rules 0 to 2 of :mod:`fpforensics.verifier.fixed`):

 3. Honest evidence of the claimed config would look like this at most α of the time: INCONSISTENT.
 4. It states another kind of device, and is nearer than honest evidence from one: INCONCLUSIVE, too good to vouch for. Nothing in
    the lineup contradicts the claim: INCONCLUSIVE, or CONSISTENT for a claim about identity alone.
 5. Every member that contradicts the claim is rejected, each at α: CONSISTENT, unless a prompt or a phase alone is unlike any honest
    evidence (a limit, without an error rate).
 6. Otherwise INCONCLUSIVE, naming those that remain.

So an honest claim comes out INCONSISTENT at most α of the time, and a false one CONSISTENT at most α of the time when what
really ran is in the lineup: as far as the profile's honest prompts speak for this hardware and model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fpforensics.common.signals import PHASES
from fpforensics.common.words import counted
from fpforensics.verifier.lanes import (
    ALPHA,
    LANES,
    Tested,
    margin_of,
    prompt_margins,
    prompts_to_settle,
    rivals_of,
    test_member,
)
from fpforensics.verifier.matrix import Classes
from fpforensics.verifier.profile import Pool
from fpforensics.verifier.score import Scores, prompts_worth

Verdict = Literal["CONSISTENT", "INCONSISTENT", "INCONCLUSIVE"]
FAR = 2.0
"""Noise floors beyond which a config that no profile covers is rejected, without an error rate."""
FAR_FROM_WIDER = 0.5
"""The same for a config of a wider dtype than the claimed one: what it computes lies at its own replay, hardly a floor away."""
ENOUGH = 16
"""Positions below which evidence scatters too much for the limit on wider dtypes."""
OUTLYING = 0.1
"""By how much a part (one prompt, one phase) must pass the most unusual honest prompt before it keeps the whole from being CONSISTENT:
in noise floors, and in the logarithm of the margin."""
_MOST_NAMED = 4


@dataclass(frozen=True)
class Part:
    """One prompt or one phase of the evidence, alone, and the pool of as many positions."""

    name: str
    scores: Scores
    pool: Pool

    def outlying(self, claimed: str, same: Collection[str], rivals: Collection[str]) -> bool:
        """Whether it is further from its own replay, or nearer to another, than the most unusual honest prompt of the pool."""
        if self.scores.floors[claimed] > self.pool.far + OUTLYING:
            return True
        if not rivals or not self.pool.margin:
            return False
        return margin_of(self.scores.distance, [claimed, *same], rivals) < self.pool.least_margin - OUTLYING


@dataclass(frozen=True)
class Calibration:
    """One row's scores, the pool that they are held against, and the members that the profile covers.

    ``wider`` are members of a wider dtype than the claimed config's, the anchor among them. ``kinds`` says of each member
    which kind it is of: members of one kind are no rivals (see :func:`fpforensics.verifier.lanes.rivals_of`). ``pools`` holds the
    members' own pools where each was calibrated by itself, and ``against`` what each one's margins were measured over.
    ``larger`` are the pools of more positions than the evidence is worth.
    """

    scores: Scores
    pool: Pool
    profile: str
    covered: Collection[str]
    wider: Collection[str] = ()
    kinds: Mapping[str, str] | None = None
    alpha: float = ALPHA
    pools: Mapping[str, Pool] | None = None
    against: Mapping[str, Collection[str]] | None = None
    parts: Sequence[Part] = ()
    larger: Sequence[Pool] = ()

    def pool_of(self, name: str) -> Pool:
        """The pool that ``name`` is held against."""
        return (self.pools or {}).get(name, self.pool)

    def measured(self, name: str, rivals: Collection[str]) -> list[str]:
        """Those of ``rivals`` that the margins of ``name`` were measured over: another could lie nearer honestly."""
        held = (self.against or {}).get(name)
        return [each for each in rivals if held is None or each in held]


@dataclass(frozen=True)
class Judgement:
    """The rule's answer. ``tested`` holds each member's own test; ``p`` is the claim's."""

    verdict: Verdict
    reasons: tuple[str, ...]
    p: float
    tested: dict[str, Tested]
    prompts_needed: int | None = None


def judge(
    claimed: str,
    fitting: Collection[str],
    contradicting: Collection[str],
    calibration: Calibration,
    classes: Classes = (),
    identity_only: bool = False,
    apart: bool = False,
) -> Judgement:
    """Apply rules 3 to 6. ``claimed`` is one of ``fitting``, and covered by the profile; ``apart`` says that the evidence
    states another kind of device than the replays ran on."""
    scores, pool, alpha = calibration.scores, calibration.pool, calibration.alpha
    others = [name for name in fitting if name != claimed]
    # A config that nothing here can tell from the claimed one is no rival of it.
    rivals = calibration.measured(claimed, rivals_of(claimed, contradicting, classes, calibration.kinds))
    claim = test_member(claimed, scores, pool, rivals, same=others)
    tested = {claimed: claim}
    for name in contradicting:
        # The sign test holds against one rival at a time: for a config that no profile covers, the claimed one.
        others_than = [*fitting, *contradicting] if name in calibration.covered else [claimed]
        against = rivals_of(name, others_than, classes, calibration.kinds)
        tested[name] = _test(name, against, calibration)
    where = f"{scores.floors[claimed]:.2f} noise floors from {claimed} in the early layers"
    if claim.rejected(alpha):
        return Judgement("INCONSISTENT", _why(claimed, claim, rivals, calibration), claim.p, tested)
    near = calibration.pool_of(claimed).p_near(scores.floors[claimed])
    if apart and near <= alpha:
        too_near = (
            f"{where}: nearer than honest evidence from another kind of device (p = {near:.2g}), too good to vouch for"
        )
        return Judgement("INCONCLUSIVE", (too_near,), claim.p, tested)
    resting = f"{where}, as honest evidence is ({_p(claim)})"
    least = _least(pool)
    if claim.p <= least * (1 + 1e-9) and contradicting:
        resting = f"{where}; p = {claim.p:.2g} is the least that this profile can give, so it cannot judge the claim"
    unopposed = "no member of the lineup contradicts the claim"
    if not contradicting:
        if identity_only:
            return Judgement(
                "CONSISTENT", (resting, f"{unopposed}: this rests on the noise floor alone"), claim.p, tested
            )
        return Judgement("INCONCLUSIVE", (resting, f"{unopposed}: add one that does"), claim.p, tested)
    remain = [name for name in contradicting if not tested[name].rejected(alpha)]
    odd = [part.name for part in calibration.parts if part.outlying(claimed, others, rivals)]
    if len(odd) <= _by_chance(calibration) and not set(odd) & set(PHASES):
        odd = []
    if not remain and odd:
        said = f"alone, {', '.join(odd[:_MOST_NAMED])} would be unlike any honest evidence: the whole hides it, but is not vouched for"
        return Judgement("INCONCLUSIVE", (resting, said), claim.p, tested)
    if not remain:
        worst = max(contradicting, key=lambda name: tested[name].p)
        said = f"every member that contradicts the claim is rejected; the last one to be is {worst} ({_p(tested[worst])}, {tested[worst].lane} lane)"
        return Judgement("CONSISTENT", (resting, said), claim.p, tested)
    needed = _needed(remain, [claimed, *others], classes, calibration)
    said = f"not told apart from {', '.join(sorted(remain))}, contradicting the claim"
    if needed:
        said += f": about {counted(needed, 'prompt')} like these would settle it"
    return Judgement("INCONCLUSIVE", (resting, said), claim.p, tested, needed)


def _by_chance(calibration: Calibration) -> int:
    """How many of so many honest prompts may leave the range of the calibrated ones, on either of two sides."""
    prompts = sum(part.name not in PHASES for part in calibration.parts)
    return round(2 * prompts / (calibration.pool.prompts + 1))


def _test(name: str, rivals: Collection[str], calibration: Calibration) -> Tested:
    covered = name in calibration.covered
    rivals = calibration.measured(name, rivals)
    found = test_member(name, calibration.scores, calibration.pool_of(name), rivals, covered=covered)
    if covered or found.rejected(calibration.alpha):
        return found
    floors, limit = calibration.scores.floors[name], FAR
    if name in calibration.wider:
        if calibration.scores.positions < ENOUGH:
            return found
        floors, limit = calibration.scores.distance[name], FAR_FROM_WIDER
    return Tested(0.0, "limit", floors) if floors > limit else found


def _why(claimed: str, claim: Tested, rivals: Collection[str], calibration: Calibration) -> tuple[str, ...]:
    scores = calibration.scores
    said = {
        "absolute": f"{claim.value:.2f} noise floors from {claimed} in the early layers, further than honest evidence is",
        "noise": f"its own rounding noise is {claim.value:.2f} times what {claimed} makes: too good to be this config",
        "lineup": f"honest evidence of {claimed} is not this much nearer to another config",
    }[claim.lane]
    reasons = [f"{said} ({_p(claim)})"]
    if rivals:
        best = min(rivals, key=lambda name: scores.distance[name])
        if scores.distance[best] < scores.distance[claimed]:
            times = scores.distance[claimed] / max(scores.distance[best], 1e-9)
            reasons.append(
                f"{best}, which contradicts the claim, fits better: {claimed} is {times:.2f} times as far in the early layers"
            )
    return tuple(reasons)


def _needed(remain: Collection[str], names: list[str], classes: Classes, calibration: Calibration) -> int | None:
    """Prompts like these after which each of those that remain would be rejected; None if no number is known to do.

    By the sign test for members that no profile covers. For the others the p-value comes from larger pools, if margins stay as they
    are: several prompts are worth half of their positions together.
    """
    every: list[int | None] = []
    for name in remain:
        against = calibration.measured(name, rivals_of(name, names, classes, calibration.kinds))
        if not against:
            return None
        if name not in calibration.covered:
            every.append(prompts_to_settle(prompt_margins([name], calibration.scores, against), calibration.alpha))
            continue
        margin = margin_of(calibration.scores.distance, [name], against)
        settles = [pool for pool in calibration.larger if LANES * pool.p_margin(margin) <= calibration.alpha]
        every.append(prompts_worth(settles[0].positions, calibration.scores.per_prompt) if settles else None)
    found = [each for each in every if each is not None]
    return max(found) if len(found) == len(every) else None


def _least(pool: Pool) -> float:
    """The smallest p-value that the lanes can give together."""
    return min(1.0, LANES / (pool.prompts + 1))


def _p(tested: Tested) -> str:
    return f"p = {tested.p:.2g}" if tested.p > 0 else "a limit without an error rate"
