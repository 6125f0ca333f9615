"""Calibration: what honest evidence measured, and how unusual a new measurement is beside it.

A profile holds, for a number of positions, the scores of honest prompts: their distance to their own config's
replay, their own noise, and how much nearer their config was than the nearest other one. A p-value is conformal
(Vovk et al., Algorithmic Learning in a Random World): the share of honest prompts, the new one among them, that are
at least as extreme. It holds for evidence that is exchangeable with the honest prompts, and cannot go below
1 / (prompts + 1).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import cache
from importlib import resources

import msgspec

from fpforensics.common.config import ExecutionConfig
from fpforensics.common.errors import EvidenceError
from fpforensics.common.strict import Limits, decode_json

FORMAT = 1
BUILT_IN = "builtin.json"


class Pool(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Scores of ``prompts`` honest prompts of ``positions`` positions, each list ascending.

    A list may hold several windows of one prompt: they count as one prompt together. ``noise`` is about ``noise_prompts`` of
    them, those whose weights are the anchor's. ``margin`` is the natural
    logarithm of (distance to the nearest other member / distance to the own one).
    """

    positions: int
    prompts: int
    noise_prompts: int
    floors: tuple[float, ...]
    noise: tuple[float, ...]
    margin: tuple[float, ...]

    def p_floors(self, value: float) -> float:
        """How unusual so large a distance to the own replay is."""
        return self._p(1 - bisect_left(self.floors, value) / len(self.floors))

    def p_noise(self, value: float) -> float:
        """How unusual so little noise of the evidence itself is."""
        share = bisect_right(self.noise, value) / len(self.noise)
        return (1 + self.noise_prompts * share) / (self.noise_prompts + 1)

    def p_margin(self, value: float) -> float:
        """How unusual so small a margin over the nearest other config is."""
        return self._p(bisect_right(self.margin, value) / len(self.margin))

    def _p(self, share: float) -> float:
        return (1 + self.prompts * share) / (self.prompts + 1)


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A versioned calibration: for which configs and hardware it holds, and its pools, fewest positions first.

    ``prover`` and ``verifier`` name the hardware that was measured; :meth:`covers` does not look at them.
    """

    format: int
    name: str
    created_at: str
    prover: tuple[str, ...]
    verifier: tuple[str, ...]
    dtypes: tuple[str, ...]
    attentions: tuple[str, ...]
    quantizations: tuple[str, ...]
    pools: tuple[Pool, ...]

    def covers(self, config: ExecutionConfig) -> bool:
        """Whether honest evidence of such a config was measured."""
        return (
            config.dtype in self.dtypes
            and config.attention in self.attentions
            and config.quantization in self.quantizations
            and not config.compile
            and config.tensor_parallel == config.expert_parallel == 1
        )

    def pool(self, positions: int) -> Pool | None:
        """The pool with the most positions that are not more than ``positions``: fewer scatter more, so it errs on the
        side of the honest."""
        fitting = [pool for pool in self.pools if pool.positions <= positions]
        return max(fitting, key=lambda pool: pool.positions) if fitting else None


def read_profile(data: bytes, what: str) -> Profile:
    """A profile from JSON. Raises :class:`EvidenceError` for anything else, or another format."""
    profile = decode_json(data, Profile, what, Limits())
    if profile.format != FORMAT:
        raise EvidenceError(f"{what} has format {profile.format}", f"this version reads format {FORMAT}")
    for pool in profile.pools:
        lists: Sequence[tuple[float, ...]] = (pool.floors, pool.noise, pool.margin)
        if (
            pool.positions < 1
            or pool.prompts < 1
            or not all(values and list(values) == sorted(values) for values in lists)
        ):
            raise EvidenceError(
                f"{what}: the pool of {pool.positions} positions is empty or not sorted", "calibrate again"
            )
    return profile


@cache
def built_in_profile() -> Profile:
    """Measured by ``bench/decision.py`` on evidence recorded on an H100 and on a CPU, each replayed on the other."""
    data = resources.files("fpforensics.verifier").joinpath(BUILT_IN).read_bytes()
    return read_profile(data, "the built-in profile")
