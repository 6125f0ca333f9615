"""What a mean is not over: references and configs that one side has and the other has not, and runs that were not made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fpforensics.verifier.analysis.measure import Measurements
from fpforensics.verifier.analysis.result import SIDES, NotCompared
from fpforensics.verifier.distance import Cell


def not_compared(measured: Measurements, cells: Sequence[Cell]) -> tuple[NotCompared, ...]:
    """Of one cell, or of several that are pooled: there, a config counts as measured where it was in each of them."""
    found = [
        NotCompared(side=SIDES[side], reason="one side", references=names)
        for side, names in enumerate(measured.one_sided)
        if names
    ]
    for side in dict.fromkeys(each.side for each in measured.members):
        found += _without_counterpart(measured, side)
        found += _not_measured(measured, cells, side)
    return tuple(found)


def _without_counterpart(measured: Measurements, side: int) -> Iterator[NotCompared]:
    others = {each.value for each in measured.members if each.side != side}
    for each in measured.members:
        if others and each.side == side and each.value not in others:
            yield NotCompared(side=SIDES[side], reason="no counterpart", config=each.id)


def _not_measured(measured: Measurements, cells: Sequence[Cell], side: int) -> Iterator[NotCompared]:
    """What no config of the side has, then what single configs lack beyond that."""
    lacking = {
        each.id: {
            name
            for name in measured.references
            if any(index not in measured.held.get((cell, name), ()) for cell in cells)
        }
        for index, each in enumerate(measured.members)
        if each.side == side
    }
    by_all = set.intersection(*lacking.values())
    for config, names in {"": by_all, **lacking}.items():
        own = names - by_all if config else names
        if own:
            listed = tuple(name for name in measured.references if name in own)
            every = len(names) == len(measured.references)
            yield NotCompared(
                side=SIDES[side], reason="not measured", config=config, references=() if every else listed
            )
