"""Tables of a report as lines of text, in the shape of the published studies; what all kinds of reports share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeAlias

from fpforensics.common.signals import Phase, Signal
from fpforensics.verifier.matrix import MatrixReport, PairSnr, Table
from fpforensics.verifier.report import SIGNAL_TITLES, clean, decided, distance, labelled, snr

if TYPE_CHECKING:
    from fpforensics.verifier.analysis.result import CellAnalysis, PairAnalysis

    Measured: TypeAlias = MatrixReport | CellAnalysis
    MeasuredPair: TypeAlias = PairSnr | PairAnalysis

_RULE = "=" * 80
# A matrix wider than this numbers its columns.
_WIDEST = 110
_DECISION = 24
_LONGEST_LINE = 4000


def finish(lines: Iterable[str]) -> str:
    """The whole report; every line is cleaned, and ends with a newline."""
    return "".join(f"{clean(line, _LONGEST_LINE).rstrip()}\n" for line in lines)


def heading(title: str) -> Iterator[str]:
    """A part's title between two rules."""
    yield from ("", _RULE, title, _RULE)


def subheading(title: str) -> Iterator[str]:
    """A table's title between two short rules."""
    yield from ("", "-" * 40, title, "-" * 40)


def columns(rows: Sequence[Sequence[str]], align: str) -> Iterator[str]:
    """Columns two spaces apart, each aligned as its character of ``align`` says; a rule under the first row."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(align))]
    for index, row in enumerate(rows):
        cells = (f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths, strict=True))
        yield "  ".join(cells)
        if index == 0:
            yield "  ".join("-" * width for width in widths)


def compared(name: str, sides: Sequence[tuple[str, str]], *, equal: bool, expected: bool) -> str:
    """One thing of the environments: ``sides`` are (whose, what), said once if they are equal."""
    mark = "✓" if equal or expected else "✗"
    said = clean(sides[0][1]) if equal else ", ".join(f"{whose}={clean(what)}" for whose, what in sides)
    return f"  {mark} {clean(name)}: {said}"


def mismatch_warning() -> Iterator[str]:
    """Under an environment with unexpected differences."""
    yield from ("", "⚠ ENVIRONMENT MISMATCHES DETECTED")
    yield "  Results may be affected by software differences, not just hardware."


def short_names(rows: Sequence[str], columns: Sequence[str]) -> dict[str, str]:
    """Numbers in place of config ids where a table of ids would be too wide; else nothing."""
    side = max(map(len, rows))
    if side + sum(max(len(name), 9) + 2 for name in columns) <= _WIDEST:
        return {}
    return {name: f"[{index}]" for index, name in enumerate(dict.fromkeys((*columns, *rows)), start=1)}


def rows_and_columns(rows: Sequence[str], columns: Sequence[str]) -> Iterator[str]:
    """What a matrix's rows and columns are, with the legend of numbered configs."""
    yield "  Rows = claimed config, Cols = verified config"
    yield from (f"  {number:>4} {name}" for name, number in short_names(rows, columns).items())


def matrix(signal: Signal, rows: Sequence[str], columns: Sequence[str], values: Table) -> Iterator[str]:
    """One signal's distances."""
    yield from ("", f"{SIGNAL_TITLES[signal]} (L2 distance):")
    short = short_names(rows, columns)
    heads = [short.get(name, name) for name in columns]
    sides = [short.get(name, name) for name in rows]
    widths = [max(len(head), 9) + 2 for head in heads]
    side = max(map(len, sides))
    yield " " * side + _cells(heads, widths)
    for name, row in zip(sides, values, strict=True):
        yield name.rjust(side) + _cells(map(distance, row), widths)


def snr_analysis(
    measured: Sequence[tuple[Signal, Measured]],
    baseline: str,
    meant: Sequence[str] | None = None,
    ratio: Callable[[float | None, bool], str] = snr,
) -> Iterator[str]:
    """Diagonal against off-diagonal. ``baseline`` says what the diagonal is, ``ratio`` prints an SNR, and ``meant`` says for each
    signal what it means, if not the label of its number.
    """
    yield from heading("SNR ANALYSIS")
    yield from ("", f"Diagonal (baseline = {baseline}):")
    yield from (f"  {SIGNAL_TITLES[signal]}: {distance(each.diagonal_mean)}" for signal, each in measured)
    yield from ("", "Off-diagonal (all pairs):")
    for signal, each in measured:
        yield _off_diagonal(signal, each.off_diagonal_count, each.off_diagonal_mean, ratio(each.snr, each.snr_infinite))
    yield from ("", "Off-diagonal (meaningful pairs only, kernel classes excluded):")
    labels = [labelled(each.snr_meaningful, each.snr_meaningful_infinite) for _, each in measured]
    for (signal, each), label in zip(measured, meant or labels, strict=True):
        shown = ratio(each.snr_meaningful, each.snr_meaningful_infinite)
        said = f"{shown} → {label}" if label else shown
        yield _off_diagonal(signal, each.meaningful_count, each.meaningful_mean, said)


def layer_by_layer(measured: Sequence[tuple[Signal, str, Measured]]) -> Iterator[str]:
    """SNR at each signal's single layers; nothing where none was measured."""
    if not measured:
        return
    yield from subheading("LAYER BY LAYER")
    yield f"{'Signal':<16}{'Layer':>6}{'Diagonal':>12}{'Off-diag.':>12}{'SNR':>10}{'meaningful':>12}"
    for signal, layer, each in measured:
        means = f"{distance(each.diagonal_mean):>12}{distance(each.off_diagonal_mean):>12}"
        ratios = f"{snr(each.snr, each.snr_infinite):>10}"
        ratios += f"{snr(each.snr_meaningful, each.snr_meaningful_infinite):>12}"
        yield f"{SIGNAL_TITLES[signal]:<16}{clean(layer):>6}{means}{ratios}"


def pairs(
    signal: Signal,
    phase: Phase,
    named: Sequence[tuple[str, MeasuredPair, bool]],
    meant: Sequence[str] | None = None,
    what: str = "Pair",
    decisions: Sequence[str] | None = None,
) -> Iterator[str]:
    """``named`` are pairs with their names, most detectable first, and whether both are of one kernel class; ``meant`` says for
    each what its SNR means, if not the label of its number; ``what`` says what the names are of; ``decisions`` stand
    for the pairs' own.
    """
    if not named:
        return
    yield from subheading(f"PAIRWISE SNR SUMMARY TABLE: {SIGNAL_TITLES[signal].upper()} ({phase.upper()})")
    side = max(32, len(what) + 1, *(len(name) for name, _, _ in named))
    yield f"{what:<{side}}{'Signal':>11}{'Noise':>11}{'SNR':>9}  {'Decision':<{_DECISION}}"
    yield "-" * (side + 33 + _DECISION)
    labels = [labelled(pair.snr, pair.snr_infinite) for _, pair, _ in named]
    own = [decided(pair.decision) for _, pair, _ in named]
    for (name, pair, same_class), label, decision in zip(named, meant or labels, decisions or own, strict=True):
        ratio = snr(pair.snr, pair.snr_infinite, digits=1)
        said = f"  {label}" * bool(label) + "  one kernel class" * same_class
        numbers = f"{distance(pair.signal):>11}{distance(pair.noise):>11}{ratio:>9}"
        yield f"{name:<{side}}{numbers}  {decision:<{_DECISION}}{said}".rstrip()


def phases_compared(measured: Iterable[tuple[Phase, Signal, Measured]]) -> Iterator[str]:
    """Each signal's SNR in prefill beside the one in decode."""
    yield from heading("PREFILL vs DECODE COMPARISON")
    for phase, signal, each in measured:
        ratio = snr(each.snr_meaningful, each.snr_meaningful_infinite)
        yield f"{phase.capitalize() + ' SNR (meaningful),':<26}{SIGNAL_TITLES[signal] + ':':<16}{ratio:>10}"


def _off_diagonal(signal: Signal, count: int, mean: float | None, ratio: str) -> str:
    return f"  {SIGNAL_TITLES[signal]} - Count: {count}, Mean: {distance(mean)}, SNR: {ratio}"


def _cells(cells: Iterable[str], widths: Sequence[int]) -> str:
    return "".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
