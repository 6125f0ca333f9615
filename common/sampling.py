"""How the next token is chosen: pure NumPy, so that any verifier can choose it again from the same
log-probabilities.

Temperature 0 takes the most likely token, the lowest id among equals. Otherwise the Gumbel-max trick: the
noise is a function of (seed, reference id, step) alone, never of what was sampled before.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from fpforensics.common.errors import UsageError
from fpforensics.common.signals import Sampling

MIN_TEMPERATURE = 1e-3
"""What lies between 0 and this is greedy in all but name, and its scores leave the range of numbers."""
_WORD = 2**64
_BLOCK = 4  # words that Philox-4x64 makes of one counter
_MANY = 500  # about as many words in a row cost what one alone costs


def check_sampling(sampling: Sampling) -> None:
    """Raise :class:`UsageError` for values that mean nothing."""
    if sampling.max_new_tokens < 1:
        raise UsageError(f"max_new_tokens={sampling.max_new_tokens}", "ask for at least 1")
    if sampling.temperature != 0.0 and not MIN_TEMPERATURE <= sampling.temperature < float("inf"):
        raise UsageError(f"temperature={sampling.temperature}", f"give 0 (greedy), or at least {MIN_TEMPERATURE}")
    if not 0.0 < sampling.top_p <= 1.0:
        raise UsageError(f"top_p={sampling.top_p}", "give a number above 0 and at most 1")


def choose(logprobs_V: NDArray[np.float32], sampling: Sampling, reference_id: str, step: int) -> int:  # noqa: N803
    """The token id chosen at ``step`` (0 for the first output token) from natural log-probabilities (V,)
    float32.
    """
    if sampling.temperature == 0.0:
        return int(np.argmax(logprobs_V))  # NumPy takes the first, that is the lowest id, among equals
    scores_V = logprobs_V.astype(np.float64) / sampling.temperature  # noqa: N806
    if sampling.top_p < 1.0:
        scores_V = np.where(nucleus(scores_V, sampling.top_p), scores_V, -np.inf)  # noqa: N806
    return int(np.argmax(scores_V + gumbel_noise(sampling.seed, reference_id, step, len(scores_V))))


def nucleus(scores_V: NDArray[np.float64], top_p: float) -> NDArray[np.bool_]:  # noqa: N803
    """The smallest set of most likely tokens whose probability reaches ``top_p``, as a mask (V,); never
    empty.

    ``scores_V`` are unnormalized log-probabilities, after temperature. Among equals the lower id comes first.
    """
    order = np.argsort(-scores_V, kind="stable")
    probabilities = np.exp(scores_V[order] - scores_V[order[0]])
    before = np.cumsum(probabilities) - probabilities
    kept = np.zeros(len(scores_V), dtype=np.bool_)
    kept[order[before < top_p * probabilities.sum()]] = True
    kept[order[0]] = True
    return kept


def gumbel_noise(seed: int, reference_id: str, step: int, size: int) -> NDArray[np.float64]:
    """Standard Gumbel noise (size,): Philox-4x64 keyed by the seed and a hash of the reference id, one
    counter block a step.

    The uniform in (0, 1) is the top 52 bits of each raw word plus one half, so that its logarithm is always
    finite.
    """
    philox = np.random.Philox(key=_key(seed, reference_id), counter=[0, step, 0, 0])
    return _gumbel(np.asarray(philox.random_raw(size), dtype=np.uint64))


def gumbel_noise_of(seed: int, reference_id: str, step: int, ids_K: NDArray[np.integer]) -> NDArray[np.float64]:  # noqa: N803
    """:func:`gumbel_noise` of some token ids (K,) alone, (K,): the cost of a few does not grow with the vocabulary."""
    most = int(ids_K.max()) + 1
    if most < _MANY * len(ids_K):
        return np.take(gumbel_noise(seed, reference_id, step, most), ids_K)
    key = _key(seed, reference_id)
    raw = [
        np.random.Philox(key=key, counter=[int(token) // _BLOCK, step, 0, 0]).random_raw(_BLOCK)[int(token) % _BLOCK]
        for token in ids_K
    ]
    return _gumbel(np.array(raw, dtype=np.uint64))


def _key(seed: int, reference_id: str) -> NDArray[np.uint64]:
    name = int.from_bytes(hashlib.sha256(reference_id.encode()).digest()[:8], "little")
    return np.array([seed % _WORD, name], dtype=np.uint64)


def _gumbel(raw: NDArray[np.uint64]) -> NDArray[np.float64]:
    uniform = ((raw >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    noise: NDArray[np.float64] = -np.log(-np.log(uniform))
    return noise
