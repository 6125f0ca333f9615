"""The error rates of the decision on recorded distances, and where in the layers its power lies.

    bench/decision.py reduce H100-ON-CPU.npz CPU-ON-H100.npz -o tests/assets/h100/distances.npz
    bench/decision.py rates [--verdicts 1000] [--lies 200]
    bench/decision.py picture -o docs/images/layers.png

`reduce` keeps what the others need of two files that `bench/evidence.py replay` wrote; the others read what is kept.
`rates` judges bundles made of these prompts and windows of their positions by the product's own rule and the built-in profile:
honest claims that come out INCONSISTENT, and lies that are caught. One prompt: all of them; several: drawn with replacement.
Among the four kernels over all layers, beside other configs over the early ones. The profile (`bench/honest.py`) holds none
of these prompts.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import multiprocessing
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.pool import Pool as Workers
from pathlib import Path
from typing import Any

import numpy as np
from small import save_small

from fpforensics.common.config import parse_config
from fpforensics.common.signals import Phase
from fpforensics.verifier.calibrated import Calibration, Part
from fpforensics.verifier.collector import kind_of
from fpforensics.verifier.decision import Member, RowVerdict, decide_row
from fpforensics.verifier.distance import Cell
from fpforensics.verifier.exact import Setting
from fpforensics.verifier.pooling import windows
from fpforensics.verifier.profile import Profile, built_in_profile
from fpforensics.verifier.score import EARLY, Scores, scores_of, worth_in_positions

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "assets" / "h100" / "distances.npz"
SDPA, EAGER, ANCHOR = "attn=sdpa,dtype=bf16", "attn=eager", "dtype=fp32"
KERNELS = (SDPA, EAGER, "emulate_tp=2", "emulate_tp=4")
FAR = ("quant=torchao-int8", "quant=bnb-nf4", "dtype=fp16", "wrong-prompt", "model=disturbed")
# What a row is on a machine without its kernels.
OWN = {"attn=sdpa_flash": SDPA, "attn=sdpa_math": SDPA}
PROFILED = ("dtype=fp16", "quant=torchao-int8", "attn=sdpa_flash", "attn=sdpa_math", *KERNELS)
POSITIONS = (1, 3, 16, 64)
CONTROLS = ("wrong-prompt", "model=disturbed")
SAME = (SDPA, "attn=sdpa_math")
ROWS = (*PROFILED, "quant=torchao-int4")
LINEUP = (*KERNELS, "attn=sdpa_math", "dtype=fp16", "quant=torchao-int8")
WHOLE = "claims name the dtype too, as a check does when no claim is given: the float32 anchor contradicts them"
APART = Setting(apart=True, stated="another kind of device")
PREFILL = 64
MODEL = "smollm2-135m"
WEIGHTS = "sha256:a2d61b15b0c52eca4c3b5264cda8173319788c03189d63c8d2898317d6e562d7"


@dataclass(frozen=True)
class Direction:
    """One prover's evidence on one verifier: (rows, members, references, cells, positions)."""

    name: str
    rows: list[str]
    members: list[str]
    cells: list[str]
    evidence: Any
    noise: Any
    phase: Phase = "prefill"

    def own(self, row: str) -> str:
        """The member that the row is; empty if there is none."""
        own = row if row in self.members else OWN.get(row, "")
        return own if own in self.members else ""

    @property
    def prompts(self) -> int:
        """How many there are."""
        return int(self.evidence.shape[2])

    def complete(self, row: str, windows: Sequence[Any]) -> Sequence[int]:
        """The prompts of which every window was recorded."""
        return range(self.prompts)

    def phase_cells(self) -> list[Cell]:
        """What :meth:`means` holds."""
        return [Cell(self.phase, *name.split("/")) for name in self.cells]  # type: ignore[arg-type]

    def windows(self, count: int) -> list[Any]:
        """Windows of so many positions."""
        return [window for window, _ in windows(count, PREFILL)]

    def means(self, row: str, members: Sequence[str], base: str, window: Any) -> tuple[Any, Any]:
        """Over a window: of the evidence (members, references, cells), and of the noise of ``base`` (references, cells)."""
        i, columns = self.rows.index(row), [self.members.index(name) for name in members]
        evidence, noise = self.evidence[i][columns], self.noise[i][self.members.index(base)]
        return evidence[..., window].mean(-1), noise[..., window].mean(-1)

    def parts(self, row: str, window: Any) -> dict[Phase, Tables]:
        """The sums of each phase alone, if there are several."""
        return {}

    def by_position(self, row: str) -> Tables:
        """(members, references, early cells, positions)."""
        i = self.rows.index(row)
        columns = [self.cells.index(f"{key.signal}/{key.layer}") for key in EARLY]
        names = [member for member in self.members if member != ANCHOR]
        members = [self.members.index(name) for name in names]
        evidence, noise = self.evidence[i][:, :, columns], self.noise[i][members][:, :, columns]
        other_weights = [name.startswith(("quant", "model", "wrong")) for name in names]
        noise[other_weights] = np.nan
        return Tables(1, names, evidence[members], noise, evidence[self.members.index(ANCHOR)])

    def tables(self, row: str, window: Any) -> Tables:
        """Sums over a window of positions, (members, references, early cells)."""
        every = self.by_position(row)
        sums = (each[..., window].sum(-1) for each in (every.distances, every.units, every.to_anchor))
        return Tables(window.stop - window.start, every.names, *sums)


@dataclass(frozen=True)
class Tables:
    """What :func:`fpforensics.verifier.score.scores_of` takes, for every reference."""

    width: int
    names: list[str]
    distances: Any
    units: Any
    to_anchor: Any

    def only(self, names: Sequence[str]) -> Tables:
        """The tables of these members."""
        rows = [self.names.index(name) for name in names]
        return Tables(self.width, list(names), self.distances[rows], self.units[rows], self.to_anchor)

    def with_anchor(self) -> Tables:
        """The same with the anchor as a member: of other noise floors than the rest, none of its own."""
        distances = np.concatenate([self.distances, self.to_anchor[None]])
        units = np.concatenate([self.units, np.full_like(self.to_anchor[None], np.nan)])
        return Tables(self.width, [*self.names, ANCHOR], distances, units, self.to_anchor)

    def scores(self, references: Sequence[int], claimed: str = SDPA) -> Scores:
        """What the decision sees of these prompts."""
        claimed = SDPA if claimed.startswith(("quant", *CONTROLS)) else claimed
        drawn = np.array(references)
        worth = worth_in_positions([self.width] * len(drawn))
        named = tuple(f"ref_{each}" for each in drawn)
        tables = self.distances[:, drawn], self.units[:, drawn], self.to_anchor[drawn]
        return scores_of(self.names, claimed, worth, *tables, named)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    reduce_ = commands.add_parser("reduce")
    reduce_.add_argument("files", nargs=2, type=Path)
    reduce_.add_argument("-o", "--output", type=Path, default=DATA)
    rates_ = commands.add_parser("rates")
    rates_.add_argument("--verdicts", type=int, default=1000, help="of each honest row")
    rates_.add_argument("--prompts", type=int, nargs="+", default=[1, 3, 8, 24])
    rates_.add_argument("--lies", type=int, default=200, help="of each lie")
    rates_.add_argument("--positions", type=int, nargs="+", default=[3, 16, 64])
    rates_.add_argument("--jobs", type=int, default=1, help="processes; the figures are the same with any number")
    rates_.add_argument("--whole", action="store_true", help=WHOLE)
    picture_ = commands.add_parser("picture")
    picture_.add_argument("-o", "--output", type=Path, default=ROOT / "docs" / "images" / "layers.png")
    arguments = parser.parse_args()
    if arguments.command == "reduce":
        reduce(arguments.files, arguments.output)
    elif arguments.command == "rates":
        with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool:
            print_rates(
                pool, arguments.positions, arguments.prompts, arguments.verdicts, arguments.lies, arguments.whole
            )
    else:
        draw(load(), arguments.output)


def load(path: Path = DATA) -> list[Direction]:
    with np.load(path) as data:
        return [
            Direction(
                str(name),
                [str(each) for each in data[f"{name}.rows"]],
                [str(each) for each in data[f"{name}.members"]],
                [str(each) for each in data[f"{name}.cells"]],
                expand(data[f"{name}.evidence"]),
                _every_row(expand(data[f"{name}.noise"])),
            )
            for name in data["names"]
        ]


def _every_row(noise: Any) -> Any:
    """The inverse of what :func:`reduce` leaves out."""
    return np.where(np.isnan(noise[1:]), noise[:1], noise[1:])


def reduce(files: Sequence[Path], output: Path) -> None:
    """Prompt positions of the rows and members that verdicts need; every cell for the four kernels, the early ones for the
    rest; logarithms in 16 bits."""
    kept: dict[str, Any] = {"names": np.array([path.stem for path in files])}
    for path in files:
        with np.load(path) as data:
            rows, members, cells = ([str(each) for each in data[key]] for key in ("rows", "members", "cells"))
            i = [index for index, row in enumerate(rows) if row in ROWS]
            j = [index for index, member in enumerate(members) if member in (ANCHOR, *LINEUP, *FAR)]
            rows, members = [rows[index] for index in i], [members[index] for index in j]
            evidence, noise = (data[key][i][:, j][..., :PREFILL] for key in ("evidence", "noise"))
            thin(rows, members, cells, evidence, noise)
            # At prompt positions the members' vectors are the same for every row: only log-probabilities, taken at the row's
            # own ids, differ. Once is enough, where the kernels' late cells are.
            noise = noise[[rows.index(SDPA), *range(len(rows))]]
            noise[1:, :, :, [column for column, cell in enumerate(cells) if "/" in cell]] = np.nan
            kept |= {f"{path.stem}.rows": np.array(rows), f"{path.stem}.members": np.array(members)}
            kept |= {f"{path.stem}.cells": data["cells"]}
            kept |= {f"{path.stem}.evidence": shrink(evidence), f"{path.stem}.noise": shrink(noise)}
    save_small(output, **kept)
    print(f"{output}: {output.stat().st_size} bytes")


def thin(rows: Sequence[str], members: Sequence[str], cells: Sequence[str], evidence: Any, noise: Any) -> None:
    """Take out the cells after the early ones where not both are of the four kernels, and noise that is none."""
    early = [f"{key.signal}/{key.layer}" for key in EARLY]
    late = [column for column, cell in enumerate(cells) if cell not in early]
    for table in (evidence, noise):
        for row, of_row in zip(rows, table, strict=True):
            for member, of_both in zip(members, of_row, strict=True):
                if row not in KERNELS or member not in (*KERNELS, ANCHOR):
                    of_both[:, late] = np.nan
    noise[:, [members.index(each) for each in members if each in CONTROLS]] = np.nan


def shrink(values: Any) -> Any:
    """log2 in steps of 1/128 (a relative error of 0.3 %); 0 and NaN have codes of their own."""
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.rint(np.log2(values) * 128)
    codes = np.where(values == 0, -32767, np.where(np.isnan(values), -32768, codes))
    # High bytes first, then low ones: the file is a fifth smaller.
    whole = codes.astype(np.int16)
    return np.stack([whole >> 8, whole & 255]).astype(np.uint8)


def expand(planes: Any) -> Any:
    codes = planes[0].astype(np.int8).astype(np.int16) * 256 + planes[1]
    values = np.exp2(codes.astype(np.float32) / 128)
    values[codes == -32767] = 0.0
    values[codes == -32768] = np.nan
    return values


def rivals_in(names: Sequence[str], own: str) -> tuple[str, ...]:
    """The members that honest evidence of ``own`` could lie nearer to: all of another kind."""
    return tuple(name for name in names if _kind(name) != _kind(own))


def _kind(name: str) -> str:
    return name if name in CONTROLS else kind_of(parse_config(name))


@dataclass(frozen=True)
class Case:
    """A claim: evidence of ``row`` claimed to be ``claimed``; honest if that is what ran.

    ``whole``: the claim names the dtype too, so that the float32 anchor contradicts it.
    """

    direction: Direction
    row: str
    claimed: str
    whole: bool = False

    @property
    def honest(self) -> bool:
        return self.direction.own(self.row) == self.claimed


def cases(directions: Sequence[Direction]) -> Iterator[Case]:
    for direction in directions:
        for row in direction.rows:
            if row in PROFILED and direction.own(row):
                yield Case(direction, row, direction.own(row))
        among = [row for row in KERNELS if row in direction.rows]
        for row in among:
            for claimed in KERNELS:
                if claimed != row and claimed in direction.members:
                    yield Case(direction, row, claimed)
        for row in ("quant=torchao-int8", "quant=torchao-int4", "dtype=fp16"):
            if row in direction.rows:
                yield Case(direction, row, SDPA)
        for claimed in FAR:
            if claimed in direction.members:
                yield Case(direction, SDPA, claimed)


class Bundles:
    """Bundles of one row, drawn from the recorded prompts, judged as ``verifier check`` judges them."""

    def __init__(self, case: Case, profile: Profile, count: int) -> None:
        self.case, self.profile = case, profile
        direction = case.direction
        # Late cells were kept for the four kernels alone; beside other members the early layers decide.
        among = KERNELS if case.row in KERNELS and case.claimed in KERNELS else LINEUP
        self.members = [name for name in direction.members if name in among or name == case.claimed]
        self.members += [ANCHOR] if case.whole else []
        self.covered = {name for name in self.members if name not in CONTROLS and profile.covers(parse_config(name))}
        if case.claimed in CONTROLS:  # other weights or another prompt behind the words of an honest claim
            self.covered.add(case.claimed)
        self.kinds = {name: _kind(name) for name in self.members}
        base = SDPA if case.claimed.startswith(("quant", *CONTROLS)) else case.claimed
        self.cells = direction.phase_cells()
        self.windows = direction.windows(count)
        self.prompts = direction.complete(case.row, self.windows)
        self.tables = [self._of_members(direction.tables(case.row, window)) for window in self.windows]
        self.phases = [direction.parts(case.row, window) for window in self.windows]
        means = [direction.means(case.row, self.members, base, window) for window in self.windows]
        # (windows, members or nothing, prompts, cells): means over each window
        self.evidence, self.noise = (np.array(each) for each in zip(*means, strict=True))
        self.known = np.flatnonzero(~np.isnan(self.evidence[:, :, self.prompts]).any(axis=(0, 1, 2)))
        self._measured: dict[tuple[int, int, int], dict[Cell, float]] = {}
        self._parts: dict[tuple[int, int], Part] = {}

    def _of_members(self, tables: Tables) -> Tables:
        known = tables.only([name for name in self.members if name != ANCHOR])
        return known.with_anchor() if self.case.whole else known

    def measured(self, window: int, member: int, prompt: int) -> dict[Cell, float]:
        """The distance of one prompt to one member, by cell."""
        key = (window, member, prompt)
        if key not in self._measured:
            values = self.evidence[window, member, prompt]
            self._measured[key] = {self.cells[cell]: float(values[cell]) for cell in self.known}
        return self._measured[key]

    def part(self, window: int, prompt: int) -> Part:
        """One prompt alone."""
        key = (window, prompt)
        if key not in self._parts:
            self._parts[key] = self._part(f"prompt {prompt}", self.tables[window], [prompt])
        return self._parts[key]

    def _part(self, name: str, tables: Tables, drawn: Sequence[int]) -> Part:
        alone = tables.scores(drawn, self.case.claimed)
        pool = self.profile.pool(alone.positions)
        assert pool is not None
        return Part(name, alone, pool)

    def count(self, found: Counter[str], drawn: Sequence[int], window: int) -> None:
        """Add one bundle's outcome; ``nearest``: in the early layers, a member for which the claim holds is the nearest."""
        verdict, distance = self.verdict(drawn, window), self.tables[window].scores(drawn, self.case.claimed).distance
        found[verdict.verdict] += 1
        found["nearest"] += min(distance, key=distance.__getitem__) in verdict.fits
        found["verdicts"] += 1

    def verdict(self, drawn: Sequence[int], window: int) -> RowVerdict:
        """The verdict on the drawn prompts (numbers may repeat: each is a prompt of its own then)."""
        references = [f"ref_{index}" for index in range(len(drawn))]
        claimed = self.case.claimed
        scores = self.tables[window].scores(drawn, claimed)
        pool = self.profile.pool(scores.positions)
        assert pool is not None
        parts = [self.part(window, prompt) for prompt in dict.fromkeys(drawn)] if len(drawn) > 1 else []
        parts += [self._part(phase, self._of_members(of), drawn) for phase, of in self.phases[window].items()]
        fitting = {claimed, *(SAME if claimed in SAME else ())}
        noise = self.noise[window][drawn].mean(0)
        members = [
            Member(
                name,
                name in fitting,
                {
                    reference: self.measured(window, number, prompt)
                    for reference, prompt in zip(references, drawn, strict=True)
                },
            )
            for number, name in enumerate(self.members)
        ]
        return decide_row(
            config_id=claimed,
            claim=claimed,
            members=members,
            noise={self.cells[cell]: float(noise[cell]) for cell in self.known},
            kernel_classes=(SAME,) if set(SAME) <= set(self.members) else (),
            calibration=Calibration(
                scores, pool, self.profile.name, self.covered, wider=(ANCHOR,), kinds=self.kinds, parts=parts
            ),
            setting=APART,
        )


def verdicts(case: Case, profile: Profile, prompts: int, count: int, wanted: int, rng: Any) -> Counter[str]:
    """How many of ``wanted`` resampled bundles come out how; see :meth:`Bundles.count`."""
    bundles = Bundles(case, profile, count)
    found: Counter[str] = Counter()
    for _ in range(wanted):
        drawn = [bundles.prompts[number] for number in rng.integers(0, len(bundles.prompts), prompts)]
        bundles.count(found, drawn, int(rng.integers(len(bundles.windows))))
    return found


def singles(case: Case, profile: Profile, count: int) -> list[Counter[str]]:
    """The same for every prompt alone and each of its windows: nothing is drawn."""
    bundles = Bundles(case, profile, count)
    found = [Counter[str]() for _ in range(case.direction.prompts)]
    for prompt in bundles.prompts:
        for window in range(len(bundles.windows)):
            bundles.count(found[prompt], [prompt], window)
    return found


@dataclass(frozen=True)
class Work:
    """One case's verdicts to count: ``count`` positions of ``prompts`` prompts, ``honest`` or ``lies`` of them drawn."""

    number: int
    count: int
    prompts: int
    honest: int
    lies: int
    whole: bool


@functools.cache
def _loaded() -> tuple[list[Case], Profile]:
    return list(cases(load())), built_in_profile()


def judge(work: Work) -> list[Counter[str]]:
    """:func:`outcomes` of one case of what was recorded."""
    every, profile = _loaded()
    return outcomes(every[work.number], profile, work)


def outcomes(case: Case, profile: Profile, work: Work) -> list[Counter[str]]:
    """By prompt where every prompt stands alone. Seeded by the case: any number of processes gives the same."""
    case = replace(case, whole=work.whole)
    if work.prompts == 1:
        return singles(case, profile, work.count)
    wanted = work.honest if case.honest else work.lies
    rng = np.random.default_rng([work.count, work.prompts, work.number])
    return [verdicts(case, profile, work.prompts, work.count, wanted, rng)]


def print_rates(
    pool: Workers, positions: Sequence[int], sizes: Sequence[int], honest: int, lies: int, whole: bool
) -> None:
    every, _ = _loaded()
    for count, prompts in itertools.product(positions, sizes):
        drawn = "every prompt and window"
        if prompts > 1:
            drawn = f"{honest} drawn for each honest case, {lies} for each lie"
        print(f"\n{prompts} prompts, {count} positions: {drawn}", flush=True)
        asked = [Work(number, count, prompts, honest, lies, whole) for number in range(len(every))]
        print_outcomes(every, pool.imap(judge, asked), prompts)


def print_outcomes(
    every: Sequence[Case], judged: Iterable[list[Counter[str]]], prompts: int
) -> list[list[Counter[str]]]:
    """A line for each case as it comes, and the sums. Returns all."""
    every_outcome: list[list[Counter[str]]] = []
    totals = {True: Counter[str](), False: Counter[str]()}
    for case, alone in zip(every, judged, strict=True):
        found = sum(alone, Counter[str]())
        every_outcome.append(alone)
        if case.honest or (case.row in KERNELS and case.claimed in KERNELS):
            totals[case.honest] += found
        kind = "honest" if case.honest else "lie"
        shares = "  ".join(
            f"{what} {found[what] / found['verdicts']:7.2%}" for what in ("INCONSISTENT", "CONSISTENT", "nearest")
        )
        print(f"  {kind:<7}{case.direction.name:<13}{case.row:<22} claimed {case.claimed:<22} {shares}", flush=True)
    for which, said in ((True, "all honest claims"), (False, "lies among the four kernels")):
        of = totals[which]
        print(f"  {said}: ", end="")
        print(", ".join(f"{what} {of[what] / of['verdicts']:.2%}" for what in ("INCONSISTENT", "CONSISTENT", "nearest")), end="")  # fmt: skip
        print(f" of {of['verdicts']}", end="")
        if which and prompts == 1:
            honest = [alone for case, alone in zip(every, every_outcome, strict=True) if case.honest]
            low, high = over_prompts(honest, np.random.default_rng(0))
            print(f", INCONSISTENT with 95 % over prompts [{low:.2%}, {high:.2%}]", end="")
        print(flush=True)
    return every_outcome


def over_prompts(by_case: Sequence[Sequence[Counter[str]]], rng: Any, draws: int = 10_000) -> tuple[float, float]:
    """A bootstrap interval for the share of INCONSISTENT: prompts are drawn whole, with all their cases and windows."""
    by_prompt = [sum(filter(None, each), Counter[str]()) for each in itertools.zip_longest(*by_case)]
    accused, every = (np.array([found[what] for found in by_prompt]) for what in ("INCONSISTENT", "verdicts"))
    drawn = rng.integers(0, len(accused), (draws, len(accused)))
    low, high = np.quantile(accused[drawn].sum(axis=1) / every[drawn].sum(axis=1), [0.025, 0.975])
    return float(low), float(high)


def accuracy(directions: Sequence[Direction], cell: str, count: int) -> float:
    """Share of single prompts whose nearest of the four kernels is the one that ran."""
    right = total = 0
    for direction in directions:
        column = direction.cells.index(cell)
        members = [direction.members.index(each) for each in KERNELS]
        for true, row in enumerate(KERNELS):
            table = direction.evidence[direction.rows.index(row)][members][:, :, column]
            for window, _ in windows(count, PREFILL):
                nearest = table[..., window].mean(-1).argmin(0)
                right += int((nearest == true).sum())
                total += nearest.size
    return right / total


def draw(directions: Sequence[Direction], output: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cells = [cell for cell in directions[0].cells if cell != "key_vectors/1"]
    names = [cell.replace("hidden_states/", "hidden, block ").replace("key_vectors/", "keys, block ") for cell in cells]
    names = [name.replace("block last", "last block") for name in names]
    table = np.array([[accuracy(directions, cell, count) for count in POSITIONS] for cell in cells])
    order = np.argsort(-table[:, 2])
    figure, axes = pyplot.subplots(figsize=(7.5, 4.6), layout="constrained")
    axes.imshow(table[order], cmap="YlGnBu", vmin=0.25, vmax=1, aspect="auto")
    for y, row in enumerate(order):
        for x, value in enumerate(table[row]):
            axes.text(x, y, f"{value:.2f}", ha="center", va="center", color="white" if value > 0.7 else "black")
    axes.set_xticks(range(len(POSITIONS)), [str(count) for count in POSITIONS])
    axes.set_yticks(range(len(order)), [names[row] for row in order])
    axes.set_xlabel("positions of one prompt")
    axes.set_title("Share of single prompts whose nearest replay is the kernel that ran\n(sdpa, eager, TP 2, TP 4 emulated; H100 against CPU and back; chance 0.25)", fontsize=9)  # fmt: skip
    figure.savefig(output, dpi=150)
    for row in order:
        print(f"{names[row]:<22}" + "".join(f"{value:8.2f}" for value in table[row]))


if __name__ == "__main__":
    main()
