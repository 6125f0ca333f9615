"""Whether sampled tokens are those that the stated seed draws, by the evidence's own log-probabilities.

At a temperature a token is the one whose log-probability, over the temperature, plus Gumbel noise is highest, and the noise is a function of seed,
reference and step alone (:mod:`fpforensics.common.sampling`). So a bundle that lists the highest log-probabilities says itself which
tokens cannot have been chosen, with no tolerance for rounding: these are the numbers that the prover drew from. (Token-DiFR, arXiv:2511.20621, asks
the same of a verifier's log-probabilities, which differ by noise.) What is not listed may have been drawn in a listed token's stead: an
honest token is never refused, and a foreign one only where a listed token beats it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fpforensics.common.sampling import gumbel_noise_of
from fpforensics.common.signals import Array, Sampling

_SAME = 1e-5  # nats
_MASS = 1e-4  # how far probabilities may be from adding up to 1


@dataclass(frozen=True)
class Position:
    """What is listed at one position, natural log-probabilities; ``token`` is said to have been chosen at ``step``."""

    ids_K: Array  # noqa: N815
    logprobs_K: Array  # noqa: N815
    token: int
    chosen: float
    step: int


def contradiction(at: Position, sampling: Sampling, reference_id: str, vocab_size: int) -> str:
    """Why ``at.token`` cannot have been drawn, empty if it can. ``sampling`` is not greedy."""
    temperature = sampling.temperature
    listed, own = at.logprobs_K.astype(np.float64), float(at.chosen)
    weights = np.exp((listed - listed.max()) / temperature)
    least, most = (float(weights.sum()) + rest for rest in _unlisted(listed, temperature, vocab_size))
    if weights[listed > own + _SAME].sum() > sampling.top_p * most * (1 + _SAME):
        return f"it lies outside the nucleus of {sampling.top_p:g}"
    # In the nucleus whatever the unlisted tokens weigh; of equals there the lower id comes first, and may be unlisted.
    whole = vocab_size <= len(listed)
    certain = (_likelier(listed, weights) < sampling.top_p * least * (1 - _SAME)) & (whole | (listed > listed.min()))
    kept = (sampling.top_p == 1) | certain
    rivals = kept & (at.ids_K != at.token)
    ids = np.append(at.ids_K[rivals], at.token)
    scores = np.append(listed[rivals], own) / temperature + gumbel_noise_of(sampling.seed, reference_id, at.step, ids)
    best = int(scores.argmax())
    if scores[best] <= scores[-1] + _SAME / temperature:
        return ""
    return f"seed {sampling.seed} draws token {ids[best]} before it at temperature {temperature:g}"


def _unlisted(listed: NDArray[np.float64], temperature: float, vocab_size: int) -> tuple[float, float]:
    """The least and the most that all unlisted tokens weigh together, in units of the likeliest one's weight.

    Their probabilities add up to what the listed ones leave of 1, and none is above the least listed: the sum of x ** (1 / temperature) lies between
    that of equal ones and that of as few as possible.
    """
    count = vocab_size - len(listed)
    if count <= 0:
        return 0.0, 0.0
    left = 1.0 - float(np.exp(listed).sum())
    low, high, slope = float(listed.min()), float(listed.max()), 1.0 / temperature
    found = []
    for rest in (left - _MASS, max(left, 0.0) + _MASS):
        log_rest = min(math.log(rest), math.log(count) + low) if rest > 0 else -math.inf
        few = math.exp(log_rest - low + (low - high) * slope)
        equal = math.exp(math.log(count) + (log_rest - math.log(count) - high) * slope)
        found.append((few, equal))
    return min(found[0]), max(found[1])


def _likelier(listed: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """What all that are listed as likely or likelier weigh together, without the token itself, (K,)."""
    order = np.argsort(listed)
    above = np.append(np.cumsum(weights[order][::-1])[::-1], 0.0)
    found: NDArray[np.float64] = above[np.searchsorted(listed[order], listed, side="left")] - weights
    return found
