"""Prompts that nothing was tuned on, other kinds of text than the profile's: how often whole verdicts on them are wrong.

    bench/fresh.py documents -o FOLDER              the texts: Python's language reference, and the source of its argparse
    bench/fresh.py reduce FILE… -o tests/assets/h100/fresh.npz
    bench/fresh.py rates [--verdicts 1000] [--lies 200]
    bench/fresh.py modes

How the files were made: `bench/evidence.py record --documents` with the two texts, so that prompts are in turn prose and code; with
`--new-tokens 1` for `prompts-…`, with many for `generated-…`; then `bench/evidence.py replay --windows` on the other device.
`decode-…` are replays in decode mode of the first few prompts. A file of some of the members only has one more word in its name:
`prompts-gpu-on-cpu.a.npz` and `.b.npz` become one. `reduce` keeps what the others need.

`rates` judges as `bench/decision.py` does, on three kinds of positions: those of prompts, generated ones, and half and half.
`modes` compares the two ways to replay on the same evidence. Neither the texts nor the prompts went into the profile or its rules.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import itertools
import multiprocessing
import pydoc_data.topics
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.pool import Pool as Workers
from pathlib import Path
from typing import Any

import decision
import numpy as np
from evidence import COUNTS, windows_of
from small import save_small

from fpforensics.common.signals import PHASES, Phase
from fpforensics.verifier.distance import Cell
from fpforensics.verifier.lanes import margin_of
from fpforensics.verifier.profile import Profile, built_in_profile

DATA = decision.ROOT / "tests" / "assets" / "h100" / "fresh.npz"
KINDS = ("prompt", "generated", "mixed")
TEXTS = ("prose", "code")
JUDGED, HALVES = (3, 16, 64), (8, 32)
"""Positions that verdicts are counted at, and those that one of two phases gives to them."""
COMPARED = (3, 16)
"""Positions that the ways to replay are compared at."""


@dataclass(frozen=True)
class Windowed(decision.Direction):
    """The same with windows in place of positions: each is its mean, ``widths`` how many positions it holds."""

    widths: tuple[int, ...] = ()

    def complete(self, row: str, windows: Sequence[int]) -> list[int]:
        """Those that did not end earlier."""
        every = self.by_position(row)
        measured = np.concatenate([every.distances, every.to_anchor[None]])[..., list(windows)]
        return [int(prompt) for prompt in np.flatnonzero(~np.isnan(measured).any(axis=(0, 2, 3)))]

    def windows(self, count: int) -> list[int]:
        """Their numbers."""
        return [number for number, width in enumerate(self.widths) if width == count]

    def means(self, row: str, members: Sequence[str], base: str, window: int) -> tuple[Any, Any]:
        """One window alone."""
        i, columns = self.rows.index(row), [self.members.index(name) for name in members]
        return self.evidence[i][columns][..., window], self.noise[i][self.members.index(base)][..., window]

    def tables(self, row: str, window: int) -> decision.Tables:
        """Sums, from the mean and the number of positions."""
        every, width = self.by_position(row), self.widths[window]
        sums = (each[..., window] * width for each in (every.distances, every.units, every.to_anchor))
        return decision.Tables(width, every.names, *sums)

    def first(self, count: int, rows: Sequence[str], members: Sequence[str]) -> Windowed:
        """The same of the first prompts, of some rows and members."""
        i, j = ([own.index(name) for name in names] for own, names in ((self.rows, rows), (self.members, members)))
        evidence, noise = (each[i][:, j][:, :, :count] for each in (self.evidence, self.noise))
        return replace(self, rows=list(rows), members=list(members), evidence=evidence, noise=noise)


@dataclass(frozen=True)
class Mixed(decision.Direction):
    """Half of the positions from the prompt, half of them generated."""

    halves: tuple[Windowed, ...] = ()

    def complete(self, row: str, windows: Sequence[int]) -> list[int]:
        """Those of which both halves are."""
        first, second = (set(half.complete(row, windows)) for half in self.halves)
        return sorted(first & second)

    def phase_cells(self) -> list[Cell]:
        """Of either phase."""
        return [cell for half in self.halves for cell in half.phase_cells()]

    def windows(self, count: int) -> list[int]:
        """Pairs of windows of half as many positions."""
        if count % 2:
            return []
        first, second = (half.windows(count // 2) for half in self.halves)
        return [window for window in first if window in second]

    def means(self, row: str, members: Sequence[str], base: str, window: int) -> tuple[Any, Any]:
        """Cells of the prompt, then the generated ones."""
        evidence, noise = zip(*(half.means(row, members, base, window) for half in self.halves), strict=True)
        return np.concatenate(evidence, -1), np.concatenate(noise, -1)

    def parts(self, row: str, window: int) -> dict[Phase, decision.Tables]:
        """Either half."""
        return {half.phase: half.tables(row, window) for half in self.halves}

    def tables(self, row: str, window: int) -> decision.Tables:
        """Both together."""
        one, other = self.parts(row, window).values()
        sums = (getattr(one, each) + getattr(other, each) for each in ("distances", "units", "to_anchor"))
        return decision.Tables(one.width + other.width, one.names, *sums)


@dataclass(frozen=True)
class Work(decision.Work):
    """The same on one kind of positions of what a file holds."""

    kind: str
    data: Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    documents_ = commands.add_parser("documents")
    documents_.add_argument("-o", "--output", type=Path, required=True)
    reduce_ = commands.add_parser("reduce")
    reduce_.add_argument("files", nargs="+", type=Path)
    reduce_.add_argument("-o", "--output", type=Path, default=DATA)
    rates_ = commands.add_parser("rates")
    rates_.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    rates_.add_argument("--verdicts", type=int, default=1000, help="of each honest row")
    rates_.add_argument("--prompts", type=int, nargs="+", default=[1, 3, 8, 24])
    rates_.add_argument("--lies", type=int, default=200, help="of each lie")
    rates_.add_argument("--positions", type=int, nargs="+", default=list(JUDGED))
    rates_.add_argument("--jobs", type=int, default=1, help="processes; the figures are the same with any number")
    rates_.add_argument("--whole", action="store_true", help=decision.WHOLE)
    modes_ = commands.add_parser("modes")
    for command in (rates_, modes_):
        command.add_argument("--data", type=Path, default=DATA)
    arguments = parser.parse_args()
    if arguments.command == "documents":
        documents(arguments.output)
    elif arguments.command == "reduce":
        reduce(arguments.files, arguments.output)
    elif arguments.command == "modes":
        print_modes(arguments.data)
    else:
        with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool:
            for kind, count, prompts in itertools.product(arguments.kinds, arguments.positions, arguments.prompts):
                work = Work(
                    0, count, prompts, arguments.verdicts, arguments.lies, arguments.whole, kind, arguments.data
                )
                print_rates(pool, work)


def documents(folder: Path) -> None:
    """Two texts that come with Python: prose and code."""
    folder.mkdir(parents=True, exist_ok=True)
    prose = "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    for name, text in (("language-reference", prose), ("standard-library", inspect.getsource(argparse))):
        path = folder / f"{name}.txt"
        path.write_text(text, encoding="utf-8")
        print(f"{path}: {len(text)} characters, Python {sys.version.split()[0]}")


def reduce(files: Sequence[Path], output: Path) -> None:
    """The files by the first word of their names; every cell for the four kernels, the early ones for the rest."""
    grouped: dict[str, list[Path]] = {}
    for path in files:
        grouped.setdefault(path.name.split(".")[0], []).append(path)
    kept: dict[str, Any] = {"names": np.array(list(grouped))}
    for name, paths in grouped.items():
        kept |= {f"{name}.{key}": value for key, value in merged(paths).items()}
    save_small(output, **kept)
    print(f"{output}: {output.stat().st_size} bytes")


def merged(paths: Sequence[Path]) -> dict[str, Any]:
    """One file's arrays from several that hold other members of the same rows and prompts."""
    opened = [dict(np.load(path)) for path in paths]
    rows, cells = ([str(each) for each in opened[0][key]] for key in ("rows", "cells"))
    place: dict[str, tuple[int, int]] = {}
    for number, data in enumerate(opened):
        if any(list(data[key]) != list(opened[0][key]) for key in ("rows", "cells")):
            raise SystemExit(f"{paths[number]} holds other rows or cells than {paths[0]}")
        one, other = (
            each["prefill.evidence"][:, list(each["members"]).index(decision.ANCHOR)] for each in (data, opened[0])
        )
        if one.shape != other.shape or np.isclose(one, other, rtol=1e-2, equal_nan=True).mean() < 0.99:
            raise SystemExit(f"{paths[number]} holds other evidence than {paths[0]}: it lies elsewhere from the anchor")
        for column, member in enumerate(data["members"]):
            place.setdefault(str(member), (number, column))
    members = [name for name in place if name in (decision.ANCHOR, *decision.LINEUP, *decision.FAR)]
    kept: dict[str, Any] = {"rows": np.array(rows), "members": np.array(members), "cells": opened[0]["cells"]}
    alone = any(np.isnan(opened[0][f"{phase}.evidence"]).all() for phase in PHASES)
    for phase in PHASES:
        evidence, noise = (
            np.stack([opened[place[name][0]][f"{phase}.{each}"][:, place[name][1]] for name in members], axis=1)
            for each in ("evidence", "noise")
        )
        if np.isnan(evidence).all():
            continue
        decision.thin(rows, members, cells, evidence, noise)
        widths = np.array(widths_of(evidence.shape[-1]))
        judged = np.isin(widths, JUDGED if alone else (*JUDGED, *HALVES))
        kept |= {f"{phase}.evidence": decision.shrink(evidence[..., judged])}
        kept |= {f"{phase}.noise": decision.shrink(noise[..., judged]), f"{phase}.widths": widths[judged]}
    return kept


def widths_of(number: int) -> tuple[int, ...]:
    """How many positions each of so many windows holds."""
    every = (windows_of(length) for length in range(2 * max(COUNTS) + 1))
    return next(tuple(width for width, _ in found) for found in every if len(found) == number)


@functools.cache
def load(path: Path = DATA) -> dict[str, dict[Phase, Windowed]]:
    """What was kept of each file, by phase."""
    found: dict[str, dict[Phase, Windowed]] = {}
    with np.load(path) as data:
        for name in map(str, data["names"]):
            rows, members, cells = (
                [str(each) for each in data[f"{name}.{key}"]] for key in ("rows", "members", "cells")
            )
            found[name] = {}
            for phase in PHASES:
                if f"{name}.{phase}.evidence" not in data:
                    continue
                evidence, noise = (decision.expand(data[f"{name}.{phase}.{key}"]) for key in ("evidence", "noise"))
                direction, widths = name.split("-", 1)[1], tuple(data[f"{name}.{phase}.widths"].tolist())
                found[name][phase] = Windowed(direction, rows, members, cells, evidence, noise, phase, widths)
    return found


def directions(recorded: Mapping[str, Mapping[Phase, Windowed]], kind: str) -> Iterator[decision.Direction]:
    """What there is of one kind of positions."""
    for name, phases in recorded.items():
        if kind == "prompt" and name.startswith("prompts-"):
            yield phases["prefill"]
        elif kind == "generated" and name.startswith("generated-"):
            yield phases["decode"]
        elif kind == "mixed" and name.startswith("generated-"):
            prompt = phases["prefill"]
            own = prompt.name, prompt.rows, prompt.members, prompt.cells, prompt.evidence, prompt.noise
            yield Mixed(*own, halves=(prompt, phases["decode"]))


@functools.cache
def _loaded(path: Path, kind: str) -> tuple[list[decision.Case], Profile]:
    return list(decision.cases(list(directions(load(path), kind)))), built_in_profile()


def judge(work: Work) -> list[Counter[str]]:
    """:func:`decision.outcomes` of one case."""
    every, profile = _loaded(work.data, work.kind)
    return decision.outcomes(every[work.number], profile, work)


def print_rates(pool: Workers, work: Work) -> None:
    """One kind, number of positions and number of prompts; nothing where more prompts are asked for than there are."""
    every, _ = _loaded(work.data, work.kind)
    if not every or any(
        not each.direction.windows(work.count) or each.direction.prompts < work.prompts for each in every
    ):
        return
    print(f"\n{work.kind} positions: {work.count} of {work.prompts} prompts", flush=True)
    asked = [replace(work, number=number) for number in range(len(every))]
    found = decision.print_outcomes(every, pool.imap(judge, asked), work.prompts)
    other = [
        sum(alone, Counter[str]())
        for case, alone in zip(every, found, strict=True)
        if not (case.honest or {case.row, case.claimed} <= set(decision.KERNELS))
    ]
    print_share("other lies", sum(other, Counter[str]()))
    if work.prompts == 1:
        honest = [alone for case, alone in zip(every, found, strict=True) if case.honest]
        for start, text in enumerate(TEXTS):
            of_text = (each for alone in honest for each in alone[start :: len(TEXTS)])
            print_share(f"honest claims, {text}", sum(of_text, Counter[str]()))


def print_share(said: str, found: Counter[str]) -> None:
    """How many came out how."""
    shares = (f"{what} {found[what] / found['verdicts']:.2%}" for what in ("INCONSISTENT", "CONSISTENT"))
    print(f"  {said}: {', '.join(shares)} of {found['verdicts']}", flush=True)


def print_modes(path: Path) -> None:
    """How honest evidence lies to its replays in either mode, prompt by prompt."""
    recorded = load(path)
    for name, phases in recorded.items():
        kind, _, direction = name.partition("-")
        if kind != "decode":
            continue
        others = recorded[f"{'generated' if 'decode' in phases else 'prompts'}-{direction}"]
        for (phase, one), count in itertools.product(phases.items(), COMPARED):
            rows = [row for row in decision.KERNELS if row in one.rows and row in one.members]
            members = [decision.ANCHOR, *(each for each in decision.KERNELS if each in one.members)]
            print(f"\n{direction}, {one.prompts} prompts, {count} {phase} positions; median (least to most)")
            for row, (mode, of) in itertools.product(rows, (("prefill", others[phase]), ("decode", one))):
                found = alone(of.first(one.prompts, rows, members), row, count)
                floors, margins = (
                    f"{np.median(each):.3f} ({min(each):.3f} to {max(each):.3f})"
                    for each in (found.floors, found.margins)
                )
                print(f"  {row:<22} replayed in {mode:<8} {floors} floors, margin {margins}, {found.said}", flush=True)


@dataclass(frozen=True)
class Alone:
    """Honest windows of single prompts: floors from their own replay, log margins over the nearest rival, how many are rejected."""

    floors: list[float]
    margins: list[float]
    rejected: int

    @property
    def said(self) -> str:
        """How many of them."""
        return f"{self.rejected} of {len(self.floors)} rejected"


def alone(direction: Windowed, row: str, count: int) -> Alone:
    """Every prompt and window of one honest row."""
    bundles = decision.Bundles(decision.Case(direction, row, row), built_in_profile(), count)
    rivals = decision.rivals_in(bundles.members, row)
    windows = list(itertools.product(bundles.prompts, range(len(bundles.windows))))
    scores = [bundles.tables[window].scores([prompt], row) for prompt, window in windows]
    return Alone(
        [each.floors[row] for each in scores],
        [margin_of(each.distance, [row], rivals) if rivals else np.nan for each in scores],
        sum(bundles.verdict([prompt], window).verdict == "INCONSISTENT" for prompt, window in windows),
    )


if __name__ == "__main__":
    main()
