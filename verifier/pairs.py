"""Whether two configs can be told apart: DETECTABLE, NOT_DETECTABLE or UNRESOLVED, with the number of prompts that would resolve it.

The unit is the prompt: its signal is the mean distance between the two configs, its noise the mean of their own diagonals.
Logarithms of distances are taken as normal. DETECTABLE: of prompts of the one config, at least 90 % lie beyond a threshold
that at most α of honest prompts exceed; both are tolerance bounds at 95 % confidence (Howe, JASA 64, 1969; here by
simulation). NOT_DETECTABLE is an equivalence test, not a failure to reject: the upper 95 % bound of signal over noise,
paired within prompts, lies below :data:`EQUIVALENT`. Of many pairs together each of the two is said with 95 % confidence that
none is wrong (Holm, Scandinavian Journal of Statistics 6, 1979). Pure NumPy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from statistics import NormalDist
from typing import Literal

import msgspec
import numpy as np

from fpforensics.common.errors import UsageError
from fpforensics.verifier.distance import Floats

PairVerdict = Literal["DETECTABLE", "NOT_DETECTABLE", "UNRESOLVED"]

ALPHA = 0.01
POWER = 0.9
CONFIDENCE = 0.95
EQUIVALENT = 1.5
"""Signal over noise that no detector makes use of: at α = 0.01 it would catch about one lie in eight."""
SPREAD = 0.34
"""Standard deviation of the logarithm of a prompt's distance where only aggregates are known: the largest that we measured at
three positions over log-probabilities and the layers where the published studies looked (median 0.13 to 0.25)."""
_TRIED = (2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024)
_DRAWS = 200_000
_CONFIDENCES = (0.5, 1 - 20 / _DRAWS)  # between which p-values are resolved: beyond, too few draws
_LARGEST_LOG = math.log(np.finfo(np.float64).max)


class PairDecision(msgspec.Struct, frozen=True, kw_only=True):
    """The verdict on a pair over ``prompts`` prompts. ``prompts_needed`` is None when resolved, or never to be.

    ``snr`` is the ratio of geometric means, None for no noise at all and for a ratio beyond float64.
    """

    verdict: PairVerdict
    prompts: int
    snr: float | None
    prompts_needed: int | None = None


def decide_pair(signal: Sequence[float], noise: Sequence[float], alpha: float = ALPHA) -> PairDecision:
    """``signal`` and ``noise`` of each prompt, (n,) each. Raises :class:`UsageError` unless both hold n ≥ 1 distances.

    Without any noise equality decides: a signal is DETECTABLE, none is not.
    """
    return decide_pairs([(signal, noise)], alpha)[0]


def decide_pairs(pairs: Sequence[tuple[Sequence[float], Sequence[float]]], alpha: float = ALPHA) -> list[PairDecision]:
    """:func:`decide_pair` of several pairs of one study: Holm's correction keeps the confidence for all of them together."""
    for signal, noise in pairs:
        _require_one_each(signal, noise)
    found: list[PairDecision | None] = [
        None if min(*signal, *noise) > 0 else _by_equality(signal, noise) for signal, noise in pairs
    ]
    open_ = [index for index, decision in enumerate(found) if decision is None]
    gaps = [_Gap.of(*(np.array(each, np.float64) for each in pairs[index])) for index in open_]
    verdicts: list[PairVerdict] = ["UNRESOLVED"] * len(gaps)
    for verdict, odds in (
        ("NOT_DETECTABLE", [gap.p_equivalent() for gap in gaps]),
        ("DETECTABLE", [gap.p_detectable(alpha) for gap in gaps]),
    ):
        for index in holm(odds):
            verdicts[index] = verdict  # type: ignore[call-overload]
    strict = 1 - (1 - CONFIDENCE) / max(1, len(gaps))
    for index, gap, verdict in zip(open_, gaps, verdicts, strict=True):
        found[index] = gap.decision(verdict, alpha, strict)
    return [each for each in found if each is not None]


def holm(odds: Sequence[float]) -> list[int]:
    """The indices of the hypotheses that Holm's procedure rejects, given their p-values, at 1 - :data:`CONFIDENCE` for all together."""
    rejected: list[int] = []
    for rank, index in enumerate(sorted(range(len(odds)), key=lambda each: odds[each])):
        if odds[index] > (1 - CONFIDENCE) / (len(odds) - rank):
            break
        rejected.append(index)
    return rejected


def decide_aggregate(signal: float, noise: float, prompts: int = 1, alpha: float = ALPHA) -> PairDecision:
    """The same from means over ``prompts`` prompts, for studies that published no more; assumes :data:`SPREAD`.

    Raises :class:`UsageError` for less than one prompt.
    """
    if prompts < 1:
        raise UsageError(f"means over {prompts} prompts", "give the number of prompts that were averaged, at least 1")
    if signal <= 0 or noise <= 0:
        return _by_equality([signal], [noise])
    gap = _Gap(math.log(signal) - math.log(noise), prompts)
    detectable, equivalent = gap.p_detectable(alpha), gap.p_equivalent()
    verdict: PairVerdict = "UNRESOLVED"
    if detectable <= 1 - CONFIDENCE:
        verdict = "DETECTABLE"
    elif equivalent <= 1 - CONFIDENCE:
        verdict = "NOT_DETECTABLE"
    return gap.decision(verdict, alpha, CONFIDENCE)


@dataclass(frozen=True)
class _Gap:
    """The mean logarithm of signal over noise over ``prompts``, and the standard deviations of both and of their difference.

    Without standard deviations :data:`SPREAD` stands for all three.
    """

    mean: float
    prompts: int
    signal: float | None = None
    noise: float | None = None
    difference: float | None = None

    @classmethod
    def of(cls, distances: Floats, floors: Floats) -> _Gap:
        logs, log_floors = np.log(distances), np.log(floors)
        gaps = logs - log_floors
        if len(gaps) == 1:
            return cls(float(gaps[0]), 1)
        return cls(
            float(gaps.mean()), len(gaps), *(max(float(each.std(ddof=1)), 1e-9) for each in (logs, log_floors, gaps))
        )

    def p_detectable(self, alpha: float) -> float:
        """One minus the highest confidence with which the pair is detectable."""
        return _least(lambda confidence: self.mean > self._reach(self.prompts, alpha, confidence))

    def p_equivalent(self) -> float:
        """One minus the highest confidence with which it is not."""
        return _least(lambda confidence: self._upper(self.prompts, confidence) < math.log(EQUIVALENT))

    def decision(self, verdict: PairVerdict, alpha: float, confidence: float) -> PairDecision:
        """With the number of prompts that would resolve what is not, at this confidence."""
        needed = None
        if verdict == "UNRESOLVED":
            more = (n for n in _TRIED if n > self.prompts)
            needed = next((n for n in more if self._resolved(n, alpha, confidence)), None)
        snr = math.exp(self.mean) if abs(self.mean) < _LARGEST_LOG else None
        return PairDecision(verdict=verdict, prompts=self.prompts, snr=snr, prompts_needed=needed)

    def _resolved(self, prompts: int, alpha: float, confidence: float) -> bool:
        detectable = self.mean > self._reach(prompts, alpha, confidence)
        return detectable or self._upper(prompts, confidence) < math.log(EQUIVALENT)

    def _reach(self, prompts: int, alpha: float, confidence: float) -> float:
        """What the gap must exceed to be detectable."""
        if self.signal is None or self.noise is None:
            sure = _z(confidence) / math.sqrt(prompts)
            return (_z(1 - alpha) + _z(POWER) + 2 * sure) * SPREAD
        ours, theirs = tolerance(prompts, 1 - alpha, confidence), tolerance(prompts, POWER, confidence)
        return ours * self.noise + theirs * self.signal

    def _upper(self, prompts: int, confidence: float) -> float:
        """The upper bound of the gap."""
        if self.difference is None:
            return self.mean + _z(confidence) / math.sqrt(prompts) * SPREAD * math.sqrt(2)
        return self.mean + t_quantile(prompts, confidence) * self.difference / math.sqrt(prompts)


def _least(holds: Callable[[float], bool]) -> float:
    """1 - the highest confidence at which ``holds`` (true up to it), to within a hundredth of itself; 1 if it never does."""
    low, high = -math.log(1 - _CONFIDENCES[0]), -math.log(1 - _CONFIDENCES[1])
    if not holds(-math.expm1(-low)):
        return 1.0
    if holds(-math.expm1(-high)):
        return math.exp(-high)
    while high - low > 0.01:
        middle = (low + high) / 2
        low, high = (middle, high) if holds(-math.expm1(-middle)) else (low, middle)
    return math.exp(-low)


def _require_one_each(signal: Sequence[float], noise: Sequence[float]) -> None:
    if len(signal) != len(noise) or not signal:
        raise UsageError(f"{len(signal)} signals and {len(noise)} noises", "give one of each for every prompt")


def _by_equality(distances: Sequence[float], floors: Sequence[float]) -> PairDecision:
    """Where some distance is exactly 0: the lanes of logarithms have nothing to say. Plain numbers: mostly a few."""
    if not any(floors):
        differ = [each > 0 for each in distances]
        verdict: PairVerdict = "DETECTABLE" if all(differ) else "UNRESOLVED" if any(differ) else "NOT_DETECTABLE"
        return PairDecision(verdict=verdict, prompts=len(distances), snr=None)
    snr = sum(distances) / sum(floors)
    return PairDecision(verdict="UNRESOLVED", prompts=len(distances), snr=snr if math.isfinite(snr) else None)


@cache
def _z(share: float) -> float:
    return NormalDist().inv_cdf(share)


@lru_cache(1 << 12)
def tolerance(count: int, share: float, confidence: float = CONFIDENCE) -> float:
    """k of the one-sided normal tolerance bound: mean + k·s lies above ``share`` of the population, as often as ``confidence`` says."""
    return _quantile(_tolerances(count, share), confidence)


@lru_cache(1 << 12)
def t_quantile(count: int, confidence: float = CONFIDENCE) -> float:
    """A quantile of Student's t with ``count`` - 1 degrees of freedom, simulated."""
    return _quantile(_students(count), confidence)


def _quantile(ascending: Floats, confidence: float) -> float:
    return float(ascending[min(len(ascending) - 1, math.ceil(confidence * len(ascending)) - 1)])


@lru_cache(6)
def _tolerances(count: int, share: float) -> Floats:
    normals, chi = _draws(count)
    return np.sort((normals / math.sqrt(count) + _z(share)) / np.sqrt(chi / (count - 1)))


@lru_cache(6)
def _students(count: int) -> Floats:
    normals, chi = _draws(count)
    return np.sort(normals / np.sqrt(chi / (count - 1)))


def _draws(count: int) -> tuple[Floats, Floats]:
    rng = np.random.default_rng(count)
    return rng.standard_normal(_DRAWS), rng.chisquare(count - 1, _DRAWS)
