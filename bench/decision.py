"""From recorded distances to the built-in profile, and the error rates of the decision that rests on it.

    bench/decision.py reduce H100-ON-CPU.npz CPU-ON-H100.npz -o tests/assets/h100/distances.npz
    bench/decision.py profile [-o verifier/builtin.json]
    bench/decision.py rates
    bench/decision.py picture -o docs/images/layers.png

`reduce` keeps what the others need of two files that `bench/evidence.py replay` wrote; the others read what is kept.
`rates` resamples prompts and windows of positions into verdicts: honest claims that come out INCONSISTENT, and lies that
are caught. The profile is leave-one-out there: a prompt is never judged by a pool that holds it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from fpforensics.verifier.lanes import ALPHA, test_member
from fpforensics.verifier.pooling import HonestPrompt, make_pool, windows
from fpforensics.verifier.profile import FORMAT, Pool, Profile
from fpforensics.verifier.score import EARLY, Scores, scores_of, worth_in_positions

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "assets" / "h100" / "distances.npz"
SDPA, EAGER, ANCHOR = "attn=sdpa,dtype=bf16", "attn=eager", "dtype=fp32"
KERNELS = (SDPA, EAGER, "emulate_tp=2", "emulate_tp=4")
FAR = ("quant=torchao-int8", "quant=bnb-nf4", "dtype=fp16", "wrong-prompt", "model=disturbed")
# What a row is on a machine without its kernels, and rows that are another row's twin.
OWN = {"attn=sdpa_flash": SDPA, "attn=sdpa_math": SDPA, "attn=sdpa_cudnn": SDPA, "batch=2": SDPA, "batch=4": SDPA}
TWINS = ("attn=sdpa_cudnn", "batch=2", "batch=4")
PROFILED = ("dtype=fp16", "quant=torchao-int8", "attn=sdpa_flash", "attn=sdpa_math", *KERNELS)
POSITIONS = (1, 3, 16, 64)
POOLED = (1, 3, 8, 16, 64)
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

    def own(self, row: str) -> str:
        return row if row in self.members else OWN.get(row, "")

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

    def tables(self, row: str, window: slice) -> Tables:
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

    def scores(self, references: Sequence[int], claimed: str = SDPA) -> Scores:
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
    profile_ = commands.add_parser("profile")
    profile_.add_argument("-o", "--output", type=Path, default=ROOT / "verifier" / "builtin.json")
    rates_ = commands.add_parser("rates")
    rates_.add_argument("--verdicts", type=int, default=1000)
    picture_ = commands.add_parser("picture")
    picture_.add_argument("-o", "--output", type=Path, default=ROOT / "docs" / "images" / "layers.png")
    arguments = parser.parse_args()
    if arguments.command == "reduce":
        reduce(arguments.files, arguments.output)
    elif arguments.command == "profile":
        arguments.output.write_bytes(msgspec.json.encode(build_profile(load())) + b"\n")
        print(f"{arguments.output}: {arguments.output.stat().st_size} bytes")
    elif arguments.command == "rates":
        print_rates(load(), arguments.verdicts)
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
                expand(data[f"{name}.noise"]),
            )
            for name in data["names"]
        ]


def reduce(files: Sequence[Path], output: Path) -> None:
    """Prompt positions only; every cell for the four kernels, the early ones for the rest; float16 logarithms."""
    kept: dict[str, Any] = {"names": np.array([path.stem for path in files])}
    for path in files:
        with np.load(path) as data:
            rows, members, cells = ([str(each) for each in data[key]] for key in ("rows", "members", "cells"))
            early = [cells.index(f"{key.signal}/{key.layer}") for key in EARLY]
            late = [column for column in range(len(cells)) if column not in early]
            evidence, noise = data["evidence"][..., :PREFILL], data["noise"][..., :PREFILL]
            for table in (evidence, noise):
                for i, row in enumerate(rows):
                    for j, member in enumerate(members):
                        if row not in KERNELS or member not in (*KERNELS, ANCHOR):
                            table[i, j][:, late] = np.nan
            drop = [members.index(each) for each in members if each in ("wrong-prompt", "model=disturbed")]
            noise[:, drop] = np.nan
            kept |= {f"{path.stem}.{key}": data[key] for key in ("rows", "members", "cells")}
            kept |= {f"{path.stem}.evidence": shrink(evidence), f"{path.stem}.noise": shrink(noise)}
    np.savez_compressed(output, **kept)
    print(f"{output}: {output.stat().st_size} bytes")


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


def build_profile(directions: Sequence[Direction], without: int | None = None) -> Profile:
    """``without`` leaves one prompt out."""
    return Profile(
        format=FORMAT,
        name="SmolLM2-135M, H100 and x86 CPU",
        created_at="2026-11-22T00:00:00+00:00",
        model=MODEL,
        weights=WEIGHTS,
        prover=("NVIDIA H100 80GB HBM3", "x86 CPU"),
        verifier=("x86 CPU", "NVIDIA H100 80GB HBM3"),
        dtypes=("bf16", "fp16"),
        attentions=("eager", "sdpa", "sdpa_math", "sdpa_flash", "sdpa_cudnn", "sdpa_efficient"),
        quantizations=("none", "torchao-int8"),
        batch_sizes=(1, 2, 4),
        emulated_tensor_parallel=(1, 2, 4),
        matmuls=("native",),
        pools=tuple(build_pool(directions, count, without) for count in POOLED),
    )


def build_pool(directions: Sequence[Direction], count: int, without: int | None) -> Pool:
    return make_pool(list(honest_prompts(directions, without)), count)


def honest_prompts(directions: Sequence[Direction], without: int | None) -> Iterator[HonestPrompt]:
    """Every prompt of every profiled row, each (direction, row, prompt) one of its own."""
    for direction in directions:
        rivals_in = [each for each in direction.members if each not in (ANCHOR, "wrong-prompt", "model=disturbed")]
        for row in direction.rows:
            if row not in PROFILED:
                continue
            own = direction.own(row)
            tables = direction.by_position(row)
            for reference in range(direction.evidence.shape[2]):
                if reference != without:
                    yield HonestPrompt(
                        key=f"{direction.name}/{row}/{reference}",
                        own=own,
                        base=SDPA if own.startswith("quant") else own,
                        rivals=tuple(
                            each for each in rivals_in if each != own and {own, each} != {SDPA, "attn=sdpa_math"}
                        ),
                        names=tuple(tables.names),
                        distances=tables.distances[:, reference],
                        units=tables.units[:, reference],
                        to_anchor=tables.to_anchor[reference],
                    )


@dataclass(frozen=True)
class Case:
    """A claim: evidence of ``row`` claimed to be ``claimed``; honest if that is what ran."""

    direction: Direction
    row: str
    claimed: str

    @property
    def honest(self) -> bool:
        return self.direction.own(self.row) == self.claimed


def cases(directions: Sequence[Direction]) -> Iterator[Case]:
    for direction in directions:
        for row in direction.rows:
            if row in PROFILED:
                yield Case(direction, row, direction.own(row))
        for row in KERNELS:
            for claimed in KERNELS:
                if claimed != row:
                    yield Case(direction, row, claimed)
        for row in ("quant=torchao-int8", "quant=torchao-int4", "dtype=fp16"):
            yield Case(direction, row, SDPA)
        for claimed in FAR:
            if claimed in direction.members:
                yield Case(direction, SDPA, claimed)


def verdicts(case: Case, pools: Sequence[Profile], prompts: int, count: int, wanted: int, rng: Any) -> tuple[int, int]:
    """(rejected, nearest to what is claimed) of ``wanted`` resampled bundles."""
    members = [each for each in case.direction.members if each not in (ANCHOR, "wrong-prompt", "model=disturbed")]
    every = case.direction.evidence.shape[2]
    by_window = [case.direction.tables(case.row, window) for window, _ in windows(count, PREFILL)]
    rejected = nearest = 0
    for _ in range(wanted):
        drawn = rng.integers(0, every, prompts) if prompts < every else rng.permutation(every)
        scores = by_window[rng.integers(len(by_window))].scores(drawn)
        held = {SDPA, "attn=sdpa_math"} if case.claimed in (SDPA, "attn=sdpa_math") else {case.claimed}
        rivals = [each for each in members if each not in held]
        pool = pools[int(drawn[0])].pool(scores.positions)
        assert pool is not None
        rejected += test_member(case.claimed, scores, pool, rivals).rejected(ALPHA)
        nearest += min((*members, case.claimed), key=scores.distance.__getitem__) in held
    return rejected, nearest


def print_rates(directions: Sequence[Direction], wanted: int) -> None:
    rng = np.random.default_rng(0)
    every = directions[0].evidence.shape[2]
    pools = [build_profile(directions, without) for without in range(every)]
    for count in (3, 16, 64):
        for prompts in (1, 3, 8, 24):
            print(f"\n{prompts} prompts, {count} positions")
            honest = [0, 0]
            for case in cases(directions):
                rejected, nearest = verdicts(case, pools, prompts, count, wanted, rng)
                if case.honest:
                    honest[0] += rejected
                    honest[1] += wanted
                low, high = interval(rejected, wanted)
                kind = "honest" if case.honest else "lie"
                print(
                    f"  {kind:<7}{case.direction.name:<13}{case.row:<22} claimed {case.claimed:<22} "
                    f"INCONSISTENT {rejected / wanted:7.3%} [{low:.2%}, {high:.2%}]  nearest {nearest / wanted:7.2%}"
                )
            low, high = interval(*honest)
            print(
                f"  all honest claims: INCONSISTENT {honest[0] / honest[1]:.3%} [{low:.3%}, {high:.3%}] of {honest[1]}"
            )


def interval(hits: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval for a share."""
    z = 1.96
    share = hits / trials
    middle = share + z * z / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return max(0.0, (middle - half) / (1 + z * z / trials)), min(1.0, (middle + half) / (1 + z * z / trials))


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
