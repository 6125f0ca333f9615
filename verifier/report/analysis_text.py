"""An analysis as text, in the shape of the published studies; and the plan's summary of many experiments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fpforensics.common.signals import Phase
from fpforensics.common.words import counted
from fpforensics.verifier.analysis.environment import mismatches
from fpforensics.verifier.analysis.result import Comparison
from fpforensics.verifier.analysis.summary import SummaryRow
from fpforensics.verifier.report import SIGNAL_TITLES, clean, fixed, labelled, snr, tables
from fpforensics.verifier.report.analysis_view import Study
from fpforensics.verifier.report.analysis_words import (
    by_hardware,
    classes,
    diverged,
    figure,
    name_of,
    setting,
    summary_terms,
    values_of,
)

# More of what was not compared than anybody reads; the JSON has it all.
_MOST_LEFT_OUT = 64
_LONGEST_HARDWARE = 40
_LONGEST_ERROR = 100


def render(study: Study) -> str:
    """The whole report of one experiment, or of one against another; every line has been cleaned."""
    return tables.finish(_report(study))


def render_summary(rows: Iterable[SummaryRow]) -> str:
    """The plan's summary table: a row for each file, phase and signal, or for a file and why it was not analyzed."""
    return tables.finish(_summary(rows, files=True))


def _report(study: Study) -> Iterator[str]:
    yield from tables.heading(f"{study.experiment_type.replace('_', ' ').upper()} DETECTABILITY EXPERIMENT")
    yield f"Variable:   {study.variable}"
    yield f"Model:      {study.model}"
    for side in study.sides:
        hardware = ", ".join(side.hardware)
        yield f"{side.role + ':':<11} {side.name}, {counted(len(side.source.configurations), 'config')} on {hardware}"
    yield f"Mode:       {study.mode}"
    yield from (f"⚠ {each}" for each in study.warnings)
    if study.ids_compared:
        yield f"Compared:   {study.ids_compared}"
    for side in study.sides:
        yield from ("", f"{side.role} configurations:")
        for each in side.source.configurations:
            yield f"  {name_of(each.config_id)}: {study.variable}={setting(each)} on {name_of(each.hardware)}"
    yield from _environment(study)
    for phase in study.analysis:
        yield from _phase(study, phase)
        yield from _questions(study, phase)
    yield from tables.phases_compared(
        (phase, signal, cell) for phase, signals in study.analysis.items() for signal, cell in signals.items()
    )
    yield from _summary(study.summary, files=False)


def _environment(study: Study) -> Iterator[str]:
    yield from tables.heading("ENVIRONMENT COMPARISON" if study.observed else "ENVIRONMENT")
    for title, fields in study.environment_groups:
        yield from ("", f"{title}:")
        for each in fields:
            if each.equal or study.observed is not None:
                yield tables.compared(each.name, study.stated(each), equal=each.equal, expected=each.expected)
                continue
            yield f"  {'✓' if each.expected else '✗'} {name_of(each.name)}:"
            yield from (f"      {what}: {whose}" for whose, what in study.stated(each))
    if mismatches(study.environment):
        yield from tables.mismatch_warning()


def _phase(study: Study, phase: Phase) -> Iterator[str]:
    cells = study.analysis[phase]
    first = next(iter(cells.values()))
    rows, columns = tuple(map(name_of, first.configs)), tuple(map(name_of, first.observed_configs))
    yield from tables.heading(f"{study.mode.partition(' (')[0]} COMPARISON ({phase.upper()})")
    yield from tables.rows_and_columns(rows, columns)
    for reference in study.references(phase):
        yield from ("", f"--- {name_of(reference)} ---")
        for signal, cell in cells.items():
            if reference in cell.per_reference:
                yield from tables.matrix(signal, rows, columns, cell.per_reference[reference])
    yield from tables.heading("AGGREGATE (average across references):")
    for signal, cell in cells.items():
        yield from tables.matrix(signal, rows, columns, cell.matrix)
    yield from tables.snr_analysis(list(cells.items()), study.baseline)
    if study.caveat:
        yield from ("", study.caveat)
    yield from ("", "Kernel classes (nothing can tell these configs apart):")
    yield from (f"  {SIGNAL_TITLES[signal]}: {classes(cell)}" for signal, cell in cells.items())
    yield from _not_compared(study, phase)
    yield from _layers(study, phase)
    yield from tables.heading(f"PAIRWISE SNR ANALYSIS ({phase.upper()})")
    yield from ("", "For each pair (A, B): signal = mean of A→B and B→A, noise = mean of A→A and B→B")
    if study.two:
        yield f"A and B are values of {study.variable}; A→B is from the claimed config with A to the observed one with B"
    for signal, cell in cells.items():
        named = [(" vs ".join(names), pair, same_class) for names, pair, same_class in study.named_pairs(cell)]
        yield from tables.pairs(signal, phase, named, what=study.paired)


def _not_compared(study: Study, phase: Phase) -> Iterator[str]:
    found = [*study.not_compared(phase), *(diverged(each, study.two) for each in study.diverged(phase))]
    if found:
        yield from ("", "Not compared:")
    yield from (f"  {said}" for said in found[:_MOST_LEFT_OUT])
    if len(found) > _MOST_LEFT_OUT:
        yield f"  … and {len(found) - _MOST_LEFT_OUT} more: --json has them all"


def _layers(study: Study, phase: Phase) -> Iterator[str]:
    yield from tables.layer_by_layer(
        [
            (signal, layer.removeprefix("layer_"), single)
            for signal, cell in study.analysis[phase].items()
            for layer, single in cell.per_layer.items()
        ]
    )
    found = [each for each in study.layer_summary(phase) if each[2].baseline_l2 is not None]
    if found:
        heads = ("Signal", "Layer", "Baseline L2", "Max Signal L2", "SNR", "Detection")
        lines = [(SIGNAL_TITLES[name], layer.removeprefix("layer_"), *_figures(row)) for name, layer, row in found]
        yield ""
        yield from tables.columns([heads, *lines], "<>>>><")


def _questions(study: Study, phase: Phase) -> Iterator[str]:
    yield from tables.heading(f"FOUR QUESTIONS ({phase.upper()})")
    yield from ("", "1. Is each config reproducible?")
    yield from (f"  {mark} {config}: {found}" for mark, config, found in study.reproducible(phase))
    for number, question in enumerate(study.questions, start=2):
        yield from ("", f"{number}. {question.title}")
        for signal, cell in study.analysis[phase].items():
            comparisons = question.comparisons(cell)
            missing = "" if comparisons else f" — {question.unanswered(cell)}"
            yield from ("", f"{SIGNAL_TITLES[signal]}:{missing}")
            yield from _answer(comparisons, study.two)


def _answer(comparisons: tuple[Comparison, ...], two: bool) -> Iterator[str]:
    named = {each: " vs ".join(map(name_of, each.configs)) for each in comparisons}
    side = max(map(len, named.values()), default=0)
    values = max((len(values_of(each)) for each in comparisons), default=0)
    for hardware, group in by_hardware(comparisons, two):
        yield f"  {hardware}"
        for each in group:
            label = labelled(each.snr, each.snr_infinite)
            ratio = f"{snr(each.snr, each.snr_infinite):>9}  {label}" if label else ""
            yield f"    {named[each]:<{side}}  {values_of(each):<{values}}{fixed(each.distance, 6):>12}{ratio}"


def _summary(rows: Iterable[SummaryRow], files: bool) -> Iterator[str]:
    yield from tables.heading("DETECTABILITY SUMMARY")
    heads = ("Experiment", "Variable", "Phase", "Signal", "Baseline L2", "Max Signal L2", "SNR", "Detection")
    lines = [(*_source(row)[: 2 * files], *_measured(row)) for row in rows]
    yield from tables.columns([(*("File", "Hardware")[: 2 * files], *heads), *lines], "<<" * files + "<<<<>>><")
    yield from ("", *summary_terms())


def _source(row: SummaryRow) -> tuple[str, str]:
    return name_of(row.file), clean(", ".join(row.hardware), _LONGEST_HARDWARE)


def _measured(row: SummaryRow) -> tuple[str, ...]:
    if row.phase is None or row.signal is None:
        return ("—",) * 7 + (f"error: {clean(row.error, _LONGEST_ERROR)}",)
    return (name_of(row.experiment), name_of(row.variable), row.phase, SIGNAL_TITLES[row.signal], *_figures(row))


def _figures(row: SummaryRow) -> tuple[str, str, str, str]:
    baseline, largest = figure(row.baseline_l2), figure(row.max_signal_l2)
    return baseline, largest, snr(row.snr, row.snr_infinite), row.detectability or row.unmeasured or "—"
