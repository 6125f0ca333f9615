"""The members of a lineup and their scores: how far each replay lies from the evidence, in noise floors.

Every distance is expressed in units of its cell's noise floor: the distance between the verifier's own replay
of the claimed config and its anchor, the same config replayed in a wider dtype. A member's score D is the
mean over cells, each (phase, signal) weighing the same and each layer the same within it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from statistics import fmean

import msgspec

from fpforensics.common.errors import Error, ReplayError, UsageError, shorten
from fpforensics.common.signals import PHASES, SIGNALS
from fpforensics.verifier.distance import Cell
from fpforensics.verifier.matrix import ratio

# Keeps every mean finite; nothing honest comes near.
_MOST_FLOORS = 1e12


@dataclass(frozen=True)
class Member:
    """One replayed config: whether the claim holds for it, and the distance to it per reference and cell."""

    id: str
    fits: bool
    per_reference: Mapping[str, Mapping[Cell, float]]

    @cached_property
    def distances(self) -> dict[Cell, float]:
        """Mean over the references that hold the cell."""
        values: dict[Cell, list[float]] = {}
        for cells in self.per_reference.values():
            for cell, distance in cells.items():
                values.setdefault(cell, []).append(distance)
        return {cell: fmean(values[cell]) for cell in sorted(values)}

    @property
    def bit_identical(self) -> bool:
        """Whether nothing at all differs from this member's replay."""
        return all(distance == 0.0 for cells in self.per_reference.values() for distance in cells.values())


class MemberScore(msgspec.Struct, frozen=True, kw_only=True):
    """One member's score. ``floors`` is D, None if no cell had a usable noise floor.

    ``nearest_in`` counts the references, each taken alone, to which this member is nearest (ties count for
    each). ``p_value`` says how often honest evidence of this config would look like this, where a profile was used.
    """

    id: str
    fits: bool
    floors: float | None
    bit_identical: bool
    nearest_in: int
    p_value: float | None = None
    rejected: bool = False


class NoiseFloor(msgspec.Struct, frozen=True, kw_only=True):
    """The measured noise floor of one cell; a cell whose floor of 0 leaves it out is not ``used``."""

    cell: Cell
    noise: float
    used: bool


def score_members(members: Sequence[Member], noise: Mapping[Cell, float]) -> list[MemberScore]:
    """Best first; equal scores fitting first, then by id, so that the lineup's order decides nothing."""
    nearest = dict.fromkeys((member.id for member in members), 0)
    for reference in members[0].per_reference:
        alone = {member.id: _floors(member.per_reference[reference], noise) for member in members}
        known = [floors for floors in alone.values() if floors is not None]
        for id_, floors in alone.items():
            nearest[id_] += floors is not None and floors == min(known)
    scores = [
        MemberScore(
            id=member.id,
            fits=member.fits,
            floors=_floors(member.distances, noise),
            bit_identical=member.bit_identical,
            nearest_in=nearest[member.id],
        )
        for member in members
    ]
    return sorted(scores, key=_best_first)


def usable_cells(members: Sequence[Member], noise: Mapping[Cell, float]) -> list[Cell]:
    """Cells with a noise floor, and those where there is neither noise nor any distance."""
    cells = members[0].distances
    return [cell for cell in cells if noise[cell] > 0 or all(member.distances[cell] == 0 for member in members)]


def in_floors(distance: float, noise: float) -> float:
    """``distance`` in units of ``noise``; finite where that is 0."""
    found = ratio(distance, noise)
    return _MOST_FLOORS if found.value is None else min(found.value, _MOST_FLOORS)


def require_members(members: Sequence[Member], noise: Mapping[Cell, float]) -> None:
    """Raise for members and noise floors that no rule could be applied to: see :func:`fpforensics.verifier.decision.decide_row`."""
    if not any(member.fits for member in members):
        raise UsageError("the claim holds for no member of the lineup", "add the claimed config to the lineup")
    if len({member.id for member in members}) != len(members):
        raise Error("two members of the lineup have the same id", "give every config its own id")
    shape = {reference: cells.keys() for reference, cells in members[0].per_reference.items()}
    if not any(shape.values()):
        raise UsageError("nothing was measured", "check at least one reference with one captured position")
    for member in members:
        if {reference: cells.keys() for reference, cells in member.per_reference.items()} != shape:
            one, other = shorten(member.id), shorten(members[0].id)
            raise Error(f"members {one!r} and {other!r} hold different references or cells")
        for reference, cells in member.per_reference.items():
            for cell, distance in cells.items():
                where = f"to {shorten(member.id)!r} on {shorten(reference)!r}"
                _check_value(distance, f"{cell}: distance {distance} {where}")
    for cell, value in noise.items():
        _check_value(value, f"{cell}: noise floor {value}")
    missing = {cell for cells in shape.values() for cell in cells} - noise.keys()
    if missing:
        raise Error(f"no noise floor for {', '.join(map(str, sorted(missing)))}", "measure it against the anchor")


def _check_value(value: float, what: str) -> None:
    if not math.isfinite(value) or value < 0:
        raise ReplayError(what, "distances are finite numbers of at least 0")


def _best_first(score: MemberScore) -> tuple[bool, float, bool, str]:
    return (
        not score.bit_identical,
        math.inf if score.floors is None else score.floors,
        not score.fits,
        score.id,
    )


def _floors(distances: Mapping[Cell, float], noise: Mapping[Cell, float]) -> float | None:
    """D: the mean over (phase, signal) of the mean over layers of distance / noise floor."""
    signals = []
    for phase, signal in product(PHASES, SIGNALS):
        cells = [cell for cell in sorted(noise) if (cell.phase, cell.signal) == (phase, signal) and cell in distances]
        if cells:
            signals.append(fmean(in_floors(distances[cell], noise[cell]) for cell in cells))
    return fmean(signals) if signals else None
