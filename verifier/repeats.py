"""Rows whose own repetitions differed: they are held to no equality, and part of a distance may be the prover's own noise.

How far repetitions lay apart is the bundle's word, so it can excuse and never vouch: where the rule says INCONSISTENT, it is
asked again with each cell's noise floor raised to that noise, and what is then explained is INCONCLUSIVE. Noise is believed up
to :data:`MAX_FLOORS` of this verifier's own floor of the cell: sums in another order round otherwise, no more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from fpforensics.common.errors import shorten
from fpforensics.common.evidence import Repetitions
from fpforensics.verifier.decision import RowVerdict
from fpforensics.verifier.distance import Cell
from fpforensics.verifier.fixed import MAX_FLOORS, number
from fpforensics.verifier.members import in_floors


def noise_factors(repetitions: Repetitions, noise: Mapping[Cell, float]) -> dict[Cell, float]:
    """By how much the row's own noise raises each cell's floor, 1 to :data:`MAX_FLOORS`; nothing for a row that repeated in every bit."""
    if repetitions.bit_identical:
        return {}
    stated = {cell: repetitions.noise.get(str(cell), 0.0) for cell in noise}
    return {
        cell: min(max(1.0, in_floors(stated[cell], floor)), MAX_FLOORS) for cell, floor in noise.items() if floor > 0
    }


def with_own_noise(
    verdict: RowVerdict,
    repetitions: Repetitions,
    noise: Mapping[Cell, float],
    again: Callable[[Mapping[Cell, float]], RowVerdict],
) -> RowVerdict:
    """``verdict``, and what the row's own noise makes of it. ``again`` decides with the floors of ``noise`` times these factors."""
    if repetitions.bit_identical:
        return verdict
    said = _difference(repetitions, noise)
    factors = noise_factors(repetitions, noise)
    if verdict.verdict == "INCONSISTENT" and any(factor > 1 for factor in factors.values()):
        second = again(factors)
        if second.verdict != "INCONSISTENT":
            excused = "what this noise explains is neither confirmed nor refuted; without it:"
            return msgspec.structs.replace(verdict, verdict="INCONCLUSIVE", reasons=(said, excused, *verdict.reasons))
    return msgspec.structs.replace(verdict, reasons=(*verdict.reasons, said))


def _difference(repetitions: Repetitions, noise: Mapping[Cell, float]) -> str:
    where = f" from {shorten(repetitions.first_divergence, 120)} on" if repetitions.first_divergence else ""
    found = {
        cell: in_floors(repetitions.noise[str(cell)], floor)
        for cell, floor in noise.items()
        if str(cell) in repetitions.noise and floor > 0
    }
    if not found:
        return f"the prover's own repetitions differed{where}; by how much is not stated"
    cell = max(found, key=lambda each: found[each])
    most = f"by up to {number(found[cell])} noise floors, at {cell}"
    capped = f" (believed up to {MAX_FLOORS:g})" if found[cell] > MAX_FLOORS else ""
    return f"the prover's own repetitions differed{where}, {most}{capped}: not held to equality"
