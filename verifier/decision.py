"""Does the evidence of one row fit the claim, given a lineup of replays and a noise floor?

In order:

 1. Equality, which needs no threshold (rules 0 to 2 of :mod:`fpforensics.verifier.fixed`).
 2. The calibrated rule of :mod:`fpforensics.verifier.calibrated`, at a measured error rate, where a profile covers the claimed
    config and the evidence holds the early layers. What comes after these layers must not be beyond explanation either.
 3. Where no profile does, fixed limits without an error rate (rules 3 to 7 of :mod:`fpforensics.verifier.fixed`). Evidence that a
    profile could have judged, had it held the early layers, is not CONSISTENT by them alone.

Arithmetic on distances alone: no I/O, no engine. What a member's score is, :mod:`fpforensics.verifier.members` says; D_in is the
best one of a member for which the claim holds, D_out of one which contradicts it, and the SNR is D_out / D_in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import msgspec

from fpforensics.common.errors import UsageError
from fpforensics.verifier.calibrated import ENOUGH, Calibration, Judgement, judge
from fpforensics.verifier.calibrated import Verdict as Verdict
from fpforensics.verifier.distance import Cell
from fpforensics.verifier.exact import UNKNOWN, Setting
from fpforensics.verifier.fixed import MAX_FLOORS as MAX_FLOORS
from fpforensics.verifier.fixed import MIN_RATIO as MIN_RATIO
from fpforensics.verifier.fixed import by_equality, by_limits, listed, number
from fpforensics.verifier.matrix import Classes, Ratio, labels, ratio
from fpforensics.verifier.members import Member as Member
from fpforensics.verifier.members import MemberScore as MemberScore
from fpforensics.verifier.members import NoiseFloor as NoiseFloor
from fpforensics.verifier.members import in_floors, require_members, score_members, usable_cells

LATE_FLOORS, LATE_CELL = 1.3, 2.2
""":data:`MAX_FLOORS` and :data:`MIN_RATIO` for evidence that is vouched for, of :data:`~fpforensics.verifier.calibrated.ENOUGH` positions, over all layers and in any one cell:
honest evidence measured at most 1.19 and 1.82 (768 windows of 16 positions, H100 against CPU)."""


class RowVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """What one row's evidence says about the claim.

    ``snr`` is D_out / D_in, None when infinite (see the flag) or when nothing contradicts the claim;
    ``floors`` is D_in. ``kernel_class`` holds the members that this machine cannot tell from the claimed
    config, itself included, or nothing. ``scores`` are ordered best first. ``calibration`` names the profile that decided,
    at level ``alpha`` and with the claim's ``p_value``, or is empty (``calibration_digest`` is the profile's). ``positions`` is how many positions of one prompt the
    evidence was worth, ``prompts_needed`` how many prompts may settle what is inconclusive. ``equality``: bits decided, and no
    threshold.
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
    equality: bool = False


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
    require_members(members, noise)
    used = usable_cells(members, noise)
    scores = score_members(members, {cell: noise[cell] for cell in used})
    fitting = [score for score in scores if score.fits]
    contradicting = [score for score in scores if not score.fits]
    d_in = fitting[0].floors
    snr = ratio(contradicting[0].floors, d_in) if contradicting else Ratio()
    claimed = next((score for score in fitting if score.id == config_id), fitting[0])
    judgement: Judgement | None = None
    if not any(cell.layer for cell in noise):
        setting = replace(setting, apart=False)  # a few certain tokens may round alike anywhere
    equality = by_equality(claimed, fitting, contradicting, identity_only, setting)
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
        whole = next(member for member in members if member.id == claimed.id).distances
        in_cells = {cell: in_floors(whole[cell], noise[cell]) for cell in used}
        verdict, reasons = _over_all_layers(judgement, claimed, in_cells, calibration)
        scores = [_with_p(score, judgement, calibration.alpha) for score in scores]
    else:
        verdict, reasons = by_limits(claimed, fitting, contradicting, identity_only)
        if verdict == "CONSISTENT" and uncalibrated:
            verdict, reasons = "INCONCLUSIVE", (*reasons, uncalibrated)
    if verdict == "CONSISTENT" and not_replayed:
        reasons += (f"not replayed here, so nothing is said of them: {listed(not_replayed)}",)
    if equality is None and setting.but_for:
        reasons += (f"equality would decide, but for {'; '.join(setting.but_for)}",)
    elif setting.unsteady:
        reasons += (f"two replays of {claimed.id} here first differ at {setting.unsteady}",)
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
        equality=equality is not None,
    )


def combine_rows(rows: Iterable[RowVerdict]) -> Verdict:
    """The bundle's verdict: INCONSISTENT if any row is, else INCONCLUSIVE if any row is, else CONSISTENT."""
    verdicts = {row.verdict for row in rows}
    if not verdicts:
        raise UsageError("no row was checked", "name a row that the bundle holds")
    order: tuple[Verdict, ...] = ("INCONSISTENT", "INCONCLUSIVE", "CONSISTENT")
    return next(verdict for verdict in order if verdict in verdicts)


def _over_all_layers(
    judgement: Judgement, claimed: MemberScore, in_cells: Mapping[Cell, float], calibration: Calibration
) -> tuple[Verdict, tuple[str, ...]]:
    """The early layers decide, but what comes after them must not be beyond explanation either."""
    verdict, reasons = judgement.verdict, judgement.reasons
    most, most_in_cell = MAX_FLOORS, MIN_RATIO
    if calibration.scores.positions >= ENOUGH and calibration.pools is None:  # measured with the built-in one
        most, most_in_cell = LATE_FLOORS, LATE_CELL
    floors = claimed.floors or 0.0
    late = [str(cell) for cell, found in in_cells.items() if found > most_in_cell]
    if verdict != "INCONSISTENT" and floors > MAX_FLOORS:
        said = f"over all layers {number(floors)} noise floors from {claimed.id}, limit {MAX_FLOORS:g}"
        return "INCONSISTENT", (said,)
    if verdict == "CONSISTENT" and floors > most:
        said = f"over all layers {number(floors)} noise floors away, honest evidence at most {most:g}"
        return "INCONCLUSIVE", (*reasons, said)
    if verdict == "CONSISTENT" and late:
        said = f"more than {most_in_cell:g} noise floors away at {', '.join(late[:3])}"
        return "INCONCLUSIVE", (*reasons, said)
    return verdict, reasons


def _with_p(score: MemberScore, judgement: Judgement, alpha: float) -> MemberScore:
    tested = judgement.tested.get(score.id)
    if tested is None:
        return score
    odds = None if tested.lane == "limit" else tested.p
    return msgspec.structs.replace(score, p_value=odds, rejected=tested.rejected(alpha))
