"""An analysis beside the experiments it is of, in the words and groups that its text and its page both print."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from fpforensics.common.lab.reader import Experiment
from fpforensics.common.signals import Phase, Signal
from fpforensics.common.words import counted
from fpforensics.verifier.analysis import Analysis, CellAnalysis
from fpforensics.verifier.analysis.environment import FieldComparison, Kind, compare_configurations
from fpforensics.verifier.analysis.measure import Member
from fpforensics.verifier.analysis.result import SIDES, Asked, Comparison, Diverged, PairAnalysis
from fpforensics.verifier.analysis.summary import SummaryRow, summarize
from fpforensics.verifier.report import SIGNAL_TITLES
from fpforensics.verifier.report.analysis_words import (
    in_signals,
    left_out,
    name_of,
    summary_terms,
    unanswered,
    value_of,
)

_KINDS: tuple[tuple[Kind, str], ...] = (
    ("experiment", "Experiment"),
    ("software", "Critical dependencies"),
    ("parameters", "Fixed parameters"),
    ("hardware", "Expected differences (hardware)"),
)
_REPRODUCIBLE = {True: ("✓", "bit-identical"), False: ("✗", "differs"), None: ("?", "one repetition")}
_Each = TypeVar("_Each")


@dataclass(frozen=True)
class Side:
    """One experiment file; ``role`` is what it is compared as."""

    role: str
    source: Experiment

    @property
    def name(self) -> str:
        """The file's name."""
        return name_of(self.source.name)

    @property
    def hardware(self) -> tuple[str, ...]:
        """Each kind of hardware once."""
        return tuple(map(name_of, _distinct(each.hardware for each in self.source.configurations)))


@dataclass(frozen=True)
class Question:
    """One of the plan's questions that pairs of configs answer; ``needs`` are those that an answer takes."""

    title: str
    needs: str
    name: Asked

    def comparisons(self, cell: CellAnalysis) -> tuple[Comparison, ...]:
        """The answers."""
        answers: tuple[Comparison, ...] = getattr(cell, self.name)
        return answers

    def unanswered(self, cell: CellAnalysis) -> str:
        """Why there is no answer: there are no such configs, or no distance between those that there are."""
        return unanswered(next((each for each in cell.unanswered if each.question == self.name), None), self.needs)


@dataclass(frozen=True)
class Study:
    """What a report of an analysis shows, beside the experiments that it is of."""

    analysis: Analysis
    claimed: Experiment
    observed: Experiment | None

    @property
    def two(self) -> bool:
        """Whether there are two files: then ids alone do not say which one a config is of."""
        return self.observed is not None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What makes a comparison of two files doubtful: it is allowed, as a control, but hardly ever meant."""
        if self.observed is None:
            return ()
        if self.claimed.same_contents(self.observed):
            names = " and ".join(dict.fromkeys(side.name for side in self.sides))
            return (f"{names}: the same contents as claimed and as observed, which says nothing about other hardware",)
        nearest = [
            min(own)
            for signals in self.analysis.values()
            for cell in signals.values()
            for row, line in zip(cell.configs, cell.matrix, strict=True)
            if (own := self._own_distances(row, cell.observed_configs, line))
        ]
        if nearest and not any(nearest):
            return (
                f"each claimed config is bit-identical to an observed one with its {self.variable}: "
                "is one file a copy of the other?",
            )
        return ()

    def _own_distances(self, row: str, columns: Sequence[str], line: Sequence[float | None]) -> list[float]:
        """Those that were measured on the diagonal."""
        return [
            value for column, value in zip(columns, line, strict=True) if value is not None and self.is_own(row, column)
        ]

    @property
    def sides(self) -> tuple[Side, ...]:
        """The claimed file and the observed one, or the one that is compared with itself."""
        if self.observed is None:
            return (Side("Experiment", self.claimed),)
        return Side("Claimed", self.claimed), Side("Observed", self.observed)

    @property
    def experiment_type(self) -> str:
        """What kind of experiment this is."""
        return name_of(self.claimed.metadata["experiment_type"])

    @property
    def variable(self) -> str:
        """The name of what is varied."""
        return name_of(self.claimed.metadata["variable_tested"])

    @property
    def model(self) -> str:
        """The model, or both where the files name different ones."""
        return " / ".join(
            map(name_of, _distinct(each.source.metadata.get("model", "not stated") for each in self.sides))
        )

    @property
    def mode(self) -> str:
        """Two files are two machines, even with the same hardware."""
        if self.observed is not None:
            return "CROSS-HARDWARE"
        kinds = len(self.sides[0].hardware)
        return "WITHIN-HARDWARE" if kinds == 1 else f"WITHIN ONE FILE ({kinds} kinds of hardware)"

    @property
    def baseline(self) -> str:
        """What a matrix's diagonal is."""
        return "one config with itself" if self.observed is None else f"cross-hardware, same {self.variable}"

    @property
    def caveat(self) -> str:
        """What a matrix's SNR does not say, or nothing."""
        if self.observed is not None:
            return ""
        return "A file compared with itself has a zero diagonal: any difference makes these SNRs infinite."

    @property
    def ids_compared(self) -> str:
        """Which log-probabilities are compared, or nothing where none were measured."""
        if not any("logprobs" in signals for signals in self.analysis.values()):
            return ""
        about = next(cell.about for signals in self.analysis.values() for cell in signals.values())
        listed = "the first config" if about.canonical == "first" else "each claimed config"
        return f"log-probabilities of the first {about.top} ids that {listed} lists (canonical: {about.canonical})"

    @cached_property
    def environment(self) -> tuple[FieldComparison, ...]:
        """What the configurations state, side by side."""
        return compare_configurations(self.claimed, self.observed)

    @property
    def environment_groups(self) -> Iterator[tuple[str, list[FieldComparison]]]:
        """With their titles, those that are not empty."""
        for kind, title in _KINDS:
            if group := [each for each in self.environment if each.kind == kind]:
                yield title, group

    def stated(self, field: FieldComparison) -> list[tuple[str, str]]:
        """(whose, what) of one field: the two files', or each value's configs where those of one file differ."""
        if self.observed is None and len(field.claimed) > 1:
            return [(", ".join(map(name_of, each.configs)), name_of(each.value)) for each in field.claimed]
        sides = zip(("claimed", "observed"), (field.claimed, field.observed), strict=True)
        return [(role, ", ".join(name_of(each.value) for each in values)) for role, values in sides if values]

    def references(self, phase: Phase) -> tuple[str, ...]:
        """Every reference of which some signal of the phase was measured."""
        return _distinct(name for cell in self.analysis[phase].values() for name in cell.per_reference)

    def is_own(self, row: str, column: str) -> bool:
        """Whether an entry is on the diagonal."""
        if self.observed is None:
            return row == column
        return self._values[0].get(row) == self._values[1].get(column)

    @property
    def paired(self) -> str:
        """What pairs are of: configs of one file, or values of the variable, each of them a config in both files."""
        return f"Pair of {self.variable}" if self.two else "Pair"

    def named_pairs(self, cell: CellAnalysis) -> list[tuple[tuple[str, str], PairAnalysis, bool]]:
        """Each pair's names, itself, and whether both are of one kernel class."""
        classes = [
            {self._values[SIDES.index(side)][config] if self.two else config for config in members}
            for members, sides in zip(cell.kernel_classes, cell.kernel_class_sides, strict=True)
            for side in sides
        ]
        found = []
        for each in cell.pairwise:
            keys = each.values if self.two else each.pair
            same_class = any(members.issuperset(keys) for members in classes)
            one, other = map(value_of if self.two else name_of, keys)
            found.append(((one, other), each, same_class))
        return found

    def reproducible(self, phase: Phase) -> Iterator[tuple[str, str, str]]:
        """The plan's first question for each config: a mark, its name and what was found, by signal where they differ."""
        signals = self.analysis[phase]
        for config in _distinct(config for cell in signals.values() for config in cell.reproducible):
            found: dict[bool | None, list[Signal]] = {}
            for signal, cell in signals.items():
                if config in cell.reproducible:
                    found.setdefault(cell.reproducible[config], []).append(signal)
            worst = next(state for state in (False, None, True) if state in found)
            said = [
                f"{_REPRODUCIBLE[state][1]}{in_signals(names) if len(found) > 1 else ''}"
                for state, names in found.items()
            ]
            holding = " and ".join(side for side, values in zip(SIDES, self._values, strict=False) if config in values)
            yield _REPRODUCIBLE[worst][0], name_of(config) + f" ({holding})" * self.two, "; ".join(said)

    @property
    def questions(self) -> tuple[Question, ...]:
        """The plan's second to fourth question."""
        return (
            Question(
                f"How far apart is other hardware with the same {self.variable}? (the baseline)",
                f"one {self.variable} on two machines",
                "cross_hardware_baseline",
            ),
            Question(
                f"Is another {self.variable} seen within one hardware? (against its first config)",
                f"two values of {self.variable} on one machine",
                "within_hardware",
            ),
            Question(
                f"Is another {self.variable} seen across hardware? (against the other one's first config)",
                f"two values of {self.variable}, each on another machine",
                "across_hardware",
            ),
        )

    def diverged(self, phase: Phase) -> tuple[Diverged, ...]:
        """Pairs without a decode distance, whatever the signal."""
        return _distinct(each for cell in self.analysis[phase].values() for each in cell.diverged)

    def not_compared(self, phase: Phase) -> Iterator[str]:
        """What means leave out, but for diverged pairs: what one side lacks, and log-probabilities of other ids."""
        yield from left_out(self.analysis[phase])
        for signal, cell in self.analysis[phase].items():
            if cell.uncompared:
                yield (
                    f"{SIGNAL_TITLES[signal]}: {counted(cell.uncompared, 'position')} not compared, "
                    "for none of the canonical ids was listed on both sides"
                )

    @property
    def summary_terms(self) -> tuple[str, str]:
        """What the summary's figures are."""
        return summary_terms(self.variable)

    @cached_property
    def summary(self) -> tuple[SummaryRow, ...]:
        """The plan's summary of each phase and signal."""
        return tuple(summarize(self.claimed, self.analysis))

    def layer_summary(self, phase: Phase) -> list[tuple[Signal, str, SummaryRow]]:
        """The plan's summary of each signal's single layers, with their names."""
        return [
            (signal, layer, row)
            for signal, cell in self.analysis[phase].items()
            for layer, single in cell.per_layer.items()
            for row in summarize(self.claimed, {phase: {signal: single}})
        ]

    @cached_property
    def _values(self) -> list[dict[str, str]]:
        """The variable's value of each side's configs."""
        return [
            {each.config_id: Member(index, each).value for each in side.source.configurations}
            for index, side in enumerate(self.sides)
        ]


def _distinct(values: Iterable[_Each]) -> tuple[_Each, ...]:
    return tuple(dict.fromkeys(values))
