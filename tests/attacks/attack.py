"""What an attack is: how a liar makes what it shows, out of which numbers, and what should come of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from attacks.material import Material
from attacks.shown import Shown, coherent

Outcome = Literal["CONSISTENT", "INCONSISTENT", "INCONCLUSIVE", "REFUSED"]
How = Callable[[Material, Shown], Shown]
NOT_CONSISTENT: tuple[Outcome, ...] = ("INCONSISTENT", "INCONCLUSIVE", "REFUSED")

CLAIM = "attn=sdpa,quant=none"
LINEUP = ("attn=eager", "quant=torchao-int8", "quant=bnb-nf4")


def as_it_is(_material: Material, shown: Shown) -> Shown:
    """No disguise."""
    return shown


@dataclass(frozen=True, kw_only=True)
class Attack:
    """One lie, and the honest run that goes the same way.

    ``how`` makes what is shown out of the numbers called ``other`` (see :meth:`Material.numbers`); the control is ``honest_how`` (the
    same, if None) out of those called ``honest``, and must come out as one of ``control``. ``caught`` are the outcomes that the
    attack should have. A liar that is not ``careless`` makes its log-probabilities fit each other last. ``missed`` says why today's is another one, ``beyond`` why none can be asked of this evidence: then it
    is CONSISTENT.
    """

    name: str
    how: How
    other: str
    caught: tuple[Outcome, ...] = ("INCONSISTENT",)
    honest_how: How | None = None
    honest: str = "sdpa"
    control: tuple[Outcome, ...] = ("CONSISTENT",)
    claim: str = CLAIM
    lineup: tuple[str, ...] = LINEUP
    careless: bool = False
    missed: str = ""
    beyond: str = ""

    def shown(self, material: Material) -> Shown:
        """What the liar signs."""
        shown = self.how(material, material.numbers(self.other))
        return shown if self.careless else coherent(shown)

    def honestly(self, material: Material) -> Shown:
        """The control."""
        return (self.honest_how or self.how)(material, material.numbers(self.honest))
