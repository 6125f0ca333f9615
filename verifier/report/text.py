"""The report as text: the verdict and its reasons first and last, between them the tables in the shape of the published studies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from fpforensics.common.config import claim_of
from fpforensics.common.signals import PHASES, Phase
from fpforensics.verifier.decision import RowVerdict
from fpforensics.verifier.environment_diff import Difference, mismatches
from fpforensics.verifier.matrix import MatrixReport, PairSnr
from fpforensics.verifier.report import (
    NO_SCALE,
    OVER_ALL_LAYERS,
    SAME_KERNELS,
    calibrated,
    caveats,
    clean,
    floors,
    headline,
    layers,
    misfits,
    noted,
    p_value,
    pair_decision,
    pair_scale,
    row_snr,
    scale,
    tables,
)

if TYPE_CHECKING:
    from fpforensics.verifier.check import CheckResult

_SIGN = {"CONSISTENT": "✓", "INCONSISTENT": "✗", "INCONCLUSIVE": "?"}
_LONGEST_LINE = 2000


def render(result: CheckResult) -> str:
    """The whole report; every line has been cleaned, and ends with a newline."""
    return tables.finish(_report(result))


def one_line(result: CheckResult) -> str:
    """The verdict and the reasons for it, of the rows that decided; cleaned, without a newline."""
    deciding = [row for row in result.rows if row.verdict == result.verdict]
    several = len(result.rows) > 1
    said = [f"{row.config_id}: " * several + "; ".join((*row.reasons, *_no_rate(row))) for row in deciding]
    return clean(f"{_SIGN[result.verdict]} {result.verdict}: {' | '.join(said)}", _LONGEST_LINE)


def _no_rate(row: RowVerdict) -> Iterator[str]:
    """That nobody knows how often the limits that decided are wrong; where bits decided, no limit did."""
    if not row.calibration and not row.equality:
        yield "by fixed limits: no error rate is known"


def _report(result: CheckResult) -> Iterator[str]:
    yield from _verdict(result)
    yield from tables.heading(f"VERIFICATION (teacher-forcing, {result.mode})")
    yield f"Bundle:     {result.bundle_digest}"
    yield f"Signed by:  {result.signer}"
    yield f"Nonce:      {result.nonce or 'none: nobody challenged this evidence'}"
    yield f"Recorded:   {result.evidence_created_at}"
    yield f"Checked:    {result.checked_at}, fpforensics {result.tool_version}"
    yield f"Claim:      {result.claim or 'what each row declares'}"
    yield f"References: {result.references}"
    yield from _environment(result.environment)
    yield from _lineup(result)
    for phase in PHASES:
        if headline(result.matrices, phase):
            yield from _phase(result, phase)
    yield from _phases_compared(result)
    yield from ("", f"{_SIGN[result.verdict]} {result.verdict}")


def _verdict(result: CheckResult) -> Iterator[str]:
    yield from tables.heading("VERDICT")
    for row in result.rows:
        yield from ("", f"{_SIGN[row.verdict]} {row.config_id}: {row.verdict}", f"  Claim: {row.claim}")
        yield from (f"  - {reason}" for reason in row.reasons)
        if row.kernel_class:
            yield f"  The claim covers a kernel class: {' = '.join(row.kernel_class)}"
        yield f"  SNR (as published; not what decides): {row_snr(row)}"
        yield from _scores(row)
    unexpected = mismatches(result.environment)
    if unexpected:
        yield from tables.mismatch_warning()
        yield from map(_compared, unexpected)
    yield from ("", "What this cannot tell:")
    yield from (f"  - {caveat}" for caveat in caveats(result))


def _scores(row: RowVerdict) -> Iterator[str]:
    side = max([12, *(len(score.id) for score in row.scores)])
    yield ""
    if row.calibration:
        yield f"  {calibrated(row)}"
    odds = f"{'p, early layers':>17}" if row.calibration else ""
    yield f"  {'Member':<{side}}{'Claim true?':>13}{'Noise floors, all layers':>26}{'Nearest in':>12}{odds}"
    for score in row.scores:
        amount = "identical" if score.bit_identical else floors(score.floors)
        share = f"{score.nearest_in} of {row.references}"
        fits = "yes" if score.fits else "no"
        odds = f"{p_value(score):>17}" if row.calibration else ""
        yield f"  {score.id:<{side}}{fits:>13}{amount:>26}{share:>12}{odds}"


def _environment(differences: Sequence[Difference]) -> Iterator[str]:
    yield from tables.heading("ENVIRONMENT COMPARISON")
    tested = [each for each in differences if each.tested and not each.equal]
    hardware = [
        each
        for each in differences
        if each not in tested and (each.kind == "hardware" or (each.expected and not each.equal))
    ]
    groups = (
        ("Critical dependencies:", [each for each in differences if each not in hardware and each not in tested]),
        ("What the claim or the lineup is about:", tested),
        ("Expected differences (hardware, thread count, replay mode):", hardware),
    )
    for title, group in groups:
        if group:
            yield from ("", title)
            yield from map(_compared, group)


def _compared(each: Difference) -> str:
    sides = (("prover", each.prover), ("verifier", each.verifier))
    return tables.compared(each.name, sides, equal=each.equal, expected=each.expected)


def _lineup(result: CheckResult) -> Iterator[str]:
    yield from tables.heading("LINEUP")
    for member in result.lineup:
        yield f"  {member.id}"
        if member.skipped:
            yield f"      not run: {clean(member.skipped)}"
            continue
        yield f"      run as {claim_of(member.runs_as)}"
        kernels = member.facts.attention_kernels.items() if member.facts else ()
        ran = "; ".join(f"{phase}: {', '.join(names)}" for phase, names in kernels)
        yield f"      {member.seconds:.1f} s{', attention ' + ran if ran else ''}"
    yield ""
    if not result.kernel_classes:
        yield "Kernel classes (bit-identical on this machine): none"
    for members in result.kernel_classes:
        yield f"Kernel class (bit-identical on this machine): {' = '.join(members)}"


def _phase(result: CheckResult, phase: Phase) -> Iterator[str]:
    matrices = headline(result.matrices, phase)
    yield from tables.heading(f"CLAIMED × VERIFIED ({phase.upper()})")
    yield from tables.rows_and_columns(matrices[0].rows, matrices[0].columns)
    for index, reference in enumerate(matrices[0].references):
        yield from ("", f"--- {clean(reference)} ---")
        for matrix in matrices:
            yield from tables.matrix(matrix.signal, matrix.rows, matrix.columns, matrix.per_reference[index])
    yield from tables.heading("AGGREGATE (average across references):")
    for matrix in matrices:
        yield from tables.matrix(matrix.signal, matrix.rows, matrix.columns, matrix.aggregate)
    unfit = [misfits(matrix, result.rows) for matrix in matrices]
    yield from tables.snr_analysis(
        [(each.signal, each) for each in matrices],
        "prover against verifier, same config",
        list(map(scale, matrices, unfit)),
        noted,
    )
    single = layers(result.matrices, phase)
    yield from tables.layer_by_layer([(each.signal, each.layer, each) for each in single])
    yield from _explained(single)
    for matrix, names in zip(matrices, unfit, strict=True):
        yield from tables.pairs(
            matrix.signal,
            phase,
            [(f"{pair.a} vs {pair.b}", pair, pair.same_kernel_class) for pair in matrix.pairwise],
            [pair_scale(pair, names) for pair in matrix.pairwise],
            decisions=[pair_decision(pair, names) for pair in matrix.pairwise],
        )
        if matrix.pairwise:
            yield OVER_ALL_LAYERS
        yield from _explained(matrix.pairwise, any(pair.a in names or pair.b in names for pair in matrix.pairwise))


def _phases_compared(result: CheckResult) -> Iterator[str]:
    shown = [(phase, each.signal, each) for phase in PHASES for each in headline(result.matrices, phase)]
    yield from tables.phases_compared(shown)
    matrices = [each for _, _, each in shown]
    yield from _explained(matrices, any(misfits(each, result.rows) for each in matrices))


def _explained(ratios: Iterable[MatrixReport | PairSnr], unfit: bool = False) -> Iterator[str]:
    """What a table's numbers do not say of themselves."""
    if any(each.snr_infinite for each in ratios):
        yield f"inf: {SAME_KERNELS}"
    if unfit:
        yield NO_SCALE
