"""Calibration: what honest evidence measured, and how unusual a new measurement is beside it.

A profile holds, for a number of positions, the scores of honest prompts: their distance to their own config's
replay, their own noise, and how much nearer their config was than the nearest other one. A p-value is conformal
(Vovk et al., Algorithmic Learning in a Random World): the share of honest prompts, the new one among them, that are
at least as extreme. It holds for evidence that is exchangeable with the honest prompts, and cannot go below
1 / (prompts + 1).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import resources

import msgspec

from fpforensics.common.bundle import payload_digest
from fpforensics.common.config import ExecutionConfig
from fpforensics.common.errors import EvidenceError
from fpforensics.common.strict import Limits, decode_json
from fpforensics.verifier.exact import gpu_family
from fpforensics.verifier.scope import Scope

FORMAT = 1
BUILT_IN = "builtin.json"


class Pool(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Scores of ``prompts`` honest prompts of ``positions`` positions, each list ascending.

    A list may hold several windows of one prompt: they count as one prompt together. ``noise`` is about ``noise_prompts`` of
    them, those whose weights are the anchor's. ``margin`` is the natural
    logarithm of (distance to the nearest other member / distance to the own one), empty where there was no other.
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

    def p_near(self, value: float) -> float:
        """How unusual so small a distance to the own replay is."""
        return self._p(bisect_right(self.floors, value) / len(self.floors))

    def p_noise(self, value: float) -> float:
        """How unusual so little noise of the evidence itself is."""
        share = bisect_right(self.noise, value) / len(self.noise)
        return (1 + self.noise_prompts * share) / (self.noise_prompts + 1)

    def p_margin(self, value: float) -> float:
        """How unusual so small a margin over the nearest other config is; 1 where none was measured."""
        if not self.margin:
            return 1.0
        return self._p(bisect_right(self.margin, value) / len(self.margin))

    @property
    def far(self) -> float:
        """The distance that one prompt in as many as the pool holds exceeds."""
        return self.floors[-1 - (len(self.floors) - 1) // self.prompts]

    @property
    def least_margin(self) -> float:
        """The margin that one prompt in as many as the pool holds falls below."""
        return self.margin[(len(self.margin) - 1) // self.prompts]

    def _p(self, share: float) -> float:
        return (1 + self.prompts * share) / (self.prompts + 1)


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The calibration that ships with the package: pools over many configs together, fewest positions first.

    It speaks for every model and all hardware, since nothing better is at hand; :meth:`strays` says where that leaves what was
    measured. ``prover`` and ``verifier`` name the hardware, one direction after the other; ``weights`` are the digests of the
    one model's tensors, the other lists the values of a config's fields.
    """

    format: int
    name: str
    created_at: str
    model: str
    weights: str
    prover: tuple[str, ...]
    verifier: tuple[str, ...]
    dtypes: tuple[str, ...]
    attentions: tuple[str, ...]
    quantizations: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    emulated_tensor_parallel: tuple[int, ...]
    matmuls: tuple[str, ...]
    pools: tuple[Pool, ...]

    def covers(self, config: ExecutionConfig) -> bool:
        """Whether its pools are used for such a config."""
        return (
            config.dtype in self.dtypes
            and config.attention in self.attentions
            and config.quantization in self.quantizations
            and not config.compile
            and config.tensor_parallel == config.expert_parallel == 1
        )

    def strays(self, scope: Scope) -> Iterator[str]:
        """What of ``scope`` was not measured, each in words; the rate that these pools give is an extrapolation to it."""
        config, prover, verifier = scope.config, scope.prover.family, scope.verifier.family
        if config.weights_digest != self.weights:
            yield f"model {config.model}" if config.model != self.model else f"these weights of {config.model}"
        if (prover, verifier) not in zip(map(gpu_family, self.prover), map(gpu_family, self.verifier), strict=True):
            yield f"evidence of {prover} replayed on {verifier}"
        for name, value, measured in (
            ("batch", config.batch_size, self.batch_sizes),
            ("emulate_tp", config.emulate_tensor_parallel, self.emulated_tensor_parallel),
            ("matmul", config.matmul, self.matmuls),
        ):
            if value not in measured:
                yield f"{name}={value}"
        if config.concurrent_work:
            yield "concurrent=true"
        if scope.matmul not in self.matmuls and scope.matmul != config.matmul:
            yield f"replays by matmul={scope.matmul}"

    def pool(self, positions: int) -> Pool | None:
        """The pool of :func:`pool_for`."""
        return pool_for(self.pools, positions)


def pool_for(pools: Sequence[Pool], positions: int) -> Pool | None:
    """The pool with the most positions that are not more than ``positions``: fewer scatter more, so it errs on the
    side of the honest."""
    fitting = [pool for pool in pools if pool.positions <= positions]
    return max(fitting, key=lambda pool: pool.positions) if fitting else None


def read_profile(data: bytes, what: str) -> Profile:
    """The built-in profile from JSON. Raises :class:`EvidenceError` for anything else, or another format."""
    profile = decode_json(data, Profile, what, Limits())
    require_format(profile.format, what)
    require_pools(profile.pools, what)
    return profile


def require_format(found: int, what: str) -> None:
    """Raise :class:`EvidenceError` for a format of another version."""
    if found != FORMAT:
        raise EvidenceError(
            f"{what} has format {found}, this version reads format {FORMAT}", "calibrate again with this version"
        )


def require_pools(pools: Sequence[Pool], what: str, *, margins: bool = True) -> None:
    """Raise :class:`EvidenceError` for pools that no p-value could come from. ``margins``: there were rivals."""
    if not pools:
        raise EvidenceError(f"{what} holds no pools", "calibrate again")
    for pool in pools:
        lists: Sequence[tuple[float, ...]] = (pool.floors, pool.noise, *([pool.margin] if margins else []))
        if (
            pool.positions < 1
            or not 1 <= pool.prompts <= len(pool.floors)
            or not 1 <= pool.noise_prompts <= pool.prompts
            or not all(values and list(values) == sorted(values) for values in lists)
        ):
            raise EvidenceError(
                f"{what}: the pool of {pool.positions} positions is empty or not sorted", "calibrate again"
            )


@cache
def built_in_profile() -> Profile:
    """Measured by ``bench/decision.py`` on evidence recorded on an H100 and on a CPU, each replayed on the other."""
    return read_profile(_built_in(), "the built-in profile")


@cache
def built_in_digest() -> str:
    """``sha256:<hex>`` of the built-in profile's file."""
    return payload_digest(_built_in())


def _built_in() -> bytes:
    return resources.files("fpforensics.verifier").joinpath(BUILT_IN).read_bytes()
