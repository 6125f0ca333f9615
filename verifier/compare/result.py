"""What a comparison of two runs' full logits finds: values, ready for JSON. :mod:`fpforensics.verifier.compare` has the
formulas. A is the baseline; None stands where a figure has no value. No NaN, no infinity.
"""

from __future__ import annotations

import msgspec

from fpforensics.common.config import ExecutionConfig
from fpforensics.common.engines.base import EngineFacts
from fpforensics.common.environment import Environment
from fpforensics.common.signals import Phase


class PositionComparison(msgspec.Struct, frozen=True, kw_only=True):
    """One position. ``position`` is absolute; ``token`` is A's argmax, the lowest id of equals.

    ``delta`` is logp_a - logp_b at ``token``, ``ratio`` is exp|delta| (None beyond float64). ``cosine`` is None where
    the logits of one side are all 0. ``kl_ab`` is KL(A || B) in nats. ``top5_shared`` counts the ids in both top fives.
    """

    position: int
    max_abs: float
    mean_abs: float
    cosine: float | None
    top1_match: bool
    top5_shared: int
    token: int
    logp_a: float
    logp_b: float
    delta: float
    ratio: float | None
    kl_ab: float
    kl_ba: float
    total_variation: float


class ShareAbove(msgspec.Struct, frozen=True, kw_only=True):
    """The share of logit elements whose absolute difference is above ``threshold``."""

    threshold: float
    share: float


class LogitDifference(msgspec.Struct, frozen=True, kw_only=True):
    """Absolute differences over all M * V elements, and cosine similarity over positions (None: nowhere defined).

    ``median_abs`` is the exact median of the differences as float32.
    """

    elements: int
    max_abs: float
    mean_abs: float
    median_abs: float
    shares_above: tuple[ShareAbove, ...]
    cosine_min: float | None
    cosine_mean: float | None


class ChosenTokenError(msgspec.Struct, frozen=True, kw_only=True):
    """delta = logp_a - logp_b of the chosen token, over positions. ``std`` divides by n - 1: None for one position.

    ``token_mult_prob_error`` is the mean of exp|delta|; None beyond float64.
    """

    mean_abs: float
    max_abs: float
    signed_mean: float
    std: float | None
    token_mult_prob_error: float | None


class DistributionDivergence(msgspec.Struct, frozen=True, kw_only=True):
    """Over positions: KL divergence in nats, both ways, and total variation distance, ½ Σ|p - q|."""

    kl_ab_mean: float
    kl_ab_max: float
    kl_ba_mean: float
    kl_ba_max: float
    total_variation_mean: float
    total_variation_max: float


class TokenAgreement(msgspec.Struct, frozen=True, kw_only=True):
    """Positions whose argmax is equal, and how many of the slots of A's top five hold a token of B's top five."""

    top1_matches: int
    top1_share: float
    top5_shared: int
    top5_slots: int
    top5_share: float


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """All figures over some positions; no NaN, no infinity."""

    positions: int
    logits: LogitDifference
    chosen: ChosenTokenError
    divergence: DistributionDivergence
    agreement: TokenAgreement


class ComparedSide(msgspec.Struct, frozen=True, kw_only=True):
    """Where one side's logits come from: what its bundle states. ``logits_dtype`` is our name for their dtype."""

    file: str
    bundle_digest: str
    signer: str
    evidence_created_at: str
    config_id: str
    config: ExecutionConfig
    logits_dtype: str
    facts: EngineFacts
    environment: Environment


class PhaseComparison(msgspec.Struct, frozen=True, kw_only=True):
    """One reference in one phase."""

    phase: Phase
    summary: Summary
    positions: tuple[PositionComparison, ...]


class DecodeSkipped(msgspec.Struct, frozen=True, kw_only=True):
    """Decode positions that are not compared, because the two sides were not fed the same tokens up to there.

    They begin at absolute position ``first``; ``positions_a`` and ``positions_b`` count those captured on each side.
    """

    first: int
    positions_a: int
    positions_b: int
    reason: str


class ReferenceComparison(msgspec.Struct, frozen=True, kw_only=True):
    """One reference; a phase without common positions is left out."""

    reference_id: str
    source: str
    prompt_tokens: int
    phases: tuple[PhaseComparison, ...]
    decode_skipped: DecodeSkipped | None


class PooledPhase(msgspec.Struct, frozen=True, kw_only=True):
    """One phase over the positions of all references."""

    phase: Phase
    summary: Summary


class CompareResult(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a report holds; no NaN, no infinity. ``pooled`` is over all positions, whatever reference and phase."""

    tool_version: str
    a: ComparedSide
    b: ComparedSide
    vocab_size: int
    pooled: Summary
    pooled_phases: tuple[PooledPhase, ...]
    references: tuple[ReferenceComparison, ...]
