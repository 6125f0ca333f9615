"""From honest prompts to the pools that new evidence is held against.

Shared by ``verifier calibrate`` and by ``bench/decision.py``, which made the built-in profile. Shapes: N members of the
lineup, C cells of :data:`fpforensics.verifier.score.EARLY`, P positions of one prompt (prefill first, then decode).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from fpforensics.common.signals import Phase
from fpforensics.verifier.profile import Pool
from fpforensics.verifier.score import Scores, scores_of

WINDOWS = 8
"""Windows of one prompt in a pool, at most."""
POSITIONS = (1, 3, 16, 64, 256, 1024)
"""Numbers of positions that get a pool, as far as the prompts reach."""
Window = tuple[slice, slice]
"""Positions of prefill and of decode, both counted from the prompt's first."""
DIGITS = 4
_LEAST = 1e-12


@dataclass(frozen=True)
class HonestPrompt:
    """One prompt of one honest row: its distances at every position, in the early cells.

    ``own`` names the member that the row is, ``base`` the one in whose noise floors distances are counted (itself, but for
    weights that have no floor of their own), ``rivals`` those that its margin is measured over. ``units`` is NaN for members
    of other weights than the anchor's. Prompts of one ``key`` are one prompt.
    """

    key: str
    own: str
    base: str
    rivals: tuple[str, ...]
    names: tuple[str, ...]
    distances: Any  # (N, C, P), evidence to each member's replay
    units: Any  # (N, C, P), each member's replay to the anchor's
    to_anchor: Any  # (C, P), evidence to the anchor's replay
    decode: int = 0  # how many of the P are decode's

    @property
    def positions(self) -> int:
        """P."""
        return int(self.to_anchor.shape[-1])

    @property
    def whole(self) -> Window:
        """Every position."""
        prefill = self.positions - self.decode
        return slice(0, prefill), slice(prefill, self.positions)

    def scores(self, window: Window) -> Scores:
        """What the decision would see of these positions alone."""
        first, second = window
        distances, units, anchor = (
            each[..., first].sum(-1) + each[..., second].sum(-1)
            for each in (self.distances, self.units, self.to_anchor)
        )
        count = first.stop - first.start + second.stop - second.start
        return scores_of(
            self.names, self.base, count, distances[:, None], units[:, None], anchor[None], references=(self.key,)
        )


def windows(count: int, prefill: int, decode: int = 0, most: int = WINDOWS) -> list[Window]:
    """Up to ``most`` windows of ``count`` positions, spread over a prompt of ``prefill`` and ``decode`` ones.

    Each takes its share from either phase, since they do not scatter alike; shares that are no whole number come out right
    on average.
    """
    length = prefill + decode
    number = min(most, length // count)
    found = []
    for index in range(number):
        of_decode = math.floor(count * decode / length + (index + 0.5) / number)
        of_decode = min(max(of_decode, count - prefill), decode)
        of_prefill = count - of_decode
        first, second = (
            round(float(np.linspace(0, many - taken, number)[index]))
            for many, taken in ((prefill, of_prefill), (decode, of_decode))
        )
        found.append((slice(first, first + of_prefill), slice(prefill + second, prefill + second + of_decode)))
    return found


class HonestScore(NamedTuple):
    """What one window of an honest prompt measures; NaN where there is no such number."""

    floors: float
    noise: float
    margin: float


def window_scores(prompt: HonestPrompt, count: int, most: int = WINDOWS) -> list[HonestScore]:
    """The scores of up to ``most`` windows of ``count`` positions. Without rivals there is no margin."""
    found = []
    for window in windows(count, prompt.positions - prompt.decode, prompt.decode, most):
        scores = prompt.scores(window)
        margin = math.nan
        if prompt.rivals:
            nearest = min(scores.distance[each] for each in prompt.rivals)
            margin = math.log(max(nearest, _LEAST) / max(scores.distance[prompt.own], _LEAST))
        found.append(HonestScore(scores.floors[prompt.own], scores.noise.get(prompt.own, math.nan), margin))
    return found


def make_pool(prompts: Sequence[HonestPrompt], count: int) -> Pool:
    """The pool of ``count`` positions; every prompt holds at least as many."""
    return pool_of(count, ((prompt.key, score) for prompt in prompts for score in window_scores(prompt, count)))


def pool_of(count: int, scores: Iterable[tuple[str, HonestScore]]) -> Pool:
    """The pool of these (prompt, score) pairs: those of one prompt count as one."""
    keyed = list(scores)
    return Pool(
        positions=count,
        prompts=len({key for key, _ in keyed}),
        noise_prompts=len({key for key, score in keyed if not math.isnan(score.noise)}),
        floors=_ascending(score.floors for _, score in keyed),
        noise=_ascending(score.noise for _, score in keyed),
        margin=_ascending(score.margin for _, score in keyed),
    )


def of_phase(prompt: HonestPrompt, phase: Phase) -> HonestPrompt:
    """``prompt`` with the positions of one phase alone."""
    prefill, decode = prompt.whole
    kept = prefill if phase == "prefill" else decode
    return replace(
        prompt,
        distances=prompt.distances[..., kept],
        units=prompt.units[..., kept],
        to_anchor=prompt.to_anchor[..., kept],
        decode=0 if phase == "prefill" else prompt.decode,
    )


def ladder(prompts: Sequence[HonestPrompt]) -> list[int]:
    """Numbers of positions to make pools of: those of :data:`POSITIONS` that every prompt holds, and all that every one does.

    Every pool holds every prompt: one of fewer prompts could reject less, and would be chosen for having more positions.
    """
    most = min(prompt.positions for prompt in prompts)
    return sorted({*(count for count in POSITIONS if count <= most), most})


def _ascending(values: Iterable[float]) -> tuple[float, ...]:
    return tuple(sorted(round(float(value), DIGITS) for value in values if not math.isnan(value)))
