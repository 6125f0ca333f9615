"""Uniform experiment documents for tests, as plain values, and their distances by plain loops over those values."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest

Json = dict[str, Any]
LAB = Path(__file__).parents[2] / "shared" / "lab"
LAB_FILES = ("tensor_parallel_A100.json", "tensor_parallel_H100.json", "batch_size_4gpus.json")


@dataclass(frozen=True)
class Layout:
    """What a document holds; by default the least that has every kind of part. ``configs`` are (id, hardware, value)."""

    configs: tuple[tuple[str, str, Any], ...] = (("h_1", "H100", 1), ("h_2", "H100", 2))
    references: tuple[str, ...] = ("ref_0", "ref_1")
    repetitions: int = 1
    prefill: bool = True
    steps: int = 2
    positions: tuple[int, ...] = (-3, -2, -1)
    layers: tuple[int, ...] = (1, 12)
    hidden: int = 4
    keys: int = 3
    listed: int = 4
    vocabulary: int = 7
    seed: int = 0


def make_document(layout: Layout = Layout()) -> Json:
    """Numbers that look random and are the same everywhere; each config is near a common base."""
    return {
        "experiment_metadata": {"experiment_type": "made_up", "variable_tested": "value", "model": "none"},
        "configurations": [
            {"config_id": name, "hardware": hardware, "variable_value": value, "fixed_params": {"dtype": "bf16"}}
            for name, hardware, value in layout.configs
        ],
        "runs": [
            make_run(layout, name, reference, repetition)
            for name, _, _ in layout.configs
            for reference in layout.references
            for repetition in range(layout.repetitions)
        ],
    }


def make_run(layout: Layout, config: str, reference: str, repetition: int = 0) -> Json:
    run: Json = {"config_id": config, "rep_id": repetition, "ref_id": reference, "prompt_sha256": f"of {reference}"}
    if layout.prefill:
        run["prefill"] = _signals(layout, config, f"{reference}/prefill")
    run["decode_steps"] = [
        {"step": step, "token_id": 10 + step} | _signals(layout, config, f"{reference}/{step}")
        for step in range(layout.steps)
    ]
    return run


def _signals(layout: Layout, config: str, where: str) -> Json:
    def near(what: str, spread: float = 1.0) -> float:
        base, own = Random(f"{where}/{what}"), Random(f"{layout.seed}/{config}/{where}/{what}")
        return spread * base.gauss(0, 1) + 0.1 * own.gauss(0, 1)

    def vector(what: str, width: int) -> list[float]:
        return [near(f"{what}/{index}") for index in range(width)]

    found: Json = {}
    for signal, width in (("hidden_states", layout.hidden), ("key_vectors", layout.keys)):
        if width:
            found[signal] = {
                f"layer_{layer}": {f"pos_{at}": vector(f"{signal}/{layer}/{at}", width) for at in layout.positions}
                for layer in layout.layers
            }
    if layout.listed:
        found["logprobs"] = {}
        for at in layout.positions:
            logprobs = {token: -abs(near(f"{at}/{token}", 2.0)) for token in range(layout.vocabulary)}
            best = sorted(logprobs, key=lambda token: -logprobs[token])[: layout.listed]
            found["logprobs"][f"pos_{at}"] = {"token_ids": best, "log_probs": [logprobs[token] for token in best]}
    return found


def write_document(document: Json, path: Path) -> Path:
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def lab_document(name: str) -> Json:
    """A published recording as plain values; skips where it is not beside this repository."""
    document: Json = json.loads(lab_path(name).read_text(encoding="utf-8"))
    return document


def lab_path(name: str) -> Path:
    if not (LAB / name).exists():
        pytest.skip("the published recordings are not beside this repository")
    return LAB / name


def find_run(document: Json, config: str, reference: str = "ref_0", repetition: int = 0) -> Json:
    """The one run that is named."""
    (found,) = [
        run
        for run in document["runs"]
        if (run["config_id"], run.get("ref_id", "ref_0"), run["rep_id"]) == (config, reference, repetition)
    ]
    return dict(found)


def naive_vectors(ours: Json, theirs: Json, phase: str, signal: str, layer: str) -> float:
    """L2 at each step and position; the mean of them."""
    distances = []
    for step, other in zip(_steps(ours, phase), _steps(theirs, phase), strict=True):
        for position, vector in step[signal][layer].items():
            pairs = zip(vector, other[signal][layer][position], strict=True)
            distances.append(math.sqrt(math.fsum((x - y) ** 2 for x, y in pairs)))
    return math.fsum(distances) / len(distances)


def naive_logprobs(ours: Json, theirs: Json, phase: str, canonical: Json, top: int = 5) -> tuple[float | None, int]:
    """The same over the first ``top`` ids that ``canonical`` lists, where both list them; and the positions without any."""
    distances, without = [], 0
    for step, other, source in zip(*(_steps(run, phase) for run in (ours, theirs, canonical)), strict=True):
        for position, listed in source["logprobs"].items():
            here, there = _by_id(step["logprobs"][position]), _by_id(other["logprobs"][position])
            common = [token for token in listed["token_ids"][:top] if token in here and token in there]
            if common:
                distances.append(math.sqrt(math.fsum((here[token] - there[token]) ** 2 for token in common)))
            else:
                without += 1
    return (math.fsum(distances) / len(distances) if distances else None), without


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _steps(run: Json, phase: str) -> list[Json]:
    return [run["prefill"]] if phase == "prefill" else run["decode_steps"]


def _by_id(top: Json) -> dict[int, float]:
    return dict(zip(top["token_ids"], top["log_probs"], strict=True))
