"""Parts of an analysis in words, for its text and its page alike. Names come from untrusted files: cleaned and cut here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence

from fpforensics.common.lab.run import Configuration
from fpforensics.common.signals import Signal
from fpforensics.common.words import counted
from fpforensics.verifier.analysis.measure import Member
from fpforensics.verifier.analysis.result import (
    About,
    CellAnalysis,
    Comparison,
    Diverged,
    NotCompared,
    Side,
    Unanswered,
)
from fpforensics.verifier.report import SIGNAL_TITLES, clean, fixed

_LONGEST_NAME = 80
# More references than anybody reads; the JSON has them all.
_MOST_REFERENCES = 8


def name_of(text: object) -> str:
    """An id or a value as a table can hold it."""
    return clean(str(text), _LONGEST_NAME)


def of_side(name: str, side: Side, two: bool) -> str:
    """A name, and which file it is of where there are two: ids may be the same in both."""
    return f"{name_of(name)} ({side})" if two else name_of(name)


def setting(configuration: Configuration) -> str:
    """A config's value of the variable."""
    return value_of(Member(0, configuration).value)


def value_of(value: str) -> str:
    """A value of the variable, which comes as JSON, for people."""
    return name_of(json.loads(value) if value.startswith('"') else value)


def values_of(comparison: Comparison) -> str:
    """The value that both configs have, or from which to which it changes."""
    return " → ".join(dict.fromkeys(map(value_of, comparison.values)))


def by_hardware(comparisons: Sequence[Comparison], two: bool) -> Iterator[tuple[str, list[Comparison]]]:
    """Comparisons of the same hardware together, under its name; ``two`` files are two machines, whatever the name."""
    groups: dict[tuple[str, ...], list[Comparison]] = {}
    for each in comparisons:
        machines = (of_side(name, side, two) for name, side in zip(each.hardware, each.sides, strict=True))
        groups.setdefault(tuple(dict.fromkeys(machines)), []).append(each)
    for hardware, group in groups.items():
        yield " vs ".join(hardware), group


def figure(value: float | None) -> str:
    """A distance in the plan's summary; ``—`` where nothing was measured."""
    return "—" if value is None else fixed(value)


def summary_terms(variable: str = "the variable") -> tuple[str, str]:
    """What the plan's baseline and "max signal" are: not the largest distance of all."""
    return (
        f"Baseline: the mean distance between machines with the same value of {variable}.",
        "Max signal: the largest distance from a machine's first config to another one on that machine.",
    )


def diverged(each: Diverged, two: bool) -> str:
    """Why two runs have no decode distance."""
    one, other = of_side(each.configs[0], "claimed", two), of_side(each.configs[1], "observed", two)
    return f"{one} and {other} diverged at step {each.step} on {name_of(each.reference)}: no decode distance"


def unanswered(each: Unanswered | None, needs: str) -> str:
    """Why a question has no answer; None where no two configs could give one."""
    if each is None:
        return f"not measured, needs {needs}"
    if each.step is None:
        return f"not measured between the {counted(each.pairs, 'pair')} that could answer it: see what was not compared"
    return (
        f"no decode distance, for the tokens diverged, from step {each.step} on at the earliest "
        f"({each.diverged} of {counted(each.pairs, 'pair')})"
    )


def classes(cell: CellAnalysis) -> str:
    """The configs that a matrix cannot tell apart."""
    two = cell.about.observed is not None
    said = [
        (f"{' and '.join(sides)}: " if two else "") + " = ".join(map(name_of, members))
        for members, sides in zip(cell.kernel_classes, cell.kernel_class_sides, strict=True)
    ]
    return "; ".join(said) or "none"


def in_signals(signals: Sequence[Signal]) -> str:
    """Where something is so, if it is not everywhere."""
    return f" in {', '.join(SIGNAL_TITLES[each].lower() for each in signals)}"


def left_out(cells: Mapping[Signal, CellAnalysis]) -> Iterator[str]:
    """What means leave out, said once for all signals of a phase of which it is true."""
    found: dict[tuple[NotCompared, bool], list[Signal]] = {}
    for signal, cell in cells.items():
        for each in cell.not_compared:
            single = any(each not in layer.not_compared for layer in cell.per_layer.values())
            found.setdefault((each, single), []).append(signal)
    for (each, single), signals in found.items():
        where = in_signals(signals) if single or len(signals) < len(cells) else ""
        yield _left_out(each, cells[signals[0]].about) + where + ", not in every layer" * single


def _left_out(each: NotCompared, about: About) -> str:
    source = about.observed if each.side == "observed" and about.observed else about.claimed
    who = of_side(each.config, each.side, about.observed is not None) if each.config else name_of(source.file)
    names = ", ".join(map(name_of, each.references[:_MOST_REFERENCES]))
    if len(each.references) > _MOST_REFERENCES:
        names += f", … ({len(each.references)} in all)"
    if each.reason == "one side":
        return f"{names}: only in {who}, so in no mean"
    if each.reason == "no counterpart":
        return f"{who}: the other file has no config with its {name_of(about.variable)}, so it is off the diagonal only"
    return f"{who}: not measured{f' on {names}, so its means are over the other references' if names else ''}"
