"""The statistics of other detectors, written from their papers: what each would say of the same evidence.

- TOPLOC (arXiv 2501.16007): the 128 largest values by magnitude of 32 tokens' last hidden states. A proof is the
  polynomial through them, 258 bytes; the verifier evaluates it at *its own* 128 largest. Three numbers: exponents that
  differ, and the mean and median difference of the mantissas where exponents agree. Its thresholds for bf16: at most 38
  differing exponents, mean at most 10, median at most 8.
- Activation-DiFR (arXiv 2511.20621): L2 between seeded random projections of the last hidden state, in bf16.
- Token-DiFR (same paper): the best Gumbel-perturbed logit minus the claimed token's. At temperature 0 there is no noise.

All three take the last hidden state *after* the final norm, as the language model head does. M positions, D the width,
k projected dimensions, V the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Floats = NDArray[np.float64]
BF16 = np.dtype(ml_dtypes.bfloat16)

TOP, CHUNK = 128, 32
MOST_MISMATCHES, MOST_MEAN, MOST_MEDIAN = 38.0, 10.0, 8.0
TOPLOC_BYTES = 2 + 2 * TOP
MOST_MARGIN = 0.5
"""Token-DiFR's published code counts a larger margin as this, so that one token cannot decide for all."""


@dataclass(frozen=True)
class Toploc:
    """What TOPLOC measures of one chunk of tokens; every number grows with the difference."""

    mismatches: float
    mean: float
    median: float

    @property
    def passes(self) -> bool:
        """Whether it is within all three published thresholds."""
        return self.mismatches <= MOST_MISMATCHES and self.mean <= MOST_MEAN and self.median <= MOST_MEDIAN


def toploc(claimed_MD: Array, replay_MD: Array, top: int = TOP) -> Toploc:  # noqa: N803
    """Compare one chunk's last hidden states, (M, D) bf16 each.

    An index that the claimed side does not list counts as a differing exponent: the polynomial is noise there, and noise
    agrees in an exponent one time in 256. Where no exponent agrees, mean and median are 128, the largest there is.
    """
    claimed, replay = as_bf16(claimed_MD).reshape(-1), as_bf16(replay_MD).reshape(-1)
    own = _largest(replay, top)
    listed = np.isin(own, _largest(claimed, top))
    one, other = claimed[own].view(np.uint16), replay[own].view(np.uint16)
    agree = listed & ((one >> 7) & 0xFF == (other >> 7) & 0xFF)
    errors = np.abs((one & 0x7F).astype(np.int32) - (other & 0x7F).astype(np.int32))[agree]
    if not errors.size:
        return Toploc(float(top), 128.0, 128.0)
    return Toploc(float(top - errors.size), float(errors.mean()), float(np.median(errors)))


def _largest(values: Array, top: int) -> Array:
    return np.argsort(-np.abs(values.astype(np.float32)), kind="stable")[:top]


def chunks(positions: int) -> list[slice]:
    """TOPLOC's chunks of a run of ``positions``: 32 each, the last one shorter."""
    return [slice(start, min(start + CHUNK, positions)) for start in range(0, positions, CHUNK)]


def toploc_numbers(claimed_MD: Array, replay_MD: Array) -> Floats:  # noqa: N803
    """(chunks, 3): mismatches, mean and median of every chunk of a run of positions."""
    parts = [toploc(claimed_MD[part], replay_MD[part]) for part in chunks(len(claimed_MD))]
    return np.array([(part.mismatches, part.mean, part.median) for part in parts])


def projection(width: int, dimensions: int, seed: int = 0) -> Floats:
    """(D, k): k orthonormal columns, from a seed that both sides know (QR of a Gaussian matrix)."""
    gaussian = np.random.default_rng(seed).standard_normal((width, dimensions))
    columns, triangle = np.linalg.qr(gaussian)
    orthonormal: Floats = columns * np.sign(np.diag(triangle))
    return orthonormal


def fingerprint(rows_MD: Array, columns_Dk: Floats, dtype: Any = BF16) -> Floats:  # noqa: N803
    """(M, k): the projected rows as they travel, in ``dtype`` (two bytes a number), as float64."""
    projected: Floats = (rows_MD.astype(np.float64) @ columns_Dk).astype(dtype).astype(np.float64)
    return projected


def projected_distance(claimed_MD: Array, replay_MD: Array, columns_Dk: Floats, dtype: Any = BF16) -> Floats:  # noqa: N803
    """(M,): L2 between the fingerprints of two (M, D), scaled so that it estimates the L2 between the rows themselves."""
    width, dimensions = columns_Dk.shape
    difference = fingerprint(claimed_MD, columns_Dk, dtype) - fingerprint(replay_MD, columns_Dk, dtype)
    distances: Floats = np.linalg.norm(difference, axis=1) * np.sqrt(width / dimensions)
    return distances


def token_margins(logits_MV: Array, chosen_M: Array) -> Floats:  # noqa: N803
    """(M,): the verifier's largest logit minus the claimed token's; 0 where it would have chosen the same (greedy)."""
    wide = logits_MV.astype(np.float64)
    margins: Floats = wide.max(axis=1) - np.take_along_axis(wide, chosen_M[:, None].astype(np.int64), axis=1)[:, 0]
    capped: Floats = np.minimum(margins, MOST_MARGIN)
    return capped


def final_norm(rows_MD: Array, weight_D: Array, epsilon: float) -> Array:  # noqa: N803
    """RMSNorm of the last block's output, (M, D) bf16 -> bf16, rounded where Llama's own rounds it (arXiv 1910.07467)."""
    wide = as_bf16(rows_MD).astype(np.float32)
    scaled = wide / np.sqrt(np.square(wide).mean(axis=1, keepdims=True) + np.float32(epsilon))
    normed: Array = (scaled.astype(BF16) * as_bf16(weight_D)).astype(BF16)
    return normed


def as_bf16(rows: Array) -> Array:
    """The same values in bf16: what a prover that claims bf16 must send, whatever it computed."""
    return rows if rows.dtype == BF16 else rows.astype(BF16)
