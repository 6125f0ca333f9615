"""The plan's four questions, against its own sketch; and the result as JSON."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from itertools import permutations, product
from pathlib import Path
from typing import Any

import msgspec
import pytest
from lab_analysis import THREE, THREE_ELSEWHERE, analyzed, copy_signals, entry, every_cell
from lab_documents import (
    Json,
    Layout,
    find_run,
    make_document,
    mean,
    naive_vectors,
)

from fpforensics.verifier.analysis import Analysis
from fpforensics.verifier.analysis.result import Source


class PlanSketch:
    """The plan's ExperimentAnalyzer, over one layer of the decode steps, without NumPy."""

    def __init__(self, document: Json, layer: str) -> None:
        self.data, self.layer = document, layer

    def distance(self, one: str, other: str) -> float:
        ours, theirs = (find_run(self.data, name, "ref_0", 0) for name in (one, other))
        return naive_vectors(ours, theirs, "decode", "hidden_states", self.layer)

    def configs(self, hardware: str) -> list[Json]:
        return [each for each in self.data["configurations"] if hardware in each["hardware"]]

    def within_config_reproducibility(self, name: str) -> bool:
        runs = [run for run in self.data["runs"] if run["config_id"] == name]
        assert len(runs) == 3
        return all(
            naive_vectors(one, other, "decode", "hidden_states", self.layer) == 0
            for one, other in permutations(runs, 2)
        )

    def cross_hardware_baseline(self) -> dict[tuple[str, str], float]:
        results = {}
        for ours in self.configs("A100"):
            matching = [each for each in self.configs("H100") if each["variable_value"] == ours["variable_value"]]
            if matching:
                names = ours["config_id"], matching[0]["config_id"]
                results[names] = self.distance(*names)
        return results

    def variable_detectability(self, hardware: str) -> dict[tuple[str, str], float]:
        baseline, *others = (each["config_id"] for each in self.configs(hardware))
        return {(baseline, name): self.distance(baseline, name) for name in others}

    def cross_hardware_detectability(self) -> dict[tuple[str, str], float]:
        """ "Compare A100_variant vs H100_baseline", and the other way round."""
        baseline = {gpu: self.configs(gpu)[0] for gpu in ("A100", "H100")}
        return {
            (ours["config_id"], theirs["config_id"]): self.distance(ours["config_id"], theirs["config_id"])
            for ours, theirs in product(self.configs("A100"), self.configs("H100"))
            if (ours is baseline["A100"] or theirs is baseline["H100"])
            and ours["variable_value"] != theirs["variable_value"]
        }


def test_the_plans_four_questions(tmp_path: Path) -> None:
    configs = (("A100_bs1", "A100-80GB", 1), ("A100_bs2", "A100-80GB", 2), ("A100_bs4", "A100-80GB", 4))
    elsewhere = (("H100_bs1", "H100", 1), ("H100_bs2", "H100", 2), ("H100_bs8", "H100", 8))
    document = make_document(Layout((*configs, *elsewhere), references=("ref_0",), repetitions=3, steps=4))
    find_run(document, "H100_bs2", "ref_0", 1)["decode_steps"][3]["hidden_states"]["layer_12"]["pos_-1"][0] += 1e-6
    found = analyzed(tmp_path, document)["decode"]["hidden_states"]
    for layer, cell in found.per_layer.items():
        sketch = PlanSketch(document, layer)
        assert cell.reproducible == {name: sketch.within_config_reproducibility(name) for name in cell.configs}
        baseline = sketch.cross_hardware_baseline()
        assert len(baseline) == 2
        assert {each.configs: each.distance for each in cell.cross_hardware_baseline} == pytest.approx(baseline)
        noise = mean(list(baseline.values()))
        within = sketch.variable_detectability("A100-80GB") | sketch.variable_detectability("H100")
        assert {each.configs: each.distance for each in cell.within_hardware} == pytest.approx(within)
        assert {each.configs: each.snr for each in cell.within_hardware} == pytest.approx(
            {pair: distance / noise for pair, distance in within.items()}
        )
        across = sketch.cross_hardware_detectability()
        assert {each.configs: each.distance for each in cell.across_hardware} == pytest.approx(across)
        assert {each.configs: each.snr for each in cell.across_hardware} == pytest.approx(
            {pair: distance / noise for pair, distance in across.items()}
        )
    assert found.per_layer["layer_12"].reproducible["H100_bs2"] is False
    assert found.per_layer["layer_1"].reproducible["H100_bs2"] is True


def test_the_questions_are_the_same_of_one_file_or_of_two(tmp_path: Path) -> None:
    one_file = make_document(Layout((*THREE_ELSEWHERE, *THREE)))
    halves = [copy.deepcopy(one_file) for _ in range(2)]
    for half, hardware in zip(halves, ("A100", "H100"), strict=True):
        half["configurations"] = [each for each in half["configurations"] if each["hardware"] == hardware]
        kept = {each["config_id"] for each in half["configurations"]}
        half["runs"] = [run for run in half["runs"] if run["config_id"] in kept]
    together, apart = analyzed(tmp_path, one_file), analyzed(tmp_path, *halves)
    for phase, signal in product(("prefill", "decode"), ("key_vectors", "hidden_states")):
        one, two = together[phase][signal], apart[phase][signal]  # type: ignore[index]
        for question in ("cross_hardware_baseline", "within_hardware", "across_hardware"):
            alone = [msgspec.structs.replace(each, sides=("claimed", "claimed")) for each in getattr(two, question)]
            assert set(getattr(one, question)) == set(alone)
            assert len(getattr(one, question)) == {"cross_hardware_baseline": 3}.get(question, 4)


def test_a_directed_distance_counts_both_ways_within_a_file_and_once_between_two(tmp_path: Path) -> None:
    """Between two experiments only the claimed one's ids are anyone's claim."""
    claimed = make_document(Layout((("a_1", "A100", 1), ("h_1", "H100", 1)), ("ref_0",)))
    (pair,) = (cell := analyzed(tmp_path, claimed, top=1)["prefill"]["logprobs"]).cross_hardware_baseline
    forth, back = entry(cell, "a_1", "h_1"), entry(cell, "h_1", "a_1")
    assert forth and back and forth != back
    assert pair.distance == pytest.approx(mean([forth, back]), rel=1e-12)
    halves = [make_document(Layout((each,), ("ref_0",))) for each in (("a_1", "A100", 1), ("h_1", "H100", 1))]
    (pair,) = analyzed(tmp_path, *halves, top=1)["prefill"]["logprobs"].cross_hardware_baseline
    assert pair.distance == pytest.approx(forth, rel=1e-12)


def test_each_config_of_a_comparison_says_which_experiment_it_is_of(tmp_path: Path) -> None:
    """Both have the same ids and name the same hardware."""
    claimed, observed = make_document(Layout(THREE)), make_document(Layout(THREE, seed=1))
    cell = analyzed(tmp_path, claimed, observed)["decode"]["logprobs"]
    assert {(each.configs, each.sides) for each in cell.within_hardware} == {
        (("h_1", other), (side, side)) for other in ("h_2", "h_4") for side in ("claimed", "observed")
    }
    for each in (*cell.cross_hardware_baseline, *cell.across_hardware):
        assert each.sides == ("claimed", "observed")
    assert len(cell.across_hardware) == 4


def test_a_result_says_what_it_is_of(tmp_path: Path) -> None:
    """In each signal, so that phases stay the only keys of the whole."""
    claimed, observed = make_document(Layout(THREE_ELSEWHERE)), make_document(Layout(THREE, seed=1))
    found = analyzed(tmp_path, claimed, observed, canonical="first", top=2)
    assert set(found) == {"prefill", "decode"}
    (about,) = {cell.about for cell in every_cell(found)}
    assert (about.variable, about.canonical, about.top) == ("value", "first", 2)
    assert about.claimed == Source(file="claimed.json", model="none", hardware=("A100",))
    assert about.observed == Source(file="observed.json", model="none", hardware=("H100",))
    (about,) = {cell.about for cell in every_cell(analyzed(tmp_path, claimed))}
    assert about.observed is None


def test_without_a_second_machine_there_is_no_noise_floor(tmp_path: Path) -> None:
    cell = analyzed(tmp_path, make_document(Layout(THREE)))["decode"]["hidden_states"]
    assert (cell.cross_hardware_baseline, cell.across_hardware) == ((), ())
    assert [each.configs for each in cell.within_hardware] == [("h_1", "h_2"), ("h_1", "h_4")]
    assert all((each.snr, each.snr_infinite, each.label) == (None, False, "") for each in cell.within_hardware)


DOCUMENTED = {
    "configs",
    "observed_configs",
    "matrix",
    "per_reference",
    "diagonal_mean",
    "off_diagonal_mean",
    "snr",
    "snr_meaningful",
    "snr_infinite",
    "pairwise",
    "kernel_classes",
    "reproducible",
    "per_layer",
}


def numbers_in(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for each in value:
            yield from numbers_in(each)
    elif isinstance(value, float):
        yield value


def hard_cases() -> Iterator[tuple[Json, Json | None]]:
    """Kernel classes, diverged tokens, zero diagonals, and values without a partner."""
    document = make_document(Layout(THREE))
    copy_signals(document, "h_1", "h_2")
    find_run(document, "h_4", "ref_1")["decode_steps"][0]["token_id"] = 99
    yield document, None
    yield document, document
    yield document, make_document(Layout(THREE_ELSEWHERE[1:], seed=1, references=("ref_1",)))
    yield document, make_document(Layout((("x", "A100", "none of these"),), seed=1, keys=0))


@pytest.mark.parametrize("case", range(4))
def test_result_is_json_without_nan_and_with_every_documented_key(tmp_path: Path, case: int) -> None:
    """NumPy's numbers would not be, and NaN would silently become null: so the values themselves are looked at."""
    found = analyzed(tmp_path, *list(hard_cases())[case])
    plain = msgspec.to_builtins(found)
    numbers = list(numbers_in(plain))
    assert numbers and all(type(each) is float and math.isfinite(each) for each in numbers)
    text = msgspec.json.encode(found)
    assert b"NaN" not in text and b"Infinity" not in text
    assert msgspec.json.decode(text, type=Analysis) == found
    for signals in msgspec.json.decode(text).values():
        for cell in signals.values():
            for each in (cell, *cell["per_layer"].values()):
                assert each.keys() >= DOCUMENTED
                assert all(pair.keys() >= {"pair", "signal", "noise", "snr", "label"} for pair in each["pairwise"])
                assert len(each["matrix"]) == len(each["configs"])
                assert all(len(row) == len(each["observed_configs"]) for row in each["matrix"])
