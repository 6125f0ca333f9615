"""The built-in profile: what honest prompts measure across hardware, and how often the lanes reject them.

    bench/honest.py reduce GPU-ON-CPU.npz CPU-ON-GPU.npz -o tests/assets/h100/honest.npz
    bench/honest.py profile [-o verifier/builtin.json]
    bench/honest.py rates

`reduce` scores windows of every honest prompt in files that `bench/evidence.py replay --early` wrote, but for the first 24
prompts, which `bench/decision.py` holds out; `profile` and `rates` read what it kept. The unit is the prompt: one text under
several configs and directions counts as one. `rates` are cross-validated: ten parts of the prompts, each judged by pools of the other nine.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import decision
import msgspec
import numpy as np
from small import save_small

from fpforensics.verifier.lanes import ALPHA, LANES
from fpforensics.verifier.pooling import HonestPrompt, HonestScore, pool_of, window_scores
from fpforensics.verifier.profile import FORMAT, Pool, Profile

DATA = decision.ROOT / "tests" / "assets" / "h100" / "honest.npz"
PROFILE = decision.ROOT / "verifier" / "builtin.json"
COUNTS = (1, 3, 8, 16, 64)
"""Positions that get a pool."""
MOST_WINDOWS = 2
HELD_OUT = 24
STEP = 1e-3
"""Scores are kept to this step."""
FOLDS = 10


@dataclass(frozen=True)
class Honest:
    """``scores`` (rows, counts, prompts, windows, 3 numbers of a :class:`HonestScore`), NaN where there is none."""

    rows: list[str]
    scores: Any

    def prompts(self) -> range:
        """The prompts by number."""
        return range(self.scores.shape[2])

    def pool(self, count: int, prompts: Collection[int]) -> Pool:
        """The pool of every row's windows of ``count`` positions."""
        return pool_of(count, self._keyed(COUNTS.index(count), prompts))

    def _keyed(self, column: int, prompts: Collection[int]) -> Iterator[tuple[str, HonestScore]]:
        for prompt in prompts:
            for floors, noise, margin in self.scores[:, column, prompt].reshape(-1, 3).tolist():
                if floors == floors:
                    yield str(prompt), HonestScore(floors, noise, margin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    reduce_ = commands.add_parser("reduce")
    reduce_.add_argument("files", nargs="+", type=Path)
    reduce_.add_argument("-o", "--output", type=Path, default=DATA)
    profile_ = commands.add_parser("profile")
    profile_.add_argument("-o", "--output", type=Path, default=PROFILE)
    commands.add_parser("rates")
    arguments = parser.parse_args()
    if arguments.command == "reduce":
        reduce(arguments.files, arguments.output)
    elif arguments.command == "profile":
        arguments.output.write_bytes(msgspec.json.encode(build_profile(load())) + b"\n")
        print(f"{arguments.output}: {arguments.output.stat().st_size} bytes")
    else:
        print_rates(load())


def load(path: Path = DATA) -> Honest:
    with np.load(path) as data:
        steps = data["scores"].astype(np.float64)
        steps[data["scores"] == np.iinfo(np.int16).min] = np.nan
        return Honest([str(row) for row in data["rows"]], steps * STEP)


def reduce(files: Sequence[Path], output: Path) -> None:
    rows, scores = [], []
    for path in files:
        direction = read_direction(path)
        for row in direction.rows:
            print(f"{path.stem} {row}", flush=True)
            rows.append(f"{path.stem}/{row}")
            scores.append(row_scores(direction, row))
    steps = np.rint(np.array(scores) / STEP)
    codes = np.where(np.isnan(steps), np.iinfo(np.int16).min, np.clip(steps, -32000, 32000)).astype(np.int16)
    save_small(output, rows=np.array(rows), scores=codes)
    print(f"{output}: {output.stat().st_size} bytes, {codes.shape[2]} prompts, {len(rows)} rows")


def read_direction(path: Path) -> decision.Direction:
    with np.load(path) as data:
        rows, members, cells = ([str(each) for each in data[key]] for key in ("rows", "members", "cells"))
        evidence, noise = data["evidence"][:, :, HELD_OUT:], data["noise"][:, :, HELD_OUT:]
    return decision.Direction(path.stem, rows, members, cells, evidence, np.repeat(noise, len(rows), axis=0))


def row_scores(direction: decision.Direction, row: str) -> Any:
    """(counts, prompts, windows, 3)."""
    own = direction.own(row)
    tables = direction.by_position(row)
    found = np.full((len(COUNTS), direction.evidence.shape[2], MOST_WINDOWS, 3), np.nan)
    for reference in range(direction.evidence.shape[2]):
        prompt = HonestPrompt(
            key=str(reference),
            own=own,
            base=decision.SDPA if own.startswith("quant") else own,
            rivals=decision.rivals_in(tables.names, own),
            names=tuple(tables.names),
            distances=tables.distances[:, reference],
            units=tables.units[:, reference],
            to_anchor=tables.to_anchor[reference],
        )
        for column, count in enumerate(COUNTS):
            for index, score in enumerate(window_scores(prompt, count, MOST_WINDOWS)):
                found[column, reference, index] = score
    return found


def build_profile(honest: Honest, prompts: Collection[int] | None = None) -> Profile:
    """``prompts`` are those that count; None is all."""
    chosen = honest.prompts() if prompts is None else prompts
    return Profile(
        format=FORMAT,
        name="SmolLM2-135M, H100 and x86 CPU",
        created_at="2026-11-22T00:00:00+00:00",
        model=decision.MODEL,
        weights=decision.WEIGHTS,
        prover=("NVIDIA H100 80GB HBM3", "x86 CPU"),
        verifier=("x86 CPU", "NVIDIA H100 80GB HBM3"),
        dtypes=("bf16", "fp16"),
        attentions=("eager", "sdpa", "sdpa_math", "sdpa_flash", "sdpa_cudnn", "sdpa_efficient"),
        quantizations=("none", "torchao-int8"),
        batch_sizes=(1, 2, 4),
        emulated_tensor_parallel=(1, 2, 4),
        matmuls=("native",),
        pools=tuple(honest.pool(count, chosen) for count in COUNTS),
    )


def print_rates(honest: Honest) -> None:
    """Honest single prompts rejected by the lanes at α, by row and number of positions, out of sample."""
    rejected_by_prompt = np.zeros((len(honest.rows), len(COUNTS), len(honest.prompts())))
    trials_by_prompt = np.zeros_like(rejected_by_prompt)
    for fold in range(FOLDS):
        held = [prompt for prompt in honest.prompts() if prompt % FOLDS == fold]
        rest = [prompt for prompt in honest.prompts() if prompt % FOLDS != fold]
        for column, count in enumerate(COUNTS):
            pool = honest.pool(count, rest)
            for row in range(len(honest.rows)):
                for prompt in held:
                    for floors, noise, margin in honest.scores[row, column, prompt].tolist():
                        if floors != floors:
                            continue
                        p = [pool.p_floors(floors), pool.p_margin(margin)]
                        p += [pool.p_noise(noise)] if noise == noise else []
                        rejected_by_prompt[row, column, prompt] += LANES * min(p) <= ALPHA
                        trials_by_prompt[row, column, prompt] += 1
    print(
        f"honest single prompts rejected at {ALPHA:g}, of {len(honest.prompts())} prompts; columns: positions {COUNTS}"
    )
    rejected, trials = rejected_by_prompt.sum(axis=-1), trials_by_prompt.sum(axis=-1)
    for row, name in enumerate(honest.rows):
        print(f"  {name:<36}" + "".join(f"{x:9.2%}" for x in rejected[row] / trials[row]))
    by_prompt = rejected_by_prompt.sum(axis=0), trials_by_prompt.sum(axis=0)  # (counts, prompts)
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(honest.prompts()), (2000, len(honest.prompts())))
    for column, count in enumerate(COUNTS):
        hits, of = (each[column] for each in by_prompt)
        low, high = np.quantile(hits[drawn].sum(axis=1) / of[drawn].sum(axis=1), [0.025, 0.975])
        print(
            f"  all rows, {count:2} positions: {hits.sum() / of.sum():.2%}, 95 % over prompts [{low:.2%}, {high:.2%}]"
        )


if __name__ == "__main__":
    main()
