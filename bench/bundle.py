"""Bundles beside plain JSON and beside SHA-256: write, verify and read the same evidence.

    .venv/bin/python bench/bundle.py [--runs 5] [--folder DIR]

The evidence has the size of the plan's: 3 rows of 4 references, 16 prefill and 63 decode positions, hidden
states (2048) and keys (1024) of five layers in bf16, top-20 logprobs; normally distributed numbers. JSON is
json.dumps of lists of floats in two layouts: `plan`, the uniform experiment's, where every step repeats the
last three positions; and `once`, which stores each position once, as the bundle does. JSON is timed on one
row of the three. MB/s are megabytes of the evidence's arrays, each counted once; medians over the runs, files
in the page cache, one thread.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from synthetic import TEST_KEY, Size, evidence, references, trace

from fpforensics.common.bundle import BundleWriter
from fpforensics.common.environment import describe_environment
from fpforensics.common.keys import Keyring
from fpforensics.common.signals import Array, PhaseTrace, Trace
from fpforensics.verifier.intake import open_bundle

SIZE = Size(
    rows=3,
    references=4,
    prompt=256,
    output=64,
    prefill=16,
    layers=("1", "2", "4", "12", "last"),
    hidden=2048,
    key=1024,
    top_k=20,
    vocabulary=49152,
    depth=24,
)
KEYRING = Keyring([TEST_KEY.public])
VERIFY_GOAL, SPEED_GOAL, SIZE_GOAL = 0.7, 50.0, 8.0
QUICK_SECONDS = 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="where to write (default: the temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        measure(Path(folder), arguments.runs)


def measure(folder: Path, runs: int) -> None:
    traces = [[realistic(row, reference) for reference in range(SIZE.references)] for row in range(SIZE.rows)]
    prompts = references(SIZE)
    bundle = folder / "bundle.msgpack"
    with BundleWriter(folder / "template.msgpack") as writer:
        described = evidence(SIZE, writer)
        rows = tuple(
            msgspec.structs.replace(row, traces=tuple(writer.add_trace(one) for one in row_traces))
            for row, row_traces in zip(described.rows, traces, strict=True)
        )
        template = msgspec.structs.replace(described, rows=rows)

    def write() -> None:
        with BundleWriter(bundle) as writer:
            for prompt in prompts:
                writer.add_reference(prompt)
            for row in traces:
                for one in row:
                    writer.add_trace(one)
            writer.finish(template, TEST_KEY)

    def verify() -> None:
        with open_bundle(bundle, KEYRING) as verified:
            verified.verify_digests()

    def verify_all() -> None:
        with open_bundle(bundle, KEYRING) as verified:
            verified.verify_all()

    def read() -> None:
        with open_bundle(bundle, KEYRING) as verified:
            for row in verified.evidence.rows:
                for one in row.traces:
                    verified.trace(row, one.reference_id)

    size = sum(array.nbytes for row in traces for one in row for array in arrays_of(one))
    print(
        f"{describe_environment().cpu}, Python {platform.python_version()}, NumPy {np.__version__}, medians of >= {runs} runs"
    )
    print(f"{size / 1e6:.1f} MB of arrays\n\n| what | seconds | MB/s |\n| --- | --- | --- |", flush=True)
    rates: dict[str, float] = {}

    def timed(name: str, work: Callable[[], None], share: float = 1.0) -> None:
        seconds = median(work, runs) / share
        rates[name] = size / 1e6 / seconds
        print(f"| {name} | {seconds:.3f} | {rates[name]:.1f} |", flush=True)

    timed("bundle write", write)
    data = bundle.read_bytes()
    timed("SHA-256 of the same bytes", lambda: hash_all(data))
    timed("bundle verify", verify)
    timed("bundle verify, every element", verify_all)
    timed("bundle read", read)
    sizes: dict[str, float] = {}
    for layout, tree in (("plan", plan_tree), ("once", once_tree)):
        plain = folder / f"{layout}.json"
        timed(f"JSON ({layout}) write", partial(write_json, plain, traces[0], tree), 1 / SIZE.rows)
        timed(f"JSON ({layout}) read", partial(read_json, plain), 1 / SIZE.rows)
        sizes[layout] = plain.stat().st_size * SIZE.rows / len(data)

    print("\n| goal | wanted | found | |\n| --- | --- | --- | --- |")
    share = rates["bundle verify"] / rates["SHA-256 of the same bytes"]
    goal("verify beside SHA-256", f">= {VERIFY_GOAL}", f"{share:.2f}", share >= VERIFY_GOAL)
    for layout, ratio in sizes.items():
        for ours, theirs in (("verify", "read"), ("read", "read"), ("write", "write")):
            faster = rates[f"bundle {ours}"] / rates[f"JSON ({layout}) {theirs}"]
            name = f"{ours} beside JSON ({layout}) {theirs}"
            goal(name, f">= {SPEED_GOAL:.0f} x", f"{faster:.0f} x", faster >= SPEED_GOAL)
        goal(f"size beside JSON ({layout})", f"<= 1/{SIZE_GOAL:.0f}", f"1/{ratio:.1f}", ratio >= SIZE_GOAL)


def realistic(row: int, reference: int) -> Trace:
    """The synthetic trace with normally distributed signals: as many digits as real ones have."""
    plain = trace(SIZE, row, reference)
    random = np.random.default_rng([row, reference])

    def normal(arrays: Mapping[str, Array]) -> dict[str, Array]:
        return {layer: random.standard_normal(a.shape, np.float32).astype(a.dtype) for layer, a in arrays.items()}

    def phase(old: PhaseTrace) -> PhaseTrace:
        return replace(
            old,
            logprobs=-random.exponential(3, old.logprobs.shape).astype(np.float32),
            hidden_states=normal(old.hidden_states),
            key_vectors=normal(old.key_vectors),
        )

    return replace(plain, prefill=phase(plain.prefill), decode=phase(plain.decode))


def arrays_of(one: Trace) -> list[Array]:
    return [one.output_ids, *one.prefill.tensors().values(), *one.decode.tensors().values()]


def once_tree(one: Trace) -> dict[str, Any]:
    phases = {"prefill": one.prefill, "decode": one.decode}
    named = {phase: {name: lists(array) for name, array in p.tensors().items()} for phase, p in phases.items()}
    return {"output_ids": lists(one.output_ids), **named}


def plan_tree(one: Trace) -> dict[str, Any]:
    """The layout of the experiment plan: at every step the signals of the last three positions, by name."""
    prefill, decode = one.prefill.tensors(), one.decode.tensors()
    named = {name: np.concatenate([prefill[name], decode[name]]) for name in decode}
    steps = [plan_step(named, SIZE.prefill + step) for step in range(-1, SIZE.output - 1)]
    return {"output_ids": lists(one.output_ids), "prefill": steps[0], "decode_steps": steps[1:]}


def plan_step(named: Mapping[str, Array], last: int) -> dict[str, Any]:
    step: dict[str, Any] = {"hidden_states": {}, "key_vectors": {}, "logprobs": {}}
    for back in (-3, -2, -1):
        row, position = last + back + 1, f"pos_{back}"
        step["logprobs"][position] = {
            "token_ids": lists(named["logprob_ids"][row]),
            "log_probs": lists(named["logprobs"][row]),
        }
        for name, array in named.items():
            signal, slash, layer = name.partition("/")
            if slash:
                step[signal].setdefault(f"layer_{layer}", {})[position] = lists(array[row])
    return step


def lists(array: Array) -> list[Any]:
    plain: list[Any] = (array if array.dtype.kind == "i" else array.astype(np.float32)).tolist()
    return plain


def write_json(path: Path, traces: list[Trace], tree: Callable[[Trace], dict[str, Any]]) -> None:
    path.write_text(json.dumps([tree(one) for one in traces]))


def read_json(path: Path) -> None:
    """Back to arrays, each list of numbers one."""
    pending: list[Any] = [json.loads(path.read_text())]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            pending.extend(value.values())
        elif value and isinstance(value[0], dict):
            pending.extend(value)
        else:
            np.array(value, np.float32)


def hash_all(data: bytes) -> None:
    hashlib.sha256(data).digest()


def goal(name: str, wanted: str, found: str, met: bool) -> None:
    print(f"| {name} | {wanted} | {found} | {'met' if met else 'MISSED'} |")


def median(work: Callable[[], None], runs: int) -> float:
    """Quick work is repeated for two seconds at least: medians of five are noise on a shared machine."""
    taken: list[float] = []
    while len(taken) < runs or sum(taken) < QUICK_SECONDS:
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


if __name__ == "__main__":
    main()
