"""Beside the others, on the same evidence, in one table: the SNR rule, TOPLOC, Activation-DiFR, Token-DiFR and ours.

    bench/detection.py reduce FOLDER --key K.pub --device cpu -o FILE.npz [--using matmul=fp32-rounded]
    bench/detection.py table [FILE.npz]

FOLDER holds bundles that ``bench/evidence.py record`` made, one config each. `reduce` replays their tokens under the lineup and
keeps each method's statistics, so that `table` needs no model. Each task is a claim: honest evidence of the claimed config
against evidence of what ran instead. A liar sends what the claim's dtype can hold: fp16 is rounded to bf16 before anything
is measured. `wrong-prompt` is evidence and tokens of the next prompt, claimed to be this one's.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from detectors import (
    ANCHOR,
    DIMENSIONS,
    EAGER,
    FULL,
    KERNELS,
    LAYERS,
    MEASURES,
    POSITIONS,
    SDPA,
    SIZES,
    WRONG_PROMPT,
    Recorded,
    batches,
    shrink,
)
from peers import (
    BF16,
    Array,
    Floats,
    as_bf16,
    chunks,
    final_norm,
    projected_distance,
    projection,
    token_margins,
    toploc_numbers,
)
from small import save_small
from standings import print_standings

from fpforensics.common.config import ExecutionConfig, parse_config
from fpforensics.common.engines.base import Engine, Host
from fpforensics.common.engines.remote import start_engine
from fpforensics.common.environment import describe_environment
from fpforensics.common.keys import Keyring
from fpforensics.common.models import resolve_model
from fpforensics.common.signals import CapturePlan, Forcing, PhaseTrace, Trace
from fpforensics.verifier.distance import rows_l2
from fpforensics.verifier.intake import VerifiedBundle, open_bundle
from fpforensics.verifier.score import EARLY

DATA = Path(__file__).parents[1] / "tests" / "assets" / "h100" / "detection.npz"
_FORCED_AT_ONCE = 4  # full logits of so many prompts are held
_SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    reduce_ = commands.add_parser("reduce")
    reduce_.add_argument("folder", type=Path)
    reduce_.add_argument("--key", type=Path, required=True)
    reduce_.add_argument("--device", choices=["cpu", "cuda"], required=True)
    reduce_.add_argument("-o", "--output", type=Path, default=DATA)
    reduce_.add_argument("--env", action="append", default=[])
    reduce_.add_argument("--using", default="", help="matmul=fp32-rounded: how this verifier computes products")
    table_ = commands.add_parser("table")
    table_.add_argument("file", nargs="?", type=Path, default=DATA)
    table_.add_argument("--replicates", type=int, default=1000)
    arguments = parser.parse_args()
    if arguments.command == "reduce":
        reduce(arguments)
    else:
        print_standings(Recorded.load(arguments.file), arguments.replicates)


@dataclass(frozen=True)
class Run:
    """Evidence of one config, and what a verifier is told of it: prompts, tokens, positions and ids."""

    name: str
    evidence: list[Trace]
    forcings: list[Forcing]


def reduce(arguments: argparse.Namespace) -> None:
    keyring = Keyring.from_paths([arguments.key])
    runs = runs_of([open_bundle(path, keyring) for path in sorted(arguments.folder.glob("*.msgpack"))])
    host = Host(device=arguments.device, env=dict(each.split("=", 1) for each in arguments.env))
    using = parse_config(arguments.using).matmul
    names = [run.name for run in runs]
    pairs = [(SDPA, name) for name in names] + [(EAGER, EAGER), (EAGER, SDPA)]
    kept = Kept(runs, pairs)
    seconds: dict[str, float] = {}
    shared: list[list[PhaseTrace]] = []
    for spec in (ANCHOR, *KERNELS):
        config = parse_config(spec)
        if spec != ANCHOR:
            config = msgspec.structs.replace(config, matmul=using)
        before = time.perf_counter()
        with start_engine(config, host) as engine:
            plan = CapturePlan(prefill_positions=POSITIONS)
            ends: list[float] = []
            # A prompt's positions know nothing of the tokens that follow: one replay serves every run.
            traces = engine.teacher_force(
                runs[0].forcings, plan, "prefill", lambda *_, ends=ends: ends.append(time.perf_counter())
            )
            seconds[spec] = float(np.median(np.diff(ends)))
            shared.append([trace.prefill for trace in traces])
            if any(claimed == spec for claimed, _ in pairs):
                kept.measure_claim(spec, engine, plan)
        say(f"{spec}: {seconds[spec]:.2f} s a prompt, {time.perf_counter() - before:.0f} s")
    early = [kept.early(shared, k) for k in DIMENSIONS]
    seconds |= {name: float(np.median(values)) for name, values in kept.seconds.items()}
    machine = describe_environment()
    save_small(
        arguments.output,
        runs=np.array(names),
        members=np.array([*KERNELS, ANCHOR]),
        pairs=np.array(pairs),
        measured=shrink(kept.measured),
        margins=kept.margins.astype(np.float16),
        seconds=np.array(list(seconds.values()), np.float32),
        **{"seconds.names": np.array(list(seconds))},
        **{f"toploc.{size}": kept.toploc[size].astype(np.float16) for size in SIZES},
        **{f"evidence.{k}": shrink(found[0], k) for k, found in zip(DIMENSIONS, early, strict=True)},
        **{f"noise.{k}": shrink(found[1], k) for k, found in zip(DIMENSIONS, early, strict=True)},
        machine=np.array(", ".join([machine.cpu, *arguments.env, arguments.using or "matmul=native"])),
    )
    say(f"{arguments.output}: {arguments.output.stat().st_size} bytes")


def runs_of(bundles: Sequence[VerifiedBundle]) -> list[Run]:
    """Every bundle's evidence and, last, the wrong prompt's."""
    runs = []
    for bundle in bundles:
        row = bundle.evidence.rows[0]
        ids = [reference.id for reference in bundle.references()]
        evidence = [in_bf16(bundle.trace(row, each)) for each in ids]
        runs.append(Run(row.config_id, evidence, [bundle.forcing(row, each) for each in ids]))
    honest = next(run for run in runs if run.name == SDPA)
    others = honest.forcings[1:] + honest.forcings[:1]
    swapped = [
        replace(own, output_ids=other.output_ids, claimed_ids=other.claimed_ids)
        for own, other in zip(honest.forcings, others, strict=True)
    ]
    return [*runs, Run(WRONG_PROMPT, honest.evidence[1:] + honest.evidence[:1], swapped)]


def in_bf16(trace: Trace) -> Trace:
    prefill = replace(
        trace.prefill,
        hidden_states={layer: as_bf16(rows) for layer, rows in trace.prefill.hidden_states.items()},
        key_vectors={layer: as_bf16(rows) for layer, rows in trace.prefill.key_vectors.items()},
    )
    return replace(trace, prefill=prefill)


class Kept:
    """What ``reduce`` fills, in the shapes of :class:`Recorded`; and the seconds that each statistic took."""

    def __init__(self, runs: Sequence[Run], pairs: Sequence[tuple[str, str]]) -> None:
        self.runs, self.pairs = runs, pairs
        prompts, tokens = len(runs[0].evidence), len(runs[0].evidence[0].output_ids)
        self.measured = np.zeros((len(pairs), len(MEASURES), prompts, POSITIONS))
        self.margins = np.zeros((len(pairs), prompts, tokens))
        self.toploc = {
            size: np.zeros((len(pairs), prompts, len(batches(size)), len(chunks(size)), 3)) for size in SIZES
        }
        self.seconds: dict[str, list[float]] = {}
        self.norm, self.epsilon = last_norm()

    def measure_claim(self, claimed: str, engine: Engine, plan: CapturePlan) -> None:
        """Replay every run's tokens under the claimed config, each distinct sequence once, with full logits."""
        alike: dict[tuple[str, bytes], list[tuple[int, int]]] = {}
        for index, (claim, ran) in enumerate(self.pairs):
            if claim == claimed:
                for prompt, forcing in enumerate(self.run(ran).forcings):
                    alike.setdefault((forcing.reference.id, forcing.output_ids.tobytes()), []).append((index, prompt))
        whole = msgspec.structs.replace(plan, full_logits=True)
        groups = list(alike.values())
        for start in range(0, len(groups), _FORCED_AT_ONCE):
            part = groups[start : start + _FORCED_AT_ONCE]
            forcings = [self.run(self.pairs[group[0][0]][1]).forcings[group[0][1]] for group in part]
            for group, trace in zip(part, engine.teacher_force(forcings, whole, "prefill"), strict=True):
                for index, prompt in group:
                    self.measure(index, prompt, self.run(self.pairs[index][1]).evidence[prompt], trace)

    def run(self, name: str) -> Run:
        return next(run for run in self.runs if run.name == name)

    def measure(self, index: int, prompt: int, evidence: Trace, replay: Trace) -> None:
        """Every method's statistic of one prompt's evidence beside the claimed config's replay."""
        ours, theirs = evidence.prefill, replay.prefill
        assert theirs.logits is not None and replay.decode.logits is not None
        logits = theirs.logits.astype(np.float32)
        logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        gathered = np.take_along_axis(logprobs, ours.logprob_ids.astype(np.int64), axis=1)
        one, other = (final_norm(each.hidden_states["last"], self.norm, self.epsilon) for each in (ours, theirs))

        def projected(k: int) -> Floats:
            return projected_distance(one, other, projection(one.shape[1], k, _SEED))

        def numbers(size: int) -> Floats:
            return np.array([toploc_numbers(one[window], other[window]) for window in batches(size)])

        def keys() -> Floats:
            return np.mean([rows_l2(ours.key_vectors[each], theirs.key_vectors[each], each) for each in LAYERS], axis=0)

        work: dict[str, Callable[[], Floats]] = {
            "logprobs": lambda: rows_l2(ours.logprobs, gathered, "logprobs"),
            "keys": keys,
            "last": lambda: rows_l2(ours.hidden_states["last"], theirs.hidden_states["last"], "last"),
            "projected/2": lambda: projected(2),
            "projected/8": lambda: projected(8),
        }
        for column, name in enumerate(MEASURES):
            self.measured[index, column, prompt] = self.timed(name, work[name])
        for size in SIZES:
            name = "toploc" if size == POSITIONS else f"toploc.{size}"
            self.toploc[size][index, prompt] = self.timed(name, lambda size=size: numbers(size))  # type: ignore[misc]
        # The last prompt position chooses the first token, each generated position the next.
        rows = np.concatenate([theirs.logits[-1:], replay.decode.logits])
        self.margins[index, prompt] = self.timed("margins", lambda: token_margins(rows, replay.output_ids))

    def early(self, replays: Sequence[Sequence[PhaseTrace]], k: int) -> tuple[Floats, Floats]:
        """Distances in the early cells, from each run's evidence to each member, and from each member to the anchor.

        ``replays`` begin with the anchor's. With ``k`` numbers a layer both sides are projected; the evidence travels as fp16.
        """
        (anchor, *members), prompts = replays, range(len(self.runs[0].evidence))

        def cells(one: PhaseTrace, other: PhaseTrace, travels: Any) -> Floats:
            found = []
            for seed, key in enumerate(EARLY):
                mine, theirs = (getattr(each, key.signal)[key.layer] for each in (one, other))
                found.append(
                    rows_l2(mine, theirs, key.layer)
                    if k == FULL
                    else projected_distance(mine, theirs, projection(mine.shape[1], k, _SEED + seed), travels)
                )
            return np.array(found)

        def beside(run: Run, member: Sequence[PhaseTrace], prompt: int) -> Floats:
            return self.timed(f"early/{k}", lambda: cells(run.evidence[prompt].prefill, member[prompt], np.float16))

        evidence = [
            [[beside(run, member, prompt) for prompt in prompts] for member in (*members, anchor)] for run in self.runs
        ]
        noise = [[cells(member[prompt], anchor[prompt], np.float64) for prompt in prompts] for member in members]
        return np.array(evidence), np.array(noise)

    def timed(self, name: str, work: Callable[[], Floats]) -> Floats:
        started = time.perf_counter()
        found = work()
        self.seconds.setdefault(name, []).append(time.perf_counter() - started)
        return found


def last_norm() -> tuple[Array, float]:
    """The embedded model's final norm: its weight (D,) bf16 and epsilon."""
    from safetensors import safe_open

    folder = resolve_model(ExecutionConfig().model).path
    settings = msgspec.json.decode((folder / "config.json").read_bytes())
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as tensors:
            if "model.norm.weight" in tensors.keys():  # noqa: SIM118
                return tensors.get_tensor("model.norm.weight").float().numpy().astype(BF16), settings["rms_norm_eps"]
    raise SystemExit(f"{folder}: no model.norm.weight")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
