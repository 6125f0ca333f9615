"""Experiment files for tests: one with the published distances, and one with all that a file can have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fpforensics.common.lab.reader import Experiment, open_experiment
from fpforensics.common.lab.run import Layered, Ranked, Run, RunInfo, RunSignals, Vectors
from fpforensics.common.lab.writer import write_experiment
from fpforensics.common.signals import PHASES, Phase

METADATA = {"experiment_type": "quantization", "variable_tested": "quant_method", "model": "Qwen/Qwen3-8B"}

QUANT = ("awq", "awq_marlin", "gptq_marlin")
# The published quantization study (A100 claimed, H100 verified): logprobs of two phases, four references, as printed.
PUBLISHED: dict[Phase, list[list[list[float]]]] = {
    "prefill": [
        [[4.41e-02, 6.56e-02, 4.74e00], [4.86e-02, 8.24e-02, 4.73e00], [4.72e00, 4.70e00, 2.29e-02]],
        [[5.70e-02, 5.25e-02, 4.01e00], [3.26e-02, 3.50e-02, 3.98e00], [3.80e00, 3.79e00, 6.34e-02]],
        [[4.12e-02, 3.96e-02, 4.01e00], [4.44e-02, 3.09e-02, 4.01e00], [3.85e00, 3.87e00, 4.14e-02]],
        [[4.20e-02, 3.61e-02, 4.26e00], [7.11e-02, 6.35e-02, 4.28e00], [4.27e00, 4.26e00, 5.51e-02]],
    ],
    "decode": [
        [[3.46e-02, 1.26e-02, 2.55e00], [4.33e-02, 2.42e-02, 2.56e00], [3.24e00, 3.23e00, 2.26e-02]],
        [[2.82e-02, 4.43e-02, 2.07e00], [1.98e-02, 4.63e-02, 2.06e00], [2.39e00, 2.38e00, 1.95e-02]],
        [[2.54e-02, 2.19e-02, 1.90e00], [6.72e-03, 2.20e-02, 1.89e00], [2.21e00, 2.24e00, 4.16e-02]],
        [[4.66e-02, 5.01e-02, 2.86e00], [4.30e-02, 2.65e-02, 2.86e00], [2.40e00, 2.39e00, 3.91e-02]],
    ],
}


def config(name: str, hardware: str, value: object, **fields: object) -> dict[str, object]:
    versions = {"cuda_version": "12.8", "torch_version": "2.9.0+cu128", "vllm_version": "0.11.2"}
    fixed = {"dtype": "float16", "batch_size": 1}
    return {
        "config_id": name,
        "hardware": hardware,
        "variable_value": value,
        **versions,
        "fixed_params": fixed,
        **fields,
    }


def ranked(logprobs: Mapping[int, float]) -> Ranked:
    """One place that lists these tokens."""
    return Ranked(((0, -1),), np.array([list(logprobs)]), np.array([list(logprobs.values())], np.float64))


def write(
    path: Path,
    configurations: Sequence[Mapping[str, object]],
    runs: Iterable[Run],
    metadata: Mapping[str, Any] = METADATA,
) -> Experiment:
    write_experiment(path, metadata, configurations, ((run, {}) for run in runs))
    return open_experiment(path)


def published(folder: Path) -> tuple[Experiment, Experiment]:
    """Files whose distances are the published ones: claimed config i lists token i, and the observed ones all tokens."""

    def run(side: str, row: int, reference: int) -> Run:
        phases = {}
        for phase, tables in PUBLISHED.items():
            listed = {row: 0.0} if side == "A100" else {i: -tables[reference][i][row] for i in range(len(QUANT))}
            phases[phase] = RunSignals(ranked(listed))
        return Run(RunInfo(0, f"{side}_{QUANT[row]}", f"ref_{reference}", 0, tokens=(1,)), phases)

    sides = []
    for side, torch in (("A100", "2.9.1+cu128"), ("H100", "2.9.0+cu128")):
        configurations = [config(f"{side}_{name}", f"NVIDIA {side}", name, torch_version=torch) for name in QUANT]
        runs = (run(side, row, reference) for row in range(len(QUANT)) for reference in range(4))
        sides.append(write(folder / f"INT4_{side}.json", configurations, runs))
    return sides[0], sides[1]


def rich(path: Path, prefix: str = "", **metadata: object) -> Experiment:
    """One file with all there is: two machines, three batch sizes, three signals, repetitions, a run that diverged.

    On machine B, batch sizes 1 and 2 are one kernel class, and 4 is not reproducible. Its ref_1 is missing.
    """
    names = {f"{prefix}{machine}_bs{size}": (machine, size) for machine in "AB" for size in (1, 2, 4)}
    layers: list[Layered] = [(signal, f"layer_{n}") for signal in ("key_vectors", "hidden_states") for n in (1, 2, 12)]

    def signals(name: str, reference: int, repetition: int, phase: Phase) -> RunSignals:
        machine, size = names[name]
        size = 1 if (machine, size) == ("B", 2) else size
        rng = np.random.default_rng([ord(machine), size, reference, len(phase)])
        shift = 0.01 * repetition if (machine, size) == ("B", 4) else 0.0
        places = tuple((step, -1) for step in range(1 if phase == "prefill" else 3))
        vectors = {key: Vectors(places, rng.normal(size=(len(places), 8)) + shift) for key in layers}
        ids = np.tile(np.arange(5), (len(places), 1))
        if machine == "B" and phase == "prefill" and reference == 0:
            ids = ids + 100
        return RunSignals(Ranked(places, ids, -rng.uniform(0, 3, ids.shape)), vectors)

    def runs() -> Iterable[Run]:
        for name, (machine, size) in names.items():
            for reference in range(1 if (machine, size) == ("B", 4) else 2):
                for repetition in range(1 if size == 1 else 2):
                    tokens = (5, 6, 9) if (machine, size, reference) == ("A", 4, 0) else (5, 6, 7)
                    info = RunInfo(0, name, f"{prefix}ref_{reference}", repetition, tokens)
                    yield Run(info, {phase: signals(name, reference, repetition, phase) for phase in PHASES})

    configurations = [
        config(name, f"{prefix}NVIDIA {machine}", size, torch_version="2.8.0" if size == 4 else "2.9.0")
        for name, (machine, size) in names.items()
    ]
    return write(path, configurations, runs(), METADATA | {"variable_tested": "batch_size"} | metadata)
