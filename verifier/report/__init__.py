"""Reports of a check, for people: text in the published shape, one HTML page, a picture of heat maps.

Ids, names and environments come from signed but untrusted evidence: every renderer passes what it shows
through :func:`clean`, so that no escape sequence or direction mark reaches a terminal or a page.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fpforensics.common.signals import Phase, Signal
from fpforensics.common.words import counted
from fpforensics.verifier.decision import MAX_FLOORS, MIN_RATIO, MemberScore, RowVerdict
from fpforensics.verifier.distance import Floats
from fpforensics.verifier.environment_diff import mismatches
from fpforensics.verifier.matrix import MatrixReport, PairSnr, Ratio, labels
from fpforensics.verifier.pairs import PairDecision

if TYPE_CHECKING:
    from fpforensics.verifier.check import CheckResult

SIGNAL_TITLES: dict[Signal, str] = {
    "logprobs": "Logprobs",
    "key_vectors": "Key vectors",
    "hidden_states": "Hidden states",
}


NO_SCALE = "the diagonal does not fit the evidence: no scale"
"""In place of a label where the noise that it would be measured by is the distance to a config that did not run."""
OVER_ALL_LAYERS = "Decisions on pairs are over the layers of this table; the verdict above rests on the early layers, where more is seen."
SAME_KERNELS = "bit-identical baseline: says nothing about other hardware"
"""What an infinite SNR is: a distance over a diagonal of exactly 0."""


def clean(text: str, limit: int = 400) -> str:
    """``text`` on one line, cut to ``limit`` characters; the unprintable as escape sequences."""
    cut = text if len(text) <= limit else f"{text[:limit]}…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cut)


def distance(value: float | None) -> str:
    """A distance as the published tables print it; ``—`` where nothing was measured."""
    return "—" if value is None else f"{value:.2e}"


def snr(value: float | None, infinite: bool, digits: int = 2) -> str:
    """An SNR as the published tables print it."""
    if infinite:
        return "inf"
    return "n/a" if value is None else f"{value:.{digits}f}×"


def fixed(value: float, digits: int = 4, sign: str = "-") -> str:
    """Fixed decimals as published; what would lose its digits that way in scientific notation."""
    small = value != 0 and abs(value) < 10 ** (1 - digits)
    return f"{value:{sign}.2e}" if small else f"{value:{sign}.{digits}f}"


def labelled(value: float | None, infinite: bool) -> str:
    """An SNR's labels on the published scale and the plan's; nothing if it is unknown."""
    published, plan = labels(Ratio(value, infinite))
    return f"{published} ({plan})" if published else ""


def noted(value: float | None, infinite: bool, digits: int = 2) -> str:
    """An SNR as :func:`snr` prints it, and what it means when it is infinite."""
    return f"{snr(value, infinite, digits)} ({SAME_KERNELS})" if infinite else snr(value, infinite, digits)


def row_snr(row: RowVerdict) -> str:
    """A row's SNR and, where what fits the claim fits the evidence, its labels on the published scale and the plan's."""
    shown = noted(row.snr, row.snr_infinite)
    if row.verdict == "INCONSISTENT" or (row.snr is not None and row.snr < 1):
        return f"{shown}, {NO_SCALE}"
    return f"{shown}, {row.label} ({row.second_label})" if row.label else shown


def misfits(matrix: MatrixReport, rows: Sequence[RowVerdict]) -> frozenset[str]:
    """The claimed configs whose diagonal is no measure of noise: the claim was refuted, or another replay lies nearer."""
    refuted = {row.config_id for row in rows if row.verdict == "INCONSISTENT"}
    found = set()
    for name, line in zip(matrix.rows, matrix.aggregate, strict=True):
        own = dict(zip(matrix.columns, line, strict=True)).get(name)
        nearer = own is not None and any(value is not None and value < own for value in line)
        if nearer or name in refuted:
            found.add(name)
    return frozenset(found)


def scale(matrix: MatrixReport, unfit: Collection[str]) -> str:
    """What a matrix's SNR without kernel classes says: its labels, or that its diagonal is no scale (``unfit``: :func:`misfits`)."""
    return NO_SCALE if unfit else labelled(matrix.snr_meaningful, matrix.snr_meaningful_infinite)


def pair_scale(pair: PairSnr, unfit: Collection[str]) -> str:
    """The same of one pair of configs."""
    if pair.a in unfit or pair.b in unfit:
        return "no scale"
    return labelled(pair.snr, pair.snr_infinite)


def decided(decision: PairDecision | None) -> str:
    """Our own verdict on a pair of configs, and the prompts that would resolve an open one."""
    if decision is None:
        return "—"
    if decision.verdict == "UNRESOLVED" and decision.prompts_needed:
        return f"UNRESOLVED, {counted(decision.prompts_needed, 'prompt')}"
    return decision.verdict


def pair_decision(pair: PairSnr, unfit: Collection[str]) -> str:
    """Our verdict on a pair; none where the noise is the distance to a config that did not run (``unfit``: :func:`misfits`)."""
    return "—" if pair.a in unfit or pair.b in unfit else decided(pair.decision)


def floors(value: float | None) -> str:
    """A distance in noise floors."""
    if value is None:
        return "n/a"
    return f"{value:.2f}" if value < 1000 else f"{value:.2g}"


def headline(matrices: Sequence[MatrixReport], phase: Phase) -> list[MatrixReport]:
    """The matrices of a phase that stand for their signal: logprobs, and vectors pooled over layers."""
    return [each for each in matrices if each.phase == phase and each.layer in ("", "pooled")]


def layers(matrices: Sequence[MatrixReport], phase: Phase) -> list[MatrixReport]:
    """The matrices of a phase's single layers."""
    return [each for each in matrices if each.phase == phase and each.layer not in ("", "pooled")]


def log_scale(values: Floats) -> Floats:
    """``values`` to 0 … 1 by logarithm, smallest positive to largest; 0 and NaN stay as they are."""
    positive = values[values > 0]
    if not len(positive):
        return values * 0.0
    low, high = np.log(positive.min()), np.log(positive.max())
    with np.errstate(divide="ignore"):
        scaled = (np.log(values) - low) / max(high - low, 1e-12)
    # A faint tint for the smallest positive value: only an exact zero is blank.
    return np.where(values == 0, 0.0, 0.08 + 0.92 * scaled)


def calibrated(row: RowVerdict) -> str:
    """The profile that a row was decided by, at which level, on how much."""
    digest = f" ({row.calibration_digest[:19]}…)" if row.calibration_digest else ""
    worth = "" if row.positions is None else f", worth {counted(row.positions, 'position')} of one"
    odds = "" if row.p_value is None else f"; p of the claim {row.p_value:.2g}"
    return f"Calibrated by {row.calibration}{digest}; level {row.alpha:g}; {counted(row.references, 'prompt')}{worth}{odds}"


def p_value(score: MemberScore) -> str:
    """How often honest evidence of this config would look like this; ``limit`` where a fixed limit rejected it."""
    if score.p_value is None:
        return "limit" if score.rejected else "not tested"
    return f"{score.p_value:.2g}"


def caveats(result: CheckResult) -> tuple[str, ...]:
    """What the verdict does not say, for this check."""
    said = [
        *_error_rates(result.rows),
        "The evidence was compared with this lineup and with nothing else.",
        "Distances speak of arithmetic. That it ran on the stated hardware is the signer's word.",
    ]
    if result.kernel_classes:
        classes = "; ".join(" = ".join(members) for members in result.kernel_classes)
        said.append(f"Bit-identical here, so that nothing can tell them apart: {classes}.")
    skipped = [member.id for member in result.lineup if member.skipped]
    if skipped:
        said.append(f"Could not be run here, so were not compared: {', '.join(skipped)}.")
    unexpected = mismatches(result.environment)
    if unexpected:
        names = ", ".join(each.name for each in unexpected)
        said.append(f"Not only the hardware differs between prover and verifier, but also: {names}.")
    return tuple(said)


def _error_rates(rows: Sequence[RowVerdict]) -> Iterator[str]:
    if any(row.equality for row in rows):
        yield "Where bits decided, no threshold took part, and there is no error rate to know."
    fixed = [row.config_id for row in rows if not row.calibration and not row.equality]
    if fixed:
        whose = "this verdict" if len(fixed) == len(rows) else f"the verdict on {', '.join(fixed)}"
        yield (
            f"The thresholds ({MAX_FLOORS:g} noise floors, a factor of {MIN_RATIO:g}) are fixed: "
            f"no error rate is known for {whose}."
        )
    for name in dict.fromkeys(row.calibration for row in rows if row.calibration):
        yield f"The error rate is that of the calibration {name}: for other models and hardware it is an extrapolation."
