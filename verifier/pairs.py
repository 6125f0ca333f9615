"""Whether two configs can be told apart: DETECTABLE, NOT_DETECTABLE or UNRESOLVED, with the number of prompts that would resolve it.

The unit is the prompt: its signal is the mean distance between the two configs, its noise the mean of their own diagonals.
Logarithms of distances are taken as normal. DETECTABLE: of prompts of the one config, at least 90 % lie beyond a threshold
that at most α of honest prompts exceed; both are tolerance bounds at 95 % confidence (Howe, JASA 64, 1969; here by
simulation). NOT_DETECTABLE is an equivalence test, not a failure to reject: the upper 95 % bound of signal over noise,
paired within prompts, lies below :data:`EQUIVALENT`. Pure NumPy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
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


class PairDecision(msgspec.Struct, frozen=True, kw_only=True):
    """The verdict on a pair over ``prompts`` prompts. ``prompts_needed`` is None when resolved, or never to be.

    ``snr`` is the ratio of geometric means, None for no noise at all.
    """

    verdict: PairVerdict
    prompts: int
    snr: float | None
    prompts_needed: int | None = None


def decide_pair(signal: Sequence[float], noise: Sequence[float], alpha: float = ALPHA) -> PairDecision:
    """``signal`` and ``noise`` of each prompt, (n,) each. Raises :class:`UsageError` unless both hold n ≥ 1 distances.

    Without any noise equality decides: a signal is DETECTABLE, none is not.
    """
    if len(signal) != len(noise) or not signal:
        raise UsageError(f"{len(signal)} signals and {len(noise)} noises", "give one of each for every prompt")
    distances, floors = np.array(signal, np.float64), np.array(noise, np.float64)
    if not (distances > 0).all() or not (floors > 0).all():
        return _by_equality(distances, floors)
    logs, log_floors = np.log(distances), np.log(floors)
    count = len(logs)
    gaps = logs - log_floors
    snr = math.exp(float(gaps.mean()))
    if count == 1:
        return _decide(float(gaps.mean()), None, None, None, count, 1, snr, alpha)
    spreads = [max(float(each.std(ddof=1)), 1e-9) for each in (logs, log_floors, gaps)]
    return _decide(float(gaps.mean()), spreads[0], spreads[1], spreads[2], count, count, snr, alpha)


def decide_aggregate(signal: float, noise: float, prompts: int = 1, alpha: float = ALPHA) -> PairDecision:
    """The same from means over ``prompts`` prompts, for studies that published no more; assumes :data:`SPREAD`."""
    if signal <= 0 or noise <= 0:
        return _by_equality(np.array([signal]), np.array([noise]))
    return _decide(math.log(signal / noise), None, None, None, prompts, prompts, signal / noise, alpha)


def _decide(
    gap: float,
    signal_spread: float | None,
    noise_spread: float | None,
    gap_spread: float | None,
    count: int,
    prompts: int,
    snr: float,
    alpha: float,
) -> PairDecision:
    def verdict(n: int) -> PairVerdict:
        if signal_spread is None or noise_spread is None or gap_spread is None:
            sure = NormalDist().inv_cdf(CONFIDENCE) / math.sqrt(n)
            reach = (_z(1 - alpha) + _z(POWER) + 2 * sure) * SPREAD
            above = sure * SPREAD * math.sqrt(2)
        else:
            reach = tolerance(n, 1 - alpha) * noise_spread + tolerance(n, POWER) * signal_spread
            above = t_quantile(n) * gap_spread / math.sqrt(n)
        if gap > reach:
            return "DETECTABLE"
        return "NOT_DETECTABLE" if gap + above < math.log(EQUIVALENT) else "UNRESOLVED"

    found = verdict(count)
    needed = None
    if found == "UNRESOLVED":
        needed = next((n for n in _TRIED if n > count and verdict(n) != "UNRESOLVED"), None)
    return PairDecision(verdict=found, prompts=prompts, snr=snr, prompts_needed=needed)


def _by_equality(distances: Floats, floors: Floats) -> PairDecision:
    """Where some distance is exactly 0: the lanes of logarithms have nothing to say."""
    if (floors == 0).all():
        verdict: PairVerdict = "DETECTABLE" if (distances > 0).all() else "NOT_DETECTABLE"
        if (distances > 0).any() and not (distances > 0).all():
            verdict = "UNRESOLVED"
        return PairDecision(verdict=verdict, prompts=len(distances), snr=None)
    snr = float(distances.mean() / floors.mean())
    return PairDecision(verdict="UNRESOLVED", prompts=len(distances), snr=snr)


def _z(share: float) -> float:
    return NormalDist().inv_cdf(share)


@cache
def tolerance(count: int, share: float) -> float:
    """k of the one-sided normal tolerance bound: mean + k·s lies above ``share`` of the population, 95 % of the time."""
    normals, chi = _draws(count)
    return float(np.quantile((normals / math.sqrt(count) + _z(share)) / np.sqrt(chi / (count - 1)), CONFIDENCE))


@cache
def t_quantile(count: int) -> float:
    """The 95 % quantile of Student's t with ``count`` - 1 degrees of freedom, simulated."""
    normals, chi = _draws(count)
    return float(np.quantile(normals / np.sqrt(chi / (count - 1)), CONFIDENCE))


def _draws(count: int) -> tuple[Floats, Floats]:
    rng = np.random.default_rng(count)
    return rng.standard_normal(_DRAWS), rng.chisquare(count - 1, _DRAWS)
