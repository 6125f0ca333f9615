"""From what ``bench/detection.py reduce`` kept to one score for each batch of positions, method by method.

A batch is a run of consecutive positions of one prompt; batches of one prompt do not overlap. A score grows with the suspicion
that the claimed config did not make the evidence. P prompts, B batches each, N members of the lineup.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from peers import MOST_MEAN, MOST_MEDIAN, MOST_MISMATCHES, TOPLOC_BYTES
from roc import Floats

from fpforensics.verifier.lanes import ALPHA, test_member
from fpforensics.verifier.profile import built_in_profile
from fpforensics.verifier.score import EARLY, scores_of

SDPA, EAGER, ANCHOR = "attn=sdpa,dtype=bf16", "attn=eager", "dtype=fp32"
KERNELS = (SDPA, EAGER, "emulate_tp=2", "emulate_tp=4")
WRONG_PROMPT = "wrong-prompt"
POSITIONS = 64
SIZES = (1, 3, 16, 64)
LAYERS = ("1", "2", "4", "12", "last")
MEASURES = ("logprobs", "keys", "last", "projected/2", "projected/8")
FULL, DIMENSIONS = 0, (0, 16, 4, 1)
"""Numbers that each early layer's vector is projected to; 0 is the vector itself."""
_ZERO = -32768
_LEAST = 1e-9


def batches(size: int, positions: int = POSITIONS) -> list[slice]:
    """Batches of ``size`` consecutive positions that do not overlap, up to the last position."""
    return [slice(start, start + size) for start in range(positions % size, positions, size)]


@dataclass(frozen=True)
class Recorded:
    """``detection.npz``: evidence of ``runs`` beside the replays of ``members`` (the anchor last).

    ``pairs`` are (claimed, ran). Shapes: ``measured`` (pairs, measures, P, positions), ``toploc[size]`` (pairs, P, B, chunks, 3),
    ``margins`` (pairs, P, tokens), ``evidence[k]`` (runs, N, P, early cells, positions), ``noise[k]`` the same without runs
    and the anchor: each member's replay beside the anchor's. ``seconds`` says what one prompt costs the verifier, by member and by
    statistic.
    """

    runs: tuple[str, ...]
    members: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    measured: Floats
    toploc: Mapping[int, Floats]
    margins: Floats
    evidence: Mapping[int, Floats]
    noise: Mapping[int, Floats]
    seconds: Mapping[str, float]
    machine: str

    @classmethod
    def load(cls, path: Path) -> Recorded:
        with np.load(path) as data:
            seconds = zip(data["seconds.names"], data["seconds"], strict=True)
            return cls(
                tuple(str(each) for each in data["runs"]),
                tuple(str(each) for each in data["members"]),
                tuple((str(claimed), str(ran)) for claimed, ran in data["pairs"]),
                expand(data["measured"]),
                {size: data[f"toploc.{size}"].astype(np.float64) for size in SIZES},
                data["margins"].astype(np.float64),
                {k: expand(data[f"evidence.{k}"], k) for k in DIMENSIONS},
                {k: expand(data[f"noise.{k}"], k) for k in DIMENSIONS},
                {str(name): float(value) for name, value in seconds},
                str(data["machine"]),
            )

    def sums(self, claimed: str, ran: str, size: int, k: int) -> tuple[Any, Any, Any]:
        """What :func:`scores_of` takes, each batch as a reference: (N, PB, cells), (N, PB, cells), (PB, cells)."""
        windows = batches(size)

        def summed(table: Floats) -> Floats:  # (..., P, cells, positions) -> (..., PB, cells)
            parts = np.stack([table[..., window].sum(-1) for window in windows], axis=-2)  # (..., P, B, cells)
            return parts.reshape(*parts.shape[:-3], -1, len(EARLY))

        distances = summed(self.evidence[k][self.runs.index(ran)])
        units = np.maximum(summed(self.noise[k]), _LEAST)
        return distances[:-1], units, distances[-1]


def shrink(values: Any, k: int = FULL) -> Any:
    """log2 in steps of 1/32 (1.1 % at most), of projections 1/16; 0 as the lowest code. High bytes first, so that it compresses."""
    with np.errstate(divide="ignore"):
        codes = np.where(values == 0, _ZERO, np.rint(np.log2(values) * _steps(k))).astype(np.int16)
    return np.stack([codes >> 8, codes & 255]).astype(np.uint8)


def expand(planes: Any, k: int = FULL) -> Floats:
    codes = planes[0].astype(np.int8).astype(np.int16) * 256 + planes[1]
    return np.where(codes == _ZERO, 0.0, np.exp2(codes / _steps(k)))


def _steps(k: int) -> float:
    return 32.0 if k == FULL else 16.0


@dataclass(frozen=True)
class Lanes:
    """The product's lanes for each batch, (P, B): distance in noise floors, margin over the nearest rival, own noise."""

    floors: Floats
    margin: Floats
    noise: Floats


def lanes(recorded: Recorded, claimed: str, ran: str, size: int, k: int) -> Lanes:
    distances, units, to_anchor = recorded.sums(claimed, ran, size, k)
    names, prompts = recorded.members[:-1], len(recorded.noise[k][0])
    references = tuple(str(index) for index in range(len(to_anchor)))
    found = scores_of(names, claimed, size, distances, units, to_anchor, references)
    own = np.maximum(found.by_prompt[claimed], _LEAST)
    nearest = np.maximum(np.min([found.by_prompt[name] for name in names if name != claimed], axis=0), _LEAST)
    noise = (to_anchor / units[names.index(claimed)]).mean(axis=1)
    shape = (prompts, -1)
    return Lanes(own.reshape(shape), np.log(nearest / own).reshape(shape), noise.reshape(shape))


def ours(recorded: Recorded, claimed: str, ran: str, size: int, k: int, lineup: bool) -> Floats:
    """(P, B): the most unusual lane, in units of how honest evidence scatters there.

    Median and scatter (to the 84th percentile) are those of the honest batches of all *other* prompts.
    """
    scores: Any = -np.inf
    honest, found = lanes(recorded, claimed, claimed, size, k), lanes(recorded, claimed, ran, size, k)
    used: list[Callable[[Lanes], Floats]] = [lambda lane: np.log(lane.floors), lambda lane: -np.log(lane.noise)]
    for suspicion in [*used, *([lambda lane: -lane.margin] if lineup else [])]:
        usual, seen = suspicion(honest), suspicion(found)
        without = [np.delete(usual, prompt, axis=0) for prompt in range(len(usual))]
        middle, high = np.array([np.quantile(others, [0.5, 0.84]) for others in without]).T
        scores = np.maximum(scores, (seen - middle[:, None]) / (high - middle)[:, None])
    return scores  # type: ignore[no-any-return]


def mean_of(measure: str) -> Callable[[Recorded, str, str, int], Floats | None]:
    def score(recorded: Recorded, claimed: str, ran: str, size: int) -> Floats | None:
        rows = recorded.measured[recorded.pairs.index((claimed, ran)), MEASURES.index(measure)]
        return np.stack([rows[:, window].mean(axis=1) for window in batches(size)], axis=1)

    return score


def block_one(recorded: Recorded, claimed: str, ran: str, size: int) -> Floats | None:
    """The SNR rule's distance where rounding noise has not yet grown: the first block's hidden state."""
    distances, _, _ = recorded.sums(claimed, ran, size, FULL)
    rows: Floats = distances[recorded.members.index(claimed), :, 0]
    return rows.reshape(-1, len(batches(size)))


def toploc_mean(recorded: Recorded, claimed: str, ran: str, size: int) -> Floats | None:
    """The mean mantissa error over a batch's chunks: of TOPLOC's three numbers the one that separates best here."""
    numbers = recorded.toploc[size][recorded.pairs.index((claimed, ran))]
    means: Floats = numbers[..., 1].mean(axis=-1)
    return means


def token_margin(recorded: Recorded, claimed: str, ran: str, size: int) -> Floats | None:
    """Generated tokens only, of which there are few: where ``size`` is more than there are, all of them; none at 64."""
    rows = recorded.margins[recorded.pairs.index((claimed, ran))]
    if size > 2 * rows.shape[1]:
        return None
    size = min(size, rows.shape[1])
    return np.stack([rows[:, window].mean(axis=1) for window in batches(size, rows.shape[1])], axis=1)


@dataclass(frozen=True)
class Method:
    """One row of the table. ``replays`` are the forwards that the verifier needs, by member; ``statistic`` is its own work."""

    name: str
    bytes_per_token: float
    statistic: str
    score: Callable[[Recorded, str, str, int], Floats | None]
    replays: Callable[[str], tuple[str, ...]] = lambda claimed: (claimed,)

    def seconds(self, recorded: Recorded, claimed: str) -> float:
        """What the verifier spends on one prompt, loading the model aside."""
        replays = self.replays(claimed)
        compared = 2 * len(replays) - 1  # the evidence with each replay, and each other replay with the last
        return sum(recorded.seconds[each] for each in replays) + compared * recorded.seconds[self.statistic]


def _ours(name: str, k: int, lineup: bool) -> Method:
    def score(recorded: Recorded, claimed: str, ran: str, size: int) -> Floats | None:
        return ours(recorded, claimed, ran, size, k, lineup)

    def replays(claimed: str) -> tuple[str, ...]:
        return (*KERNELS, ANCHOR) if lineup else (claimed, ANCHOR)

    # Two bytes a number: two blocks' hidden states and two blocks' keys of SmolLM2-135M, or their projections.
    size = 2.0 * (2 * 576 + 2 * 192) if k == FULL else 2.0 * k * len(EARLY)
    return Method(name, size, f"early/{k}", score, replays)


METHODS = (
    Method("SNR rule: logprobs (top 20)", 20 * 8.0, "logprobs", mean_of("logprobs")),
    Method("SNR rule: keys, five layers", 5 * 192 * 2.0, "keys", mean_of("keys")),
    Method("SNR rule: last hidden state", 576 * 2.0, "last", mean_of("last")),
    Method("TOPLOC, 32 tokens a proof", TOPLOC_BYTES / 32, "toploc", toploc_mean),
    Method("Activation-DiFR, 2 numbers", 4.0, "projected/2", mean_of("projected/2")),
    Method("Activation-DiFR, 8 numbers", 16.0, "projected/8", mean_of("projected/8")),
    Method("Token-DiFR", 0.0, "margins", token_margin),
    Method("SNR rule moved to block 1", 576 * 2.0, "last", block_one),
    _ours("ours, no lineup", FULL, False),
    _ours("ours", FULL, True),
    _ours("ours, 16 numbers a layer", 16, True),
    _ours("ours, 4 numbers a layer", 4, True),
    _ours("ours, 1 number a layer", 1, True),
)


def rejected_by_snr(recorded: Recorded, claimed: str, ran: str, size: int, measure: str, cutoff: float = 3.0) -> Floats:
    """(P, B): whether the distance is more than ``cutoff`` times the honest one of the other prompts (published: 3)."""
    score = mean_of(measure)
    honest, found = score(recorded, claimed, claimed, size), score(recorded, claimed, ran, size)
    assert honest is not None and found is not None
    noise = (honest.mean(axis=1).sum() - honest.mean(axis=1)) / (len(honest) - 1)
    return found > cutoff * noise[:, None]


def rejected_by_toploc(recorded: Recorded, claimed: str, ran: str, size: int) -> Floats:
    """(P, B): whether one of a batch's chunks breaks one of the published thresholds."""
    numbers = recorded.toploc[size][recorded.pairs.index((claimed, ran))]
    rejected: Floats = (numbers > np.array([MOST_MISMATCHES, MOST_MEAN, MOST_MEDIAN])).any(axis=(-1, -2))
    return rejected


def rejected_by_us(recorded: Recorded, claimed: str, ran: str, size: int) -> Floats:
    """(P, B): whether the product's lanes reject the claim at α with the built-in profile."""
    distances, units, to_anchor = recorded.sums(claimed, ran, size, FULL)
    names, pool = recorded.members[:-1], built_in_profile().pool(size)
    assert pool is not None
    rejected = []
    for batch in range(len(to_anchor)):
        one = slice(batch, batch + 1)
        scores = scores_of(names, claimed, size, distances[:, one], units[:, one], to_anchor[one], ("prompt",))
        rejected.append(test_member(claimed, scores, pool, [name for name in names if name != claimed]).rejected(ALPHA))
    return np.array(rejected).reshape(-1, len(batches(size)))
