"""Distances between every two configs of one experiment, or of two: reference by reference, cell by cell.

n is the number of configs of both experiments together. A table is (n, n): row to column, 0 on its diagonal,
NaN where two configs could not be compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Literal

import numpy as np

from fpforensics.common.errors import EvidenceError, shorten
from fpforensics.common.lab.run import Configuration, Place, Run, RunSignals, Vectors, same_rows
from fpforensics.common.signals import PHASES, Phase
from fpforensics.verifier.analysis.result import Diverged
from fpforensics.verifier.distance import Cell, Floats, mean_l2, ranked_distances

Canonical = Literal["claimed", "first"]


@dataclass(frozen=True)
class Member:
    """One config of one experiment. ``side`` is an index of :data:`SIDES`."""

    side: int
    configuration: Configuration

    @property
    def id(self) -> str:
        """Its ``config_id``."""
        return self.configuration.config_id

    @property
    def machine(self) -> tuple[int, str]:
        """Whose hardware it ran on: the same name in two experiments may be two machines."""
        return self.side, self.configuration.hardware

    @cached_property
    def value(self) -> str:
        """``variable_value`` as text that is equal where the values are: 1 and 1.0, but not 1 and true."""
        value = self.configuration.variable_value
        return json.dumps(int(value) if isinstance(value, float) and value.is_integer() else value)


class Measurements:
    """Distances between all members, reference by reference.

    ``one_sided`` are, for each side, the references that only it has. ``held`` says which members measured a cell on a
    reference, ``identical`` of a cell, side and config whether its repetitions were equal; ``said`` what the document
    says of repetitions it does not store; ``uncompared`` counts positions without a canonical id on both sides.
    """

    def __init__(self, members: Sequence[Member], one_sided: Sequence[tuple[str, ...]] = ()) -> None:
        self.members = tuple(members)
        self.one_sided = tuple(one_sided)
        self.references: list[str] = []
        self.held: dict[tuple[Cell, str], frozenset[int]] = {}
        self.distances: dict[Cell, dict[str, Floats]] = {}
        self.identical: dict[tuple[Cell, int, str], bool] = {}
        self.said: dict[tuple[int, str], bool] = {}
        self.diverged: list[tuple[int, int, Diverged]] = []
        self.uncompared: dict[tuple[Phase, int, int], int] = {}

    def repeat(self, side: int, first: Run, run: Run) -> None:
        """Compare a repetition with the first one: reproducible means equal in every number."""
        for phase in PHASES:
            a, b = first.phases.get(phase, RunSignals()), run.phases.get(phase, RunSignals())
            for cell, equal in _equalities(phase, a, b):
                key = (cell, side, run.info.config_id)
                self.identical[key] = self.identical.get(key, True) and equal

    def measure(self, reference: str, runs: Sequence[Run | None], canonical: Canonical, top: int) -> None:
        """Distances between every two members on one reference; ``runs`` are the members', None where one is missing."""
        self.references.append(reference)
        present = [(index, run) for index, run in enumerate(runs) if run is not None]
        for index, run in present:
            key = (self.members[index].side, run.info.config_id)
            if run.info.bit_identical is not None:
                self.said[key] = self.said.get(key, True) and run.info.bit_identical
        self._require_same_prompt(reference, present)
        apart = self._find_diverged(reference, present)
        for phase in PHASES:
            measured = [(index, run.phases[phase]) for index, run in present if phase in run.phases]
            skip = apart if phase == "decode" else frozenset()
            with np.errstate(over="ignore"):
                self._measure_vectors(phase, reference, measured, skip)
                self._measure_logprobs(phase, reference, measured, skip, canonical, top)
        for cell, tables in self.distances.items():
            if reference in tables and np.isinf(tables[reference]).any():
                raise EvidenceError(
                    f"{shorten(reference)}, {cell}: a distance is too large for float64",
                    "such numbers are no measurement",
                )

    def _measure_vectors(
        self, phase: Phase, reference: str, measured: Sequence[tuple[int, RunSignals]], skip: frozenset[tuple[int, int]]
    ) -> None:
        for key in dict.fromkeys(key for _, signals in measured for key in signals.vectors):
            holding = [(index, signals.vectors[key]) for index, signals in measured if key in signals.vectors]
            table = self._table(Cell(phase, key[0], key[1]), reference, holding)
            for layout in dict.fromkeys(_layout(vectors) for _, vectors in holding):
                alike = [(index, vectors.values) for index, vectors in holding if _layout(vectors) == layout]
                indices = np.array([index for index, _ in alike])
                table[np.ix_(indices, indices)] = mean_l2([values for _, values in alike])
            for (i, ours), (j, theirs) in combinations(holding, 2):
                if (i, j) in skip:
                    table[i, j] = table[j, i] = np.nan
                else:
                    where = f"{reference}, {phase}, {key[0]}, {key[1]}: {self.members[i].id} and {self.members[j].id}"
                    _require_alike(_layout(ours), _layout(theirs), where)

    def _measure_logprobs(
        self,
        phase: Phase,
        reference: str,
        measured: Sequence[tuple[int, RunSignals]],
        skip: frozenset[tuple[int, int]],
        canonical: Canonical,
        top: int,
    ) -> None:
        ranked = [(index, signals.logprobs) for index, signals in measured if signals.logprobs is not None]
        if not ranked:
            return
        table = self._table(Cell(phase, "logprobs"), reference, ranked)
        for i, ours in ranked:
            table[i, i] = 0.0
            source = ours if canonical == "claimed" else ranked[0][1]
            for j, theirs in ranked:
                if i == j or (min(i, j), max(i, j)) in skip:
                    continue
                where = f"{reference}, {phase}, logprobs: {self.members[i].id} and {self.members[j].id}"
                _require_alike((0, ours.places), (0, theirs.places), where)
                # With diverged tokens the first config may have been elsewhere than these two: then the row's own.
                ids = (
                    source.ids
                    if source.places == ours.places and (min(i, ranked[0][0]), max(i, ranked[0][0])) not in skip
                    else ours.ids
                )
                rows = ranked_distances((ours.ids, ours.logprobs), (theirs.ids, theirs.logprobs), ids[:, :top])
                compared = rows[~np.isnan(rows)]
                self.uncompared[phase, i, j] = self.uncompared.get((phase, i, j), 0) + len(rows) - len(compared)
                if len(compared):
                    table[i, j] = compared.mean()

    def _table(self, cell: Cell, reference: str, holding: Sequence[tuple[int, object]]) -> Floats:
        """A new one, without any distance yet."""
        table = np.full((len(self.members),) * 2, np.nan)
        self.distances.setdefault(cell, {})[reference] = table
        self.held[cell, reference] = frozenset(index for index, _ in holding)
        return table

    def _require_same_prompt(self, reference: str, present: Sequence[tuple[int, Run]]) -> None:
        stated = [(run.info.prompt_sha256, index) for index, run in present if run.info.prompt_sha256]
        for prompt, index in stated:
            if prompt != stated[0][0]:
                one, other = self.members[stated[0][1]].id, self.members[index].id
                raise EvidenceError(
                    f"{shorten(reference)} is another prompt for {shorten(other)} than for {shorten(one)}",
                    "give different prompts different ref_ids",
                )

    def _find_diverged(self, reference: str, present: Sequence[tuple[int, Run]]) -> frozenset[tuple[int, int]]:
        apart = set()
        for (i, ours), (j, theirs) in combinations(present, 2):
            a, b = ours.info.tokens, theirs.info.tokens
            if a is not None and b is not None and a != b:
                step = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
                apart.add((i, j))
                pair = (self.members[i].id, self.members[j].id)
                self.diverged.append((i, j, Diverged(configs=pair, reference=reference, step=step)))
        return frozenset(apart)


def _equalities(phase: Phase, a: RunSignals, b: RunSignals) -> Iterator[tuple[Cell, bool]]:
    for signal, layer in dict.fromkeys((*a.vectors, *b.vectors)):
        ours, theirs = a.vectors.get((signal, layer)), b.vectors.get((signal, layer))
        same = ours is not None and theirs is not None and ours.places == theirs.places
        yield Cell(phase, signal, layer), same and same_rows(ours.values, theirs.values)  # type: ignore[union-attr]
    if a.logprobs is not None or b.logprobs is not None:
        one, other = a.logprobs, b.logprobs
        same = one is not None and other is not None and one.places == other.places
        yield (
            Cell(phase, "logprobs"),
            same and same_rows(one.ids, other.ids) and same_rows(one.logprobs, other.logprobs),  # type: ignore[union-attr]
        )


def _layout(vectors: Vectors) -> tuple[int, tuple[Place, ...]]:
    """Width and places."""
    return vectors.values.shape[1], vectors.places


def _require_alike(a: tuple[int, tuple[Place, ...]], b: tuple[int, tuple[Place, ...]], where: str) -> None:
    if a[0] != b[0]:
        raise EvidenceError(f"{shorten(where, 200)} have {a[0]} and {b[0]} values", "measure the same model")
    if a != b:
        raise EvidenceError(f"{shorten(where, 200)} were measured at different positions", "measure both alike")
