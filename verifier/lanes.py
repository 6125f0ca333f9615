"""The calibrated decision: which configs of the lineup could have made this evidence, at a known error rate.

Every member is a hypothesis, rejected when honest evidence of it would so rarely look like this. Three lanes test it,
each at a third of the level (Bonferroni), on all prompts together:

- **absolute**: the evidence is not further from the member's replay than honest evidence is. Catches what is not in
  the lineup: other weights, another prompt, another quantization.
- **noise**: the evidence carries no less rounding noise of its own than the member's arithmetic makes. Catches evidence
  computed in a wider dtype: too good to be true. (More noise than that is distance, which the first lane sees.)
- **lineup**: no other member lies nearer by more than happens to honest evidence. Catches neighbours: another kernel.

All positions of a bundle together are held against single honest prompts of as many positions or fewer: several prompts
scatter less than one, which errs on the side of the honest. For a config that the profile does not cover only the sign test over prompts speaks: evidence is nearest
to its own config at least as often as not. The p-values hold for one look at a bundle; they are not anytime-valid.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from fpforensics.verifier.matrix import Classes, same_class
from fpforensics.verifier.profile import Pool
from fpforensics.verifier.score import Scores

ALPHA = 0.01
LANES = 3
# Keeps logarithms finite: nearer than this is identical.
_LEAST = 1e-12


@dataclass(frozen=True)
class Tested:
    """What the lanes say about one hypothesis. ``p`` is the smallest p-value times the number of lanes."""

    p: float
    lane: str
    value: float

    def rejected(self, alpha: float) -> bool:
        """Whether honest evidence would look like this at most ``alpha`` of the time."""
        return self.p <= alpha


def test_member(
    name: str, scores: Scores, pool: Pool, rivals: Collection[str], *, same: Collection[str] = (), covered: bool = True
) -> Tested:
    """Test the hypothesis that ``name`` made the evidence, against ``rivals``; ``same`` are as good as ``name``.

    ``covered`` says whether the pool speaks for such a config; if not, only the lineup lane's sign test does.
    """
    found: list[tuple[float, str, float]] = []
    if covered:
        floors = scores.floors[name]
        found.append((pool.p_floors(floors), "absolute", floors))
        if name in scores.noise:
            found.append((pool.p_noise(scores.noise[name]), "noise", scores.noise[name]))
    if rivals:
        margin = margin_of(scores.distance, [name, *same], rivals)
        p = pool.p_margin(margin) if covered else sign_test(prompt_margins([name, *same], scores, rivals))
        found.append((p, "lineup", margin))
    if not found:
        return Tested(1.0, "", 0.0)
    p, lane, value = min(found)
    return Tested(min(1.0, LANES * p), lane, value)


def prompt_margins(names: Sequence[str], scores: Scores, rivals: Collection[str]) -> list[float]:
    """The margin of each prompt alone."""
    return [
        margin_of({name: scores.by_prompt[name][index] for name in (*names, *rivals)}, names, rivals)
        for index in range(len(scores.references))
    ]


def margin_of(distance: Mapping[str, float], names: Sequence[str], rivals: Collection[str]) -> float:
    """log(distance to the nearest rival / distance to the nearest of ``names``)."""
    nearest = max(min(distance[name] for name in names), _LEAST)
    return math.log(max(min(distance[rival] for rival in rivals), _LEAST) / nearest)


def sign_test(margins: Sequence[float]) -> float:
    """P(so few prompts nearer to the own config), if that happens at least half of the time: exact, one-sided."""
    nearer = sum(margin >= 0 for margin in margins)
    return float(sum(math.comb(len(margins), k) for k in range(nearer + 1)) / 2 ** len(margins))


def prompts_to_settle(margins: Sequence[float], alpha: float) -> int | None:
    """How many prompts would reject a hypothesis by the sign test, if they keep going as these do; None if never."""
    share = sum(margin >= 0 for margin in margins) / len(margins)
    if share >= 0.5:
        return None
    for count in range(1, 1001):
        nearer = round(share * count)
        if LANES * sum(math.comb(count, k) for k in range(nearer + 1)) / 2**count <= alpha:
            return max(count, len(margins) + 1)
    return None


def rivals_of(name: str, names: Collection[str], classes: Classes, kinds: Mapping[str, str] | None = None) -> list[str]:
    """The members that can be told apart from ``name``: not of its kernel class, and of another of ``kinds``.

    The margins of the pools were measured between kinds (attention, dtype, quantization, partial sums). Two configs of one
    kind may differ by a bit: which of them lies nearer says nothing.
    """
    kind = kinds or {}
    return [
        other
        for other in names
        if other != name
        and not same_class(name, other, classes)
        and (name not in kind or kind[name] != kind.get(other))
    ]
