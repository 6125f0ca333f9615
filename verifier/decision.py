"""Does the evidence of one row fit the claim, given a lineup of replays and a noise floor?

Equality is looked at first (rules 1 and 2). Then the calibrated rule of :mod:`fpforensics.verifier.calibrated` decides, at a
measured error rate, where a profile covers the claimed config and the evidence holds the early layers. Where none does, the
rules below decide: both their thresholds are fixed numbers, without an error rate. Arithmetic on distances alone: no I/O,
no engine.

Every distance is expressed in units of its cell's noise floor: the distance between the verifier's own replay
of the claimed config and its anchor, the same config replayed in a wider dtype. A member's score D is the
mean over cells, each (phase, signal) weighing the same and each layer the same within it. D_in is the best
score of a member for which the claim holds, D_out of one which contradicts it, and the SNR is D_out / D_in.
In order:

 0. Some member is bit-identical, though the bundle states another kind of device: INCONSISTENT, too good to come from there.
 1. A fitting member is bit-identical: CONSISTENT, or INCONCLUSIVE if a contradicting one is too.
 2. Only a contradicting member is bit-identical: INCONSISTENT. So is evidence that no member equals, where prover and verifier
    share hardware, software and kernels: there the test is equality (:mod:`fpforensics.verifier.exact`).
 3. The claimed config itself, which is the row's declaration with the claim applied, is more than 2 noise floors away:
    INCONSISTENT, rounding does not explain the distance. That another config fits the words of the claim is no excuse.
 4. Nothing in the lineup contradicts the claim: INCONCLUSIVE, unless it is about identity alone (which model): no config can
    contradict that, and CONSISTENT rests on the noise floor.
 5. D_in / D_out is more than 3: INCONSISTENT, a contradicting member fits better.
 6. D_out / D_in is more than 3: CONSISTENT.
 7. Otherwise INCONCLUSIVE, naming the contradicting members that are not told apart.

Rule 4 comes before a CONSISTENT of rule 1 too: equality with one config says nothing about a config that was not replayed.
Without a usable noise floor only rules 0 to 2 can decide. Evidence that a profile could have judged, had it held the early layers,
is not CONSISTENT by the fixed limits alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from statistics import fmean

import msgspec

from fpforensics.common.errors import Error, ReplayError, UsageError, shorten
from fpforensics.common.signals import PHASES, SIGNALS
from fpforensics.verifier.calibrated import ENOUGH, Calibration, Judgement, judge
from fpforensics.verifier.calibrated import Verdict as Verdict
from fpforensics.verifier.distance import Cell
from fpforensics.verifier.exact import UNKNOWN, Setting
from fpforensics.verifier.matrix import Classes, Ratio, labels, ratio

MAX_FLOORS = 2.0
"""Noise floors from the claimed config that rounding may explain: honest evidence measured 0 to 1.16, int8 weights 2.2."""
MIN_RATIO = 3.0
"""How many times nearer than another a member must be to be told apart: the published scale's lowest step."""

LATE_FLOORS, LATE_CELL = 1.3, 2.2
"""The same for evidence that is vouched for, of :data:`~fpforensics.verifier.calibrated.ENOUGH` positions, over all layers and in any one cell:
honest evidence measured at most 1.19 and 1.82 (768 windows of 16 positions, H100 against CPU)."""

# Keeps every mean finite; nothing honest comes near.
_MOST_FLOORS = 1e12
_UNOPPOSED = "no member of the lineup contradicts the claim"


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


class RowVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """What one row's evidence says about the claim.

    ``snr`` is D_out / D_in, None when infinite (see the flag) or when nothing contradicts the claim;
    ``floors`` is D_in. ``kernel_class`` holds the members that this machine cannot tell from the claimed
    config, itself included, or nothing. ``scores`` are ordered best first. ``calibration`` names the profile that decided,
    at level ``alpha`` and with the claim's ``p_value``, or is empty (``calibration_digest`` is the profile's). ``positions`` is how many positions of one prompt the
    evidence was worth, ``prompts_needed`` how many prompts may settle what is inconclusive.
    """

    config_id: str
    claim: str
    verdict: Verdict
    snr: float | None
    snr_infinite: bool
    label: str
    second_label: str
    floors: float | None
    nearest: str
    fits: tuple[str, ...]
    contradicts: tuple[str, ...]
    kernel_class: tuple[str, ...]
    references: int
    scores: tuple[MemberScore, ...]
    noise: tuple[NoiseFloor, ...]
    reasons: tuple[str, ...]
    calibration: str = ""
    calibration_digest: str = ""
    alpha: float | None = None
    p_value: float | None = None
    positions: int | None = None
    prompts_needed: int | None = None


def decide_row(
    *,
    config_id: str,
    claim: str,
    members: Sequence[Member],
    noise: Mapping[Cell, float],
    kernel_classes: Classes = (),
    identity_only: bool = False,
    calibration: Calibration | None = None,
    uncalibrated: str = "",
    setting: Setting = UNKNOWN,
    not_replayed: Sequence[str] = (),
) -> RowVerdict:
    """Apply the rule to one row. ``config_id`` is the id of the claimed config's member.

    ``identity_only``: the claim is about which model it is, and nothing else. ``calibration`` is given where a profile covers
    the claimed config; ``uncalibrated`` says what the evidence lacks where one covers it and still cannot judge. ``setting`` is how
    the prover's stated setting stands to this verifier's. ``not_replayed`` names members that contradict the claim but could not run.
    ``noise`` must hold every cell that the members hold. Raises :class:`UsageError` if no member fits the
    claim, :class:`ReplayError` for a value that is not finite and at least 0, and :class:`Error` if members
    hold different cells.
    """
    _check(members, noise)
    used = _usable_cells(members, noise)
    scores = _scores(members, {cell: noise[cell] for cell in used})
    fitting = [score for score in scores if score.fits]
    contradicting = [score for score in scores if not score.fits]
    d_in = fitting[0].floors
    snr = ratio(contradicting[0].floors, d_in) if contradicting else Ratio()
    claimed = next((score for score in fitting if score.id == config_id), fitting[0])
    judgement: Judgement | None = None
    if not any(cell.layer for cell in noise):
        setting = replace(setting, apart=False)  # a few certain tokens may round alike anywhere
    equality = _by_equality(claimed, fitting, contradicting, identity_only, setting)
    if equality is not None:
        verdict, reasons = equality
    elif calibration is not None:
        judgement = judge(
            claimed.id,
            [score.id for score in fitting],
            [score.id for score in contradicting],
            calibration,
            kernel_classes,
            identity_only,
            setting.apart,
        )
        verdict, reasons = judgement.verdict, judgement.reasons
        # The early layers decide, but what comes after them must not be beyond explanation either.
        whole = next(member for member in members if member.id == claimed.id).distances
        most, most_in_cell = MAX_FLOORS, MIN_RATIO
        if calibration.scores.positions >= ENOUGH and calibration.pools is None:  # measured with the built-in one
            most, most_in_cell = LATE_FLOORS, LATE_CELL
        late = [cell for cell in used if _in_floors(whole[cell], noise[cell]) > most_in_cell]
        if verdict != "INCONSISTENT" and claimed.floors is not None and claimed.floors > MAX_FLOORS:
            verdict = "INCONSISTENT"
            reasons = (
                f"over all layers {_number(claimed.floors)} noise floors from {claimed.id}, limit {MAX_FLOORS:g}",
            )
        elif verdict == "CONSISTENT" and claimed.floors is not None and claimed.floors > most:
            verdict = "INCONCLUSIVE"
            reasons += (
                f"over all layers {_number(claimed.floors)} noise floors away, honest evidence at most {most:g}",
            )
        elif verdict == "CONSISTENT" and late:
            verdict = "INCONCLUSIVE"
            reasons += (f"more than {most_in_cell:g} noise floors away at {', '.join(map(str, late[:3]))}",)
        scores = [_with_p(score, judgement, calibration.alpha) for score in scores]
    else:
        verdict, reasons = _by_limits(claimed, fitting, contradicting, identity_only)
        if verdict == "CONSISTENT" and uncalibrated:
            verdict, reasons = "INCONCLUSIVE", (*reasons, uncalibrated)
    if verdict == "CONSISTENT" and not_replayed:
        reasons += (f"not replayed here, so nothing is said of them: {_list(not_replayed)}",)
    unused = [cell for cell in sorted(noise) if cell not in used]
    if unused and used:
        reasons += (f"left out, having no noise floor: {', '.join(map(str, unused))}",)
    label, second_label = labels(snr)
    return RowVerdict(
        config_id=config_id,
        claim=claim,
        verdict=verdict,
        snr=snr.value,
        snr_infinite=snr.infinite,
        label=label,
        second_label=second_label,
        floors=d_in,
        nearest=scores[0].id if scores[0].floors is not None or scores[0].bit_identical else "",
        fits=tuple(sorted(score.id for score in fitting)),
        contradicts=tuple(sorted(score.id for score in contradicting)),
        kernel_class=next((tuple(sorted(each)) for each in kernel_classes if config_id in each), ()),
        references=len(members[0].per_reference),
        scores=tuple(scores),
        noise=tuple(NoiseFloor(cell=cell, noise=noise[cell], used=cell in used) for cell in sorted(noise)),
        reasons=reasons,
        calibration=calibration.profile if calibration is not None and judgement else "",
        alpha=calibration.alpha if calibration is not None and judgement else None,
        p_value=judgement.p if judgement else None,
        positions=calibration.scores.positions if calibration is not None and judgement else None,
        prompts_needed=judgement.prompts_needed if judgement else None,
    )


def combine_rows(rows: Iterable[RowVerdict]) -> Verdict:
    """The bundle's verdict: INCONSISTENT if any row is, else INCONCLUSIVE if any row is, else CONSISTENT."""
    verdicts = {row.verdict for row in rows}
    if not verdicts:
        raise UsageError("no row was checked", "name a row that the bundle holds")
    order: tuple[Verdict, ...] = ("INCONSISTENT", "INCONCLUSIVE", "CONSISTENT")
    return next(verdict for verdict in order if verdict in verdicts)


def _by_equality(
    claimed: MemberScore,
    fitting: list[MemberScore],
    contradicting: list[MemberScore],
    identity_only: bool,
    setting: Setting,
) -> tuple[Verdict, tuple[str, ...]] | None:
    """Rules 0 to 2 of the module's docstring; None where bits decide nothing. Both lists best first, ``fitting`` not empty."""
    equal_in = [score.id for score in fitting if score.bit_identical]
    equal_out = [score.id for score in contradicting if score.bit_identical]
    # 0.
    if setting.apart and (equal_in or equal_out):
        said = f"bit-identical to {_list(equal_in + equal_out)} as computed here, though the bundle states {setting.stated}"
        return "INCONSISTENT", (f"{said}: too good to come from another kind of device",)
    # 1.
    if equal_in and equal_out:
        return "INCONCLUSIVE", (
            f"bit-identical to {_list(equal_in)}, for which the claim holds, and to {_list(equal_out)}, "
            "which contradict it: one kernel class on this machine, nothing can tell them apart",
        )
    if equal_in and (contradicting or identity_only):
        return "CONSISTENT", (f"bit-identical to {_list(equal_in)}",)
    if equal_in:
        return "INCONCLUSIVE", (f"bit-identical to {_list(equal_in)}, but {_UNOPPOSED}: add one that does",)
    # 2.
    if equal_out:
        return "INCONSISTENT", (f"bit-identical to {_list(equal_out)}, which contradict the claim",)
    if setting.shared and setting.first_difference:
        return "INCONSISTENT", (
            "the bundle states this verifier's own hardware, software and kernels, where honest evidence is bit-identical",
            f"it first differs from {claimed.id} at {setting.first_difference}",
        )
    return None


def _by_limits(
    claimed: MemberScore, fitting: list[MemberScore], contradicting: list[MemberScore], identity_only: bool
) -> tuple[Verdict, tuple[str, ...]]:
    """Rules 3 to 7 of the module's docstring. Both lists best first, ``fitting`` not empty."""
    d_in = fitting[0].floors
    if d_in is None or claimed.floors is None:
        return "INCONCLUSIVE", ("no cell has a noise floor to measure the distance by",)
    # 3.
    if claimed.floors > MAX_FLOORS:
        return "INCONSISTENT", (
            f"further from the claimed config than rounding explains: {_number(claimed.floors)} noise floors over all "
            f"layers, limit {MAX_FLOORS:g}",
            *_better(claimed, contradicting),
        )
    resting = f"{_number(d_in)} noise floors from {fitting[0].id} over all layers, within the limit of {MAX_FLOORS:g}"
    # 4.
    if not contradicting:
        if identity_only:
            return "CONSISTENT", (resting, f"{_UNOPPOSED}: this rests on the noise floor alone")
        return "INCONCLUSIVE", (resting, f"{_UNOPPOSED}: add one that does")
    best = contradicting[0]
    # 5.
    if ratio(d_in, best.floors).exceeds(MIN_RATIO):
        return "INCONSISTENT", _better(fitting[0], contradicting)
    # 6.
    if ratio(best.floors, d_in).exceeds(MIN_RATIO):
        times = _times(best.floors, d_in)
        return "CONSISTENT", (
            resting,
            f"{best.id}, the nearest that contradicts the claim, is {times} as far",
        )
    # 7.
    alike = [score.id for score in contradicting if not ratio(score.floors, d_in).exceeds(MIN_RATIO)]
    return "INCONCLUSIVE", (resting, f"not told apart from {_list(alike)}, which contradict the claim")


def _with_p(score: MemberScore, judgement: Judgement, alpha: float) -> MemberScore:
    tested = judgement.tested.get(score.id)
    if tested is None:
        return score
    odds = None if tested.lane == "limit" else tested.p
    return msgspec.structs.replace(score, p_value=odds, rejected=tested.rejected(alpha))


def _better(fitting: MemberScore, contradicting: Sequence[MemberScore]) -> tuple[str, ...]:
    """The sentence that names a clearly better contradicting member, if there is one."""
    if not contradicting or not ratio(fitting.floors, contradicting[0].floors).exceeds(MIN_RATIO):
        return ()
    best = contradicting[0]
    times = _times(fitting.floors, best.floors)
    return (f"{best.id}, which contradicts the claim, fits better: {fitting.id} is {times} as far",)


def _check(members: Sequence[Member], noise: Mapping[Cell, float]) -> None:
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


def _usable_cells(members: Sequence[Member], noise: Mapping[Cell, float]) -> list[Cell]:
    """Cells with a noise floor, and those where there is neither noise nor any distance."""
    cells = members[0].distances
    return [cell for cell in cells if noise[cell] > 0 or all(member.distances[cell] == 0 for member in members)]


def _scores(members: Sequence[Member], noise: Mapping[Cell, float]) -> list[MemberScore]:
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
            signals.append(fmean(_in_floors(distances[cell], noise[cell]) for cell in cells))
    return fmean(signals) if signals else None


def _in_floors(distance: float, noise: float) -> float:
    in_floors = ratio(distance, noise)
    return _MOST_FLOORS if in_floors.value is None else min(in_floors.value, _MOST_FLOORS)


def _times(far: float | None, near: float | None) -> str:
    times = ratio(far, near)
    return "infinitely" if times.value is None else f"{_number(times.value)} times"


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:.3g}"


def _list(ids: Sequence[str]) -> str:
    return ", ".join(sorted(ids))
