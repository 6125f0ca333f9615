"""Analysis of a plan-sized experiment beside `json.load` and the plan's own loop: seconds and peak memory.

    .venv/bin/python bench/analysis.py [--runs 3] [--configs 9] [--folder DIR]

The file has the plan's size: 9 configs, 30 decode steps of 3 positions, hidden states (3584) and keys (512) of five
layers, top-10 logprobs; bf16 numbers in uniform experiment JSON. `parse` is opening and closing the file
and decoding every run, `total` all of `verifier analyze` but printing. The loop is the plan's sketch (json.load, one np.array per vector and pair)
over the same pairs of configs. Every measurement is a process of its own; medians over the runs, file in the page cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from itertools import combinations
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from fpforensics.common.environment import describe_environment
from fpforensics.common.lab.reader import Experiment, open_experiment
from fpforensics.common.lab.run import Ranked, Run, RunInfo, RunSignals, Vectors
from fpforensics.common.lab.writer import write_experiment
from fpforensics.verifier.analysis import analyze

STEPS, POSITIONS, LAYERS, TOP = 30, (-3, -2, -1), (1, 2, 4, 12, 39), 10
WIDTHS = {"hidden_states": 3584, "key_vectors": 512}
GOAL = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--configs", type=int, default=9)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--child", choices=["ours", "loop"], help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure_ours(arguments.file) if arguments.child == "ours" else measure_loop(arguments.file)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder) / "experiment.json"
        write(path, arguments.configs)
        path.read_bytes()  # into the page cache
        ours = [child("ours", path) for _ in range(arguments.runs)]
        loop = [child("loop", path) for _ in range(arguments.runs)]
        report(path.stat().st_size, arguments, ours, loop)


def report(
    size: int, arguments: argparse.Namespace, ours: list[dict[str, float]], loop: list[dict[str, float]]
) -> None:
    def median(runs: list[dict[str, float]], name: str) -> float:
        return statistics.median(run[name] for run in runs)

    share = statistics.median(1 - run["parse"] / run["total"] for run in ours)
    machine = describe_environment()
    print(f"{machine.cpu}, {machine.cpu_count} cores, Python {machine.python}, NumPy {np.__version__}")
    print(f"{size / 1e6:.0f} MB, {arguments.configs} configs, medians of {arguments.runs}\n")
    print(f"{'':<28}{'parse s':>9}{'total s':>9}{'own memory MB':>15}")
    print(
        f"{'verifier analyze':<28}{median(ours, 'parse'):>9.2f}{median(ours, 'total'):>9.2f}{median(ours, 'memory'):>15.0f}"
    )
    print(
        f"{'json.load and loop':<28}{median(loop, 'parse'):>9.2f}{median(loop, 'total'):>9.2f}{median(loop, 'memory'):>15.0f}"
    )
    spread = ", ".join(f"{1 - run['parse'] / run['total']:.3f}" for run in ours)
    print(f"\nanalysis beyond parsing: {share:.1%} of the total ({spread}); goal under {GOAL:.0%}")
    print(f"times as fast as the loop: {median(loop, 'total') / median(ours, 'total'):.1f}")


def child(kind: str, path: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", kind, "--file", str(path)]
    result: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return result


def measure_ours(path: Path) -> dict[str, float]:
    parsing = 0.0
    read = Experiment.read

    def timed(experiment: Experiment, info: RunInfo) -> Run:
        nonlocal parsing
        started = time.perf_counter()
        run = read(experiment, info)
        parsing += time.perf_counter() - started
        return run

    Experiment.read = timed  # type: ignore[method-assign]
    with Peak() as peak:
        started = time.perf_counter()
        with open_experiment(path) as experiment:
            parsing += time.perf_counter() - started
            found = analyze(experiment)
            analyzed = time.perf_counter()
        total = time.perf_counter() - started
        parsing += started + total - analyzed
    assert found["decode"]["hidden_states"].off_diagonal_mean
    return {"parse": parsing, "total": total, "memory": peak.megabytes}


def measure_loop(path: Path) -> dict[str, float]:
    with Peak() as peak:
        started = time.perf_counter()
        with path.open() as file:
            data = json.load(file)
        parsed = time.perf_counter()
        for one, other in combinations(data["runs"], 2):
            for signal in WIDTHS:
                for layer in LAYERS:
                    mean_distance(one, other, signal, f"layer_{layer}")
        total = time.perf_counter() - started
    return {"parse": parsed - started, "total": total, "memory": peak.megabytes}


def mean_distance(one: dict[str, Any], other: dict[str, Any], signal: str, layer: str) -> float:
    """As in the plan's sketch."""
    distances = []
    for step, step_other in zip(one["decode_steps"], other["decode_steps"], strict=True):
        for position in POSITIONS:
            ours = np.array(step[signal][layer][f"pos_{position}"])
            theirs = np.array(step_other[signal][layer][f"pos_{position}"])
            distances.append(np.linalg.norm(ours - theirs))
    return float(np.mean(distances))


class Peak:
    """The most anonymous memory of this process while open; the file's own pages, which the system can drop, do not count."""

    megabytes = 0.0

    def __enter__(self) -> Peak:
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            status = Path("/proc/self/status").read_text()
            now = int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]) / 1e3
            self.megabytes = max(self.megabytes, now)


def write(path: Path, configs: int) -> None:
    rng = np.random.default_rng(0)
    places = tuple((step, position) for step in range(STEPS) for position in POSITIONS)
    base = {
        (signal, f"layer_{layer}"): rng.normal(size=(len(places), width))
        for signal, width in WIDTHS.items()
        for layer in LAYERS
    }
    ids = np.array([rng.choice(150_000, TOP, replace=False) for _ in places])

    def run(index: int) -> Run:
        def rounded(values: Any) -> Any:
            return (values + rng.normal(scale=0.01, size=values.shape)).astype(ml_dtypes.bfloat16).astype(np.float64)

        logprobs = -np.sort(rng.exponential(2.0, size=(len(places), TOP)))
        vectors = {key: Vectors(places, rounded(values)) for key, values in base.items()}
        signals = RunSignals(Ranked(places, ids, logprobs), vectors)  # type: ignore[arg-type]
        info = RunInfo(index, f"config_{index}", "ref_0", 0, tuple(range(STEPS)))
        return Run(info, {"decode": signals})

    metadata = {"experiment_type": "synthetic", "variable_tested": "batch_size"}
    configurations = [
        {"config_id": f"config_{index}", "hardware": "synthetic", "variable_value": index} for index in range(configs)
    ]
    write_experiment(path, metadata, configurations, ((run(index), {}) for index in range(configs)))


if __name__ == "__main__":
    main()
