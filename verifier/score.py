"""What the early layers say about one row of evidence, prompt by prompt.

Rounding noise grows from block to block until, at the logits, every kernel looks alike: what tells configs apart is
in the first blocks. The score of a config is the mean over the cells of :data:`EARLY` of its distance, each in units of
that cell's noise floor: the distance, on the same prompts and positions, between this verifier's own replay of the config
and the anchor, the same weights in a wider dtype. Positions of prefill and decode count alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from fpforensics.common.signals import PHASES, Phase
from fpforensics.verifier.distance import Cell, Floats, SignalKey

EARLY = (
    SignalKey("hidden_states", "1"),
    SignalKey("hidden_states", "2"),
    SignalKey("key_vectors", "2"),
    SignalKey("key_vectors", "4"),
)
"""Chosen on recorded evidence (``bench/decision.py``). The first block's keys hardly differ between kernels: nothing has
accumulated yet."""

MOST_SUMMED = 16
"""Up to so many positions, those of several prompts count like half as many of one."""
Distances = Mapping[Cell, float]
"""Mean over positions, by cell."""
PerReference = Mapping[str, Distances]
Counts = Mapping[str, Mapping[Phase, int]]
"""How many positions each reference holds in each phase."""


class Scores(msgspec.Struct, frozen=True, kw_only=True):
    """One row's evidence beside every member. ``positions`` is how many positions of one prompt it is worth.

    ``distance`` is the distance to each member in the claimed config's floors, ``floors`` the same in the member's own,
    ``noise`` the distance from the evidence to the anchor in the member's own floors: how noisy the evidence itself is,
    about 1 for the config that made it (members with other weights than the anchor have none). All three are over the
    sums of all references. ``by_prompt`` is ``distance`` of each reference alone,
    ``per_prompt`` how many positions a prompt has on average.
    """

    references: tuple[str, ...]
    positions: int
    distance: dict[str, float]
    floors: dict[str, float]
    noise: dict[str, float]
    by_prompt: dict[str, tuple[float, ...]]
    per_prompt: int = 0


def score(
    *,
    claimed: str,
    distances: Mapping[str, PerReference],
    own_noise: Mapping[str, PerReference],
    to_anchor: PerReference,
    counts: Counts,
) -> Scores | None:
    """The scores of every member of ``distances``; None where an early cell is missing or has no noise floor.

    ``own_noise`` holds, for the claimed config and for members of the same weights, the distance between the verifier's
    replay and the anchor's; ``to_anchor`` the distance from the evidence to the anchor.
    """
    references, names = tuple(distances[claimed]), tuple(distances)
    measured = [_sums(each, references, counts) for each in distances.values()]
    units = [_sums(own_noise[name], references, counts) if name in own_noise else None for name in names]
    evidence_noise = _sums(to_anchor, references, counts)
    found = [each for each in measured if each is not None]
    if evidence_noise is None or len(found) < len(measured):
        return None
    without = np.full_like(evidence_noise, np.nan)
    floors = np.array([without if each is None or (each <= 0).any() else each for each in units])
    if np.isnan(floors[names.index(claimed)]).any():
        return None
    worth = worth_in_positions([sum(counts[each].values()) for each in references])
    scores = scores_of(names, claimed, worth, np.array(found), floors, evidence_noise, references)
    average = sum(sum(counts[each].values()) for each in references) // len(references)
    return msgspec.structs.replace(scores, per_prompt=average)


def worth_in_positions(counts: Sequence[int]) -> int:
    """Positions of one prompt that scatter no less than these (one count per prompt) together.

    The same few positions of many prompts are not worth their sum: where the chat template ends they are much alike.
    Measured: 24 prompts of 3 positions, taken for 64, made 2.8 % of honest claims INCONSISTENT, and 8 prompts, taken for 16, 1.8 % of
    those of one config.
    """
    return max(min(counts), min(sum(counts) // 2, MOST_SUMMED))


def prompts_worth(positions: int, per_prompt: int) -> int | None:
    """How many prompts of ``per_prompt`` positions are worth ``positions`` of one; None if no number is."""
    if positions > MOST_SUMMED or per_prompt < 1:
        return None
    return math.ceil(2 * positions / per_prompt)


def scores_of(
    names: Sequence[str],
    claimed: str,
    positions: int,
    distances_NRC: Floats,  # noqa: N803
    units_NRC: Floats,  # noqa: N803
    to_anchor_RC: Floats,  # noqa: N803
    references: tuple[str, ...],
) -> Scores:
    """From sums over positions: N members, R references, the C cells of :data:`EARLY`.

    ``units_NRC`` are the members' noise floors, NaN for members of other weights: they are measured in the claimed one's.
    """
    base_RC = units_NRC[list(names).index(claimed)]  # noqa: N806
    base, to_anchor = base_RC.sum(axis=0), to_anchor_RC.sum(axis=0)
    sums_NC, units_NC = distances_NRC.sum(axis=1), units_NRC.sum(axis=1)  # noqa: N806
    distance = (sums_NC / base).mean(axis=1)
    floors = (sums_NC / np.where(np.isnan(units_NC), base, units_NC)).mean(axis=1)
    noise = (to_anchor / units_NC).mean(axis=1)
    by_prompt = (distances_NRC / base_RC).mean(axis=2)
    return Scores(
        references=references,
        positions=positions,
        distance=dict(zip(names, distance.tolist(), strict=True)),
        floors=dict(zip(names, floors.tolist(), strict=True)),
        noise={name: value for name, value in zip(names, noise.tolist(), strict=True) if value == value},
        by_prompt={name: tuple(values) for name, values in zip(names, by_prompt.tolist(), strict=True)},
    )


def _sums(found: PerReference, references: tuple[str, ...], counts: Counts) -> Floats | None:
    """The early cells' sums over all positions, (R, C); None if one is missing."""
    rows = []
    for reference in references:
        cells = []
        for key in EARLY:
            phases = [phase for phase in PHASES if counts[reference].get(phase)]
            values = [found[reference].get(Cell(phase, key.signal, key.layer)) for phase in phases]
            if not values or None in values:
                return None
            weights = [counts[reference][phase] for phase in phases]
            cells.append(
                sum(value * weight for value, weight in zip(values, weights, strict=True) if value is not None)
            )
        rows.append(cells)
    return np.array(rows, np.float64)
