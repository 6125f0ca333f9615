"""The report as text, in the shape of the published studies: environment, matrices, SNR, pairs, verdict."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from fpforensics.common.config import config_id
from fpforensics.common.signals import PHASES, Phase
from fpforensics.verifier.decision import RowVerdict
from fpforensics.verifier.environment_diff import Difference, mismatches
from fpforensics.verifier.matrix import MatrixReport, Table
from fpforensics.verifier.report import (
    SIGNAL_TITLES,
    caveats,
    clean,
    distance,
    floors,
    headline,
    layers,
    row_snr,
    snr,
)

if TYPE_CHECKING:
    from fpforensics.verifier.check import CheckResult

_RULE = "=" * 80
# A matrix wider than this numbers its columns.
_WIDEST = 110
_LONGEST_LINE = 4000
_SIGN = {"CONSISTENT": "✓", "INCONSISTENT": "✗", "INCONCLUSIVE": "?"}


def render(result: CheckResult) -> str:
    """The whole report; every line has been cleaned, and ends with a newline."""
    return "".join(f"{clean(line, _LONGEST_LINE).rstrip()}\n" for line in _report(result))


def _report(result: CheckResult) -> Iterator[str]:
    yield from _heading(f"VERIFICATION (teacher-forcing, {result.mode})")
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
    yield from _verdict(result)


def _heading(title: str) -> Iterator[str]:
    yield from ("", _RULE, title, _RULE)


def _environment(differences: Sequence[Difference]) -> Iterator[str]:
    yield from _heading("ENVIRONMENT COMPARISON")
    hardware = [each for each in differences if each.kind == "hardware" or (each.expected and not each.equal)]
    groups = (
        ("Critical dependencies:", [each for each in differences if each not in hardware]),
        ("Expected differences (hardware):", hardware),
    )
    for title, group in groups:
        yield from ("", title)
        for each in group:
            mark = "✓" if each.equal or each.expected else "✗"
            both = f"prover={clean(each.prover)}, verifier={clean(each.verifier)}"
            yield f"  {mark} {clean(each.name)}: {clean(each.prover) if each.equal else both}"
    if mismatches(tuple(differences)):
        yield from ("", "⚠ ENVIRONMENT MISMATCHES DETECTED")
        yield "  Results may be affected by software differences, not just hardware."


def _lineup(result: CheckResult) -> Iterator[str]:
    yield from _heading("LINEUP")
    for member in result.lineup:
        yield f"  {member.id}"
        if member.skipped:
            yield f"      not run: {clean(member.skipped)}"
            continue
        if member.runs_as != member.config:
            yield f"      run as {config_id(member.runs_as, member.config)}"
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
    yield from _heading(f"CLAIMED × VERIFIED ({phase.upper()})")
    yield "  Rows = claimed config, Cols = verified config"
    yield from (f"  {number:>4} {name}" for name, number in _short_names(matrices[0]).items())
    for index, reference in enumerate(matrices[0].references):
        yield from ("", f"--- {clean(reference)} ---")
        for matrix in matrices:
            yield from _table(matrix, matrix.per_reference[index])
    yield from _heading("AGGREGATE (average across references):")
    for matrix in matrices:
        yield from _table(matrix, matrix.aggregate)
    yield from _heading("SNR ANALYSIS")
    yield from ("", "Diagonal (baseline = prover against verifier, same config):")
    yield from (f"  {_title(each)}: {distance(each.diagonal_mean)}" for each in matrices)
    yield from ("", "Off-diagonal (all pairs):")
    for each in matrices:
        count, ratio = each.off_diagonal_count, snr(each.snr, each.snr_infinite)
        yield f"  {_title(each)} - Count: {count}, Mean: {distance(each.off_diagonal_mean)}, SNR: {ratio}"
    yield from ("", "Off-diagonal (meaningful pairs only, kernel classes excluded):")
    for each in matrices:
        ratio = snr(each.snr_meaningful, each.snr_meaningful_infinite)
        counted = f"Count: {each.meaningful_count}, Mean: {distance(each.meaningful_mean)}, SNR: {ratio}"
        yield f"  {_title(each)} - {counted}{_labels(each)}"
    yield from _layer_by_layer(layers(result.matrices, phase))
    for matrix in matrices:
        yield from _pairs(matrix)


def _title(matrix: MatrixReport) -> str:
    return SIGNAL_TITLES[matrix.signal]


def _labels(matrix: MatrixReport) -> str:
    return f" → {matrix.label} ({matrix.second_label})" if matrix.label else ""


def _short_names(matrix: MatrixReport) -> dict[str, str]:
    """Numbers in place of config ids where a table of ids would be too wide; else nothing."""
    side = max(len(name) for name in matrix.rows)
    if side + sum(max(len(name), 9) + 2 for name in matrix.columns) <= _WIDEST:
        return {}
    names = dict.fromkeys(matrix.columns + matrix.rows)
    return {name: f"[{index}]" for index, name in enumerate(names, start=1)}


def _table(matrix: MatrixReport, values: Table) -> Iterator[str]:
    yield from ("", f"{_title(matrix)} (L2 distance):")
    short = _short_names(matrix)
    heads = [short.get(name, name) for name in matrix.columns]
    sides = [short.get(name, name) for name in matrix.rows]
    widths = [max(len(head), 9) + 2 for head in heads]
    side = max(map(len, sides))
    yield " " * side + _cells(heads, widths)
    for name, row in zip(sides, values, strict=True):
        yield name.rjust(side) + _cells(map(distance, row), widths)


def _cells(cells: Iterable[str], widths: Sequence[int]) -> str:
    return "".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))


def _layer_by_layer(matrices: Sequence[MatrixReport]) -> Iterator[str]:
    if not matrices:
        return
    yield from _subheading("LAYER BY LAYER")
    yield f"{'Signal':<16}{'Layer':>6}{'Diagonal':>12}{'Off-diag.':>12}{'SNR':>10}{'meaningful':>12}"
    for each in matrices:
        means = f"{distance(each.diagonal_mean):>12}{distance(each.off_diagonal_mean):>12}"
        ratios = f"{snr(each.snr, each.snr_infinite):>10}"
        ratios += f"{snr(each.snr_meaningful, each.snr_meaningful_infinite):>12}"
        yield f"{_title(each):<16}{clean(each.layer):>6}{means}{ratios}"


def _subheading(title: str) -> Iterator[str]:
    yield from ("", "-" * 40, title, "-" * 40)


def _pairs(matrix: MatrixReport) -> Iterator[str]:
    if not matrix.pairwise:
        return
    yield from _subheading(f"PAIRWISE SNR SUMMARY TABLE: {_title(matrix).upper()} ({matrix.phase.upper()})")
    names = [f"{pair.a} vs {pair.b}" for pair in matrix.pairwise]
    side = max(32, *(len(name) for name in names))
    yield f"{'Pair':<{side}}{'Signal':>11}{'Noise':>11}{'SNR':>9}"
    yield "-" * (side + 31)
    for name, pair in zip(names, matrix.pairwise, strict=True):
        ratio = snr(pair.snr, pair.snr_infinite, digits=1)
        label = f"  {pair.label} ({pair.second_label})" if pair.label else ""
        same = "  one kernel class" if pair.same_kernel_class else ""
        yield f"{name:<{side}}{distance(pair.signal):>11}{distance(pair.noise):>11}{ratio:>9}{label}{same}"


def _phases_compared(result: CheckResult) -> Iterator[str]:
    yield from _heading("PREFILL vs DECODE COMPARISON")
    for phase in PHASES:
        for each in headline(result.matrices, phase):
            ratio = snr(each.snr_meaningful, each.snr_meaningful_infinite)
            yield f"{phase.capitalize() + ' SNR (meaningful),':<26}{_title(each) + ':':<16}{ratio:>10}"


def _verdict(result: CheckResult) -> Iterator[str]:
    yield from _heading("VERDICT")
    for row in result.rows:
        yield from ("", f"{_SIGN[row.verdict]} {row.config_id}: {row.verdict}", f"  Claim: {row.claim}")
        yield from (f"  - {reason}" for reason in row.reasons)
        if row.kernel_class:
            yield f"  The claim covers a kernel class: {' = '.join(row.kernel_class)}"
        yield f"  SNR, contradicting over fitting: {row_snr(row)}"
        yield from _scores(row)
    yield from ("", "What this cannot tell:")
    yield from (f"  - {caveat}" for caveat in caveats(result))
    yield from ("", f"{_SIGN[result.verdict]} {result.verdict}")


def _scores(row: RowVerdict) -> Iterator[str]:
    side = max(12, *(len(score.id) for score in row.scores))
    yield ""
    yield f"  {'Member':<{side}}{'Claim':>13}{'Noise floors':>14}{'Nearest in':>12}"
    for score in row.scores:
        amount = "identical" if score.bit_identical else floors(score.floors)
        share = f"{score.nearest_in} of {row.references}"
        holds = "holds" if score.fits else "contradicted"
        yield f"  {score.id:<{side}}{holds:>13}{amount:>14}{share:>12}"
