"""The exact lane: where prover and verifier share hardware, software and kernels, honest evidence is equal bit for bit.

What a bundle states of its machine is its signer's word. Whoever states this verifier's own setting is held to it:
there the test is equality. Whoever states another kind of device must not be equal: no CPU rounds like a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from fpforensics.common.engines.base import EngineFacts, ReplayMode
from fpforensics.common.errors import shorten
from fpforensics.common.evidence import Row
from fpforensics.common.signals import PHASES, Divergence, Trace, first_divergence
from fpforensics.verifier.environment_diff import Difference

# One family rounds alike: measured for the H100 and H200 here, published for the others.
FAMILIES = (("A100",), ("H100", "H200"))
_FEW = 3
_MACHINE_ON_A_CPU = frozenset({"cpu", "cpu_count", "cpu_flags"})
# Versions that take no part in any product.
_NO_ARITHMETIC = frozenset({"python", "fpforensics", "numpy"})


@dataclass(frozen=True)
class Setting:
    """How one row's stated setting stands to this verifier's.

    ``shared``: the same, and it repeats bit-exactly. ``apart``: another kind of device, by its name ``stated``.
    ``first_difference`` says where the evidence stops being equal to the claimed config's replay; empty where it does not.
    ``but_for``: the few things, none of them hardware, that keep it from being shared, such as the number of threads, or replays
    here that differ from each other. ``unsteady``: where those first do.
    """

    shared: bool = False
    apart: bool = False
    stated: str = ""
    first_difference: str = ""
    but_for: tuple[str, ...] = ()
    unsteady: str = ""


@dataclass(frozen=True)
class Settled:
    """Two replays of one row, and what they leave of equality.

    ``traces`` are by reference those of the replay that has the evidence's bits, else of the first. ``unsteady`` says where the two first
    differ. ``refuted``: the evidence differs somewhere before they do.
    """

    traces: tuple[Trace, ...]
    unsteady: str = ""
    refuted: bool = False


UNKNOWN = Setting()
"""Nothing known of it: equality proves, and its absence says nothing."""


def setting_of(
    row: Row,
    replayed: EngineFacts,
    differences: Iterable[Difference],
    mode: ReplayMode,
    first_difference: str,
    unsteady: str = "",
    refuted: bool = False,
) -> Setting:
    """``differences`` compare the row's environment and facts with those of the claimed config's replay. ``unsteady`` and ``refuted`` are
    of a replay that was made again (:class:`Settled`): a config that does not repeat here refutes by bits only where it did."""
    stated = row.facts
    repeats = (
        mode == "decode"
        and row.repetitions.bit_identical
        and row.repetitions.count > 1
        and set(stated.batch_sizes) == set(replayed.batch_sizes)
        and gpu_family(stated.gpu) == gpu_family(replayed.gpu)
    )
    others = [each for each in differences if not each.equal and _decides_rounding(each, stated.device)]
    near = len(others) <= _FEW and all(each.kind != "hardware" for each in others)
    unsettled = bool(unsteady and first_difference and not refuted)
    named = [*map(_named, others), *([f"two replays here, which first differ at {unsteady}"] if unsettled else [])]
    return Setting(
        shared=repeats and not named,
        but_for=tuple(named) if repeats and near else (),
        apart=stated.device != replayed.device,
        stated=stated.gpu or stated.device,
        first_difference=first_difference,
        unsteady=unsteady,
    )


def _named(each: Difference) -> str:
    return f"{each.name}: {shorten(each.prover, 40) or 'none'} there, {shorten(each.verifier, 40) or 'none'} here"


def gpu_family(name: str) -> str:
    """The family whose members round alike, or the name itself: so for a slice of a GPU, whose kernels may be others."""
    words = name.replace("-", " ").split()
    if "MIG" in words:
        return name
    return next((family[0] for family in FAMILIES if any(each in words for each in family)), name)


def first_difference(claimed: Iterable[Trace], replayed: Sequence[Trace]) -> str:
    """Where the traces first differ in any bit: reference, phase, position, tensor and size; empty where they never do."""
    for ours, theirs in zip(claimed, replayed, strict=True):
        found = first_divergence(_compared(ours), _compared(theirs))
        if found is not None:
            return str(found)
    return ""


def settle(claimed: Iterable[Trace], first: Sequence[Trace], again: Sequence[Trace]) -> Settled:
    """What two replays say of the evidence together, reference by reference."""
    chosen: list[Trace] = []
    unsteady, refuted = "", False
    for ours, one, two in zip(map(_compared, claimed), first, again, strict=True):
        departs, differs = first_divergence(ours, _compared(one)), first_divergence(_compared(one), _compared(two))
        second = departs is not None and first_divergence(ours, _compared(two)) is None
        chosen.append(two if second else one)
        unsteady = unsteady or str(differs or "")
        if departs is not None and not second:
            refuted = refuted or differs is None or _place(departs) < _place(differs)
    return Settled(tuple(chosen), unsteady, refuted)


def _place(divergence: Divergence) -> tuple[int, int]:
    return PHASES.index(divergence.phase), divergence.position


def _compared(trace: Trace) -> Trace:
    """Without whole logits, which replays do not capture."""
    return replace(trace, prefill=replace(trace.prefill, logits=None), decode=replace(trace.decode, logits=None))


def _decides_rounding(each: Difference, device: str) -> bool:
    if each.kind == "hardware":
        return device == "cpu" and each.name in _MACHINE_ON_A_CPU
    return each.name not in _NO_ARITHMETIC
