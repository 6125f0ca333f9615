"""How often a CPU accuses honest evidence of vLLM on a GPU, and how often it catches a lie about ranks or dtype.

    bench/vllm_rates.py reduce REPLAYED.npz [REPLAYED.npz ...] [-o tests/assets/hopper/many.npz]
    bench/vllm_rates.py rates

`reduce` keeps sums over neighbouring positions of what ``bench/evidence.py replay --early`` measured on bundles that
``bench/vllm_matrix.py --wide`` made. `rates` judges single prompts by the lanes of the decision, each by pools of honest evidence of
the claimed config, made of nine tenths of the other prompts: what ``verifier calibrate`` does. Beside it, log-probabilities by the same
margin, at the level that accuses one honest prompt in a hundred.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from decision import expand, shrink
from small import save_small

from fpforensics.verifier.lanes import ALPHA, LANES
from fpforensics.verifier.pooling import HonestPrompt, HonestScore, pool_of, window_scores
from fpforensics.verifier.profile import Pool

DATA = Path(__file__).parents[1] / "tests" / "assets" / "hopper" / "many.npz"
BLOCK = 8
"""Positions that are added up."""
ANCHOR = "dtype=fp32"
RUNS = {"tp=1": "attn=sdpa,dtype=bf16", "tp=2": "emulate_tp=2", "dtype=fp16": "dtype=fp16"}
"""What ran in vLLM, and the replay by transformers that stands for it."""
COUNTS = (8, 16, 32, 64)
FOLDS = 10


@dataclass(frozen=True)
class Recorded:
    """``evidence`` (runs, members, prompts, cells, blocks) and ``noise`` (members, prompts, cells, blocks): the early cells,
    then log-probabilities."""

    members: list[str]
    evidence: Any
    noise: Any

    @property
    def prompts(self) -> range:
        """The prompts by number."""
        return range(self.evidence.shape[2])

    def evidence_of(self, ran: str, claimed: str, numbers: Sequence[int]) -> HonestPrompt:
        """The evidence of ``ran`` on these prompts, as it looks under the claim ``claimed``: their positions one after another."""
        names = tuple(RUNS.values())
        rows = [self.members.index(name) for name in names]
        evidence = _joined(self.evidence[list(RUNS).index(ran)], numbers)
        own = RUNS[claimed]
        return HonestPrompt(
            key=",".join(map(str, numbers)),
            own=own,
            base=own,
            rivals=tuple(name for name in names if name != own),
            names=names,
            distances=evidence[rows],
            units=_joined(self.noise, numbers)[rows],
            to_anchor=evidence[self.members.index(ANCHOR)],
        )

    def scores(self, ran: str, claimed: str, count: int) -> list[list[HonestScore]]:
        """By prompt, then by window of ``count`` positions."""
        return [window_scores(self.evidence_of(ran, claimed, [number]), count // BLOCK) for number in self.prompts]

    def logprob_margins(self, ran: str, claimed: str, count: int) -> Any:
        """(prompts, windows): logarithm of the distance to the nearest other replay over that to the claimed one."""
        blocks = count // BLOCK
        table = self.evidence[list(RUNS).index(ran), :, :, -1]  # (members, prompts, blocks)
        sums = table[..., : table.shape[-1] // blocks * blocks].reshape(*table.shape[:2], -1, blocks).sum(-1)
        own = sums[self.members.index(RUNS[claimed])]
        others = [sums[self.members.index(name)] for name in RUNS.values() if name != RUNS[claimed]]
        return np.log(np.min(others, axis=0) / own)


def _joined(table: Any, numbers: Sequence[int]) -> Any:
    """(N, prompts, cells, blocks) to (N, early cells, blocks of all ``numbers``)."""
    chosen = table[:, list(numbers), :-1].swapaxes(1, 2)
    return chosen.reshape(*chosen.shape[:2], -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    reduce_ = commands.add_parser("reduce")
    reduce_.add_argument("files", nargs="+", type=Path)
    reduce_.add_argument("-o", "--output", type=Path, default=DATA)
    commands.add_parser("rates")
    arguments = parser.parse_args()
    if arguments.command == "reduce":
        reduce(arguments.files, arguments.output)
    else:
        print_rates(load())


def reduce(files: Sequence[Path], output: Path) -> None:
    members: dict[str, tuple[Any, Any]] = {}
    runs: list[str] = []
    for path in files:
        with np.load(path) as data:
            found = [_ran(str(row)) for row in data["rows"]]
            if runs and found != runs:
                raise SystemExit(f"{path}: rows {found}, not {runs}")
            runs = found
            for index, name in enumerate(map(str, data["members"])):
                if name in (ANCHOR, *RUNS.values()):
                    members[name] = data["evidence"][:, index], data["noise"][0, index]
    order = [runs.index(name) for name in RUNS]
    evidence = np.stack([_blocks(each[order]) for each, _ in members.values()], axis=1)
    noise = np.stack([_blocks(each) for _, each in members.values()])
    save_small(output, members=np.array(list(members)), evidence=shrink(evidence), noise=shrink(noise))
    print(f"{output}: {output.stat().st_size} bytes")


def _ran(row: str) -> str:
    keys = dict(pair.split("=", 1) for pair in row.split(","))
    return "dtype=fp16" if keys.get("dtype") == "fp16" else f"tp={keys.get('tp', '1')}"


def _blocks(values: Any) -> Any:
    return values.reshape(*values.shape[:-1], -1, BLOCK).sum(-1)


def load(path: Path = DATA) -> Recorded:
    with np.load(path) as data:
        members = [str(name) for name in data["members"]]
        return Recorded(members, expand(data["evidence"]).astype(np.float64), expand(data["noise"]).astype(np.float64))


def rejected(recorded: Recorded, ran: str, claimed: str, count: int) -> Any:
    """(prompts,) share of each prompt's windows that the lanes reject at :data:`ALPHA`, out of sample."""
    judged, honest = recorded.scores(ran, claimed, count), recorded.scores(claimed, claimed, count)
    found = np.zeros(len(judged))
    for held, pool in _pools(honest, count):
        for number in held:
            found[number] = np.mean([_is_rejected(pool, score) for score in judged[number]])
    return found


def rejected_together(recorded: Recorded, ran: str, claimed: str, together: int, wanted: int = 1000) -> float:
    """The share of ``wanted`` draws of so many prompts, at all their positions, that the pools of single prompts reject."""
    longest = recorded.evidence.shape[-1] * BLOCK
    rng, found = np.random.default_rng(0), []
    for held, pool in _pools(recorded.scores(claimed, claimed, longest), longest):
        for _ in range(wanted // FOLDS):
            drawn = recorded.evidence_of(ran, claimed, rng.choice(held, together, replace=False).tolist())
            (score,) = window_scores(drawn, drawn.positions)
            found.append(_is_rejected(pool, score))
    return float(np.mean(found))


def _pools(honest: Sequence[Sequence[HonestScore]], count: int) -> Iterator[tuple[list[int], Pool]]:
    for fold in range(FOLDS):
        held = [number for number in range(len(honest)) if number % FOLDS == fold]
        rest = [number for number in range(len(honest)) if number % FOLDS != fold]
        yield held, pool_of(count, ((str(number), score) for number in rest for score in honest[number]))


def _is_rejected(pool: Pool, score: HonestScore) -> bool:
    p = min(pool.p_floors(score.floors), pool.p_noise(score.noise), pool.p_margin(score.margin))
    return LANES * p <= ALPHA


def rejected_by_logprobs(recorded: Recorded, ran: str, claimed: str, count: int) -> float:
    """The share that lies below the honest evidence's lowest hundredth, out of sample."""
    judged, honest = (recorded.logprob_margins(each, claimed, count) for each in (ran, claimed))
    found = []
    for fold in range(FOLDS):
        held = np.arange(len(judged)) % FOLDS == fold
        found.append(judged[held] < np.quantile(honest[~held], ALPHA))
    return float(np.concatenate(found).mean())


def over_prompts(shares: Any, draws: int = 10_000) -> tuple[float, float]:
    """A 95 % interval of the mean: prompts are drawn with replacement; never narrower above than where none is rejected,
    which is 3.7 / prompts (Clopper and Pearson)."""
    rng = np.random.default_rng(0)
    low, high = np.quantile(shares[rng.integers(0, len(shares), (draws, len(shares)))].mean(axis=1), [0.025, 0.975])
    return float(low), min(1.0, max(float(high), 3.7 / len(shares)))


def print_rates(recorded: Recorded) -> None:
    print(
        f"{len(recorded.prompts)} prompts; rejected at {ALPHA:g}, one prompt of so many positions; in brackets 95 %\n"
    )
    print(
        "| ran | claimed | "
        + " | ".join(f"{count} positions" for count in COUNTS)
        + " | 3 prompts, 64 | 8, 64 | log-probabilities, 64 |"
    )
    print("| --- " * (len(COUNTS) + 5) + "|")
    for claimed in RUNS:
        for ran in (claimed, *(name for name in RUNS if name != claimed)):
            cells = []
            for count in COUNTS:
                shares = rejected(recorded, ran, claimed, count)
                low, high = over_prompts(shares)
                cells.append(f"{shares.mean():.1%} [{low:.1%}, {high:.1%}]")
            cells += [f"{rejected_together(recorded, ran, claimed, together):.1%}" for together in (3, 8)]
            cells.append(f"{rejected_by_logprobs(recorded, ran, claimed, 64):.1%}")
            print(f"| `{ran}` | `{claimed}`{', honest' if ran == claimed else ''} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
