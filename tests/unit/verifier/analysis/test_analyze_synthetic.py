"""Made-up experiments: what the published ones do not have, each against plain loops over the same numbers."""

from __future__ import annotations

import copy
import math
import tracemalloc
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import permutations, product
from pathlib import Path
from typing import Any

import msgspec
import pytest
from lab_documents import (
    Json,
    Layout,
    find_run,
    make_document,
    mean,
    naive_logprobs,
    naive_vectors,
    write_document,
)

from fpforensics.common.errors import EvidenceError, UsageError
from fpforensics.common.lab.reader import open_experiment
from fpforensics.verifier.analysis import Analysis, CellAnalysis, analyze

THREE = (("h_1", "H100", 1), ("h_2", "H100", 2), ("h_4", "H100", 4))
THREE_ELSEWHERE = (("a_1", "A100", 1), ("a_2", "A100", 2), ("a_4", "A100", 4))
SIGNALS = ("logprobs", "key_vectors", "hidden_states")


def analyzed(folder: Path, claimed: Json, observed: Json | None = None, **options: Any) -> Analysis:
    with ExitStack() as files:
        one = files.enter_context(open_experiment(write_document(claimed, folder / "claimed.json")))
        other = None
        if observed is not None:
            other = files.enter_context(open_experiment(write_document(observed, folder / "observed.json")))
        return analyze(one, other, **options)


def every_cell(found: Analysis) -> Iterator[CellAnalysis]:
    for signals in found.values():
        for cell in signals.values():
            yield cell
            yield from cell.per_layer.values()


def copy_signals(document: Json, source: str, target: str) -> None:
    """From one config's runs to another's: two names for one kernel."""
    for run in document["runs"]:
        if run["config_id"] == target:
            original = find_run(document, source, run["ref_id"], run["rep_id"])
            run |= {name: copy.deepcopy(original[name]) for name in ("prefill", "decode_steps")}


def entry(cell: CellAnalysis, row: str, column: str, reference: str = "") -> float | None:
    table = cell.per_reference[reference] if reference else cell.matrix
    return table[cell.configs.index(row)][cell.observed_configs.index(column)]


# --- distances ---


@pytest.mark.parametrize("canonical", ["claimed", "first"])
@pytest.mark.parametrize("two", [False, True])
def test_every_entry_of_every_cell_as_a_plain_loop(tmp_path: Path, two: bool, canonical: Any) -> None:
    claimed = make_document(Layout(THREE))
    observed = make_document(Layout(THREE_ELSEWHERE, seed=1)) if two else claimed
    found = analyzed(tmp_path, claimed, observed if two else None, canonical=canonical, top=3)
    assert [(phase, *signals) for phase, signals in found.items()] == [("prefill", *SIGNALS), ("decode", *SIGNALS)]
    for phase, signals in found.items():
        for signal, cell in signals.items():
            assert tuple(cell.per_layer) == (() if signal == "logprobs" else ("layer_1", "layer_12"))
            without = 0
            for row, column in product(cell.configs, cell.observed_configs):
                naive = {}
                for reference in ("ref_0", "ref_1"):
                    ours, theirs = find_run(claimed, row, reference), find_run(observed, column, reference)
                    if signal == "logprobs":
                        source = find_run(claimed, "h_1", reference) if canonical == "first" else ours
                        value, missing = naive_logprobs(ours, theirs, phase, source, 3)
                        assert value is not None
                        naive[reference], without = value, without + missing
                    else:
                        layers = [naive_vectors(ours, theirs, phase, signal, layer) for layer in cell.per_layer]
                        naive[reference] = mean(layers)
                        for layer, distance in zip(cell.per_layer.values(), layers, strict=True):
                            assert entry(layer, row, column, reference) == pytest.approx(distance, rel=1e-12)
                    assert entry(cell, row, column, reference) == pytest.approx(naive[reference], rel=1e-12)
                assert entry(cell, row, column) == pytest.approx(mean(list(naive.values())), rel=1e-12)
            assert cell.uncompared == without


def test_layers_are_in_order_of_depth(tmp_path: Path) -> None:
    found = analyzed(tmp_path, make_document(Layout(layers=(12, 2, 100, 1))))
    assert tuple(found["decode"]["key_vectors"].per_layer) == ("layer_1", "layer_2", "layer_12", "layer_100")


def test_canonical_ids_that_the_other_side_does_not_list(tmp_path: Path) -> None:
    """A position without any of them counts as uncompared, and in no mean; with some of them, over these."""
    document = make_document(Layout(references=("ref_0",), steps=0, hidden=0, keys=0, positions=(-3, -2, -1)))
    tops = {
        "h_1": {"pos_-3": ([1, 2], [-1.0, -2.0]), "pos_-2": ([1, 2], [-1.0, -2.0]), "pos_-1": ([5], [-1.0])},
        "h_2": {"pos_-3": ([2, 1], [-6.0, -4.0]), "pos_-2": ([1, 9], [-3.0, -5.0]), "pos_-1": ([6], [-1.0])},
    }
    for run in document["runs"]:
        run["prefill"]["logprobs"] = {
            position: {"token_ids": ids, "log_probs": values}
            for position, (ids, values) in tops[run["config_id"]].items()
        }
    cell = analyzed(tmp_path, document)["prefill"]["logprobs"]
    assert entry(cell, "h_1", "h_2") == entry(cell, "h_2", "h_1") == mean([5.0, 2.0])
    assert cell.uncompared == 2, "pos_-1, in both directions"
    # Of one id only the row's best counts: the matrix is directed.
    cell = analyzed(tmp_path, document, top=1)["prefill"]["logprobs"]
    assert entry(cell, "h_1", "h_2") == mean([3.0, 2.0]) and entry(cell, "h_2", "h_1") == mean([4.0, 2.0])
    cell = analyzed(tmp_path, document, top=1, canonical="first")["prefill"]["logprobs"]
    assert entry(cell, "h_1", "h_2") == entry(cell, "h_2", "h_1") == mean([3.0, 2.0])
    # Nothing in common at all: no distance, and nothing that is no number.
    for run in document["runs"]:
        for position in ("pos_-3", "pos_-2"):
            run["prefill"]["logprobs"][position] = run["prefill"]["logprobs"]["pos_-1"]
    cell = analyzed(tmp_path, document)["prefill"]["logprobs"]
    assert cell.matrix == ((0.0, None), (None, 0.0))
    assert (cell.uncompared, cell.off_diagonal_mean, cell.snr, cell.label, cell.pairwise) == (6, None, None, "", ())


@pytest.mark.parametrize("top", [0, -1])
def test_no_token_id_at_all_is_not_compared(tmp_path: Path, top: int) -> None:
    with pytest.raises(UsageError, match=f"top {top}"):
        analyzed(tmp_path, make_document(), top=top)


# --- kernel classes ---


def test_kernel_classes_are_left_out_of_the_meaningful_pairs(tmp_path: Path) -> None:
    document = make_document(Layout(THREE))
    copy_signals(document, "h_1", "h_4")
    found = analyzed(tmp_path, document)
    for cell in every_cell(found):
        assert cell.kernel_classes == (("h_1", "h_4"),)
        assert (cell.off_diagonal_count, cell.meaningful_count) == (6, 4)
        assert cell.snr_infinite and cell.snr_meaningful_infinite
    copy_signals(document, "h_1", "h_2")
    for cell in every_cell(analyzed(tmp_path, document)):
        assert cell.kernel_classes == (("h_1", "h_2", "h_4"),)
        assert (cell.meaningful_count, cell.snr_meaningful, cell.snr_meaningful_infinite) == (0, None, False)
        assert (cell.snr, cell.snr_infinite, cell.label) == (0.0, False, "")


@pytest.mark.parametrize(("change", "same"), [(0.0, True), (1e-11, True), (1e-7, False)])
def test_a_kernel_class_is_nearer_than_a_billionth(tmp_path: Path, change: float, same: bool) -> None:
    document = make_document(Layout(references=("ref_0",), steps=0, layers=(1,), positions=(-1,), listed=0, keys=0))
    copy_signals(document, "h_1", "h_2")
    find_run(document, "h_2")["prefill"]["hidden_states"]["layer_1"]["pos_-1"][0] += change
    cell = analyzed(tmp_path, document)["prefill"]["hidden_states"]
    assert cell.kernel_classes == ((("h_1", "h_2"),) if same else ())
    assert (cell.matrix[0][1] == 0.0) == (change == 0.0)


@pytest.mark.parametrize("side", ["claimed", "observed"])
def test_a_kernel_class_of_either_machine_holds_between_two(tmp_path: Path, side: str) -> None:
    """By value: what one side cannot tell apart, no matrix between the two can."""
    documents = {
        "claimed": make_document(Layout(THREE_ELSEWHERE)),
        "observed": make_document(Layout((*reversed(THREE), ("h_8", "H100", 8)), seed=1)),
    }
    prefix = "a" if side == "claimed" else "h"
    copy_signals(documents[side], f"{prefix}_1", f"{prefix}_2")
    for cell in every_cell(analyzed(tmp_path, documents["claimed"], documents["observed"])):
        (members,) = cell.kernel_classes
        assert set(members) == {f"{prefix}_1", f"{prefix}_2"}
        # 3 by 4, 3 of them on the diagonal, and without (1, 2) and (2, 1).
        assert (cell.off_diagonal_count, cell.meaningful_count) == (9, 7)
        excluded = [entry(cell, "a_1", "h_2"), entry(cell, "a_2", "h_1")]
        meaningful = [
            entry(cell, row, column)
            for row, column in product(cell.configs, cell.observed_configs)
            if row[-1] != column[-1] and entry(cell, row, column) not in excluded
        ]
        diagonal = [entry(cell, f"a_{value}", f"h_{value}") for value in (1, 2, 4)]
        ratio = mean([each for each in meaningful if each]) / mean([each for each in diagonal if each])
        assert cell.snr_meaningful == pytest.approx(ratio, rel=1e-12)
        assert cell.snr is not None and cell.snr != pytest.approx(ratio, rel=1e-6)


# --- two experiments ---


def test_other_order_other_configs_other_references(tmp_path: Path) -> None:
    """Matched by value, over what both have: B lists its configs backwards, has one more and one less."""
    claimed = make_document(Layout(THREE_ELSEWHERE, references=("ref_0", "ref_1")))
    others = (("x", "H100", 8), ("y", "H100", 2), ("z", "H100", 1))
    observed = make_document(Layout(others, references=("ref_2", "ref_1"), seed=1))
    cell = analyzed(tmp_path, claimed, observed)["decode"]["hidden_states"].per_layer["layer_12"]
    assert (cell.configs, cell.observed_configs) == (("a_1", "a_2", "a_4"), ("x", "y", "z"))
    assert tuple(cell.per_reference) == ("ref_1",)
    naive = {
        (row, column): naive_vectors(
            find_run(claimed, row, "ref_1"), find_run(observed, column, "ref_1"), "decode", "hidden_states", "layer_12"
        )
        for row, column in product(cell.configs, cell.observed_configs)
    }
    for (row, column), distance in naive.items():
        assert entry(cell, row, column) == pytest.approx(distance, rel=1e-12)
    diagonal = mean([naive.pop(("a_1", "z")), naive.pop(("a_2", "y"))])
    assert cell.diagonal_mean == pytest.approx(diagonal, rel=1e-12)
    assert cell.off_diagonal_mean == pytest.approx(mean(list(naive.values())), rel=1e-12)
    assert cell.off_diagonal_count == 7
    assert cell.snr == pytest.approx(mean(list(naive.values())) / diagonal, rel=1e-12)
    pairs = {each.pair: each for each in cell.pairwise}
    assert pairs.keys() == {("a_1", "a_2"), ("a_1", "a_4"), ("a_2", "a_4"), ("a_1", "x"), ("a_2", "x"), ("a_4", "x")}
    both = pairs["a_1", "a_2"]
    assert both.signal == pytest.approx(mean([naive["a_1", "y"], naive["a_2", "z"]]), rel=1e-12)
    assert both.noise == pytest.approx(diagonal, rel=1e-12)
    assert both.snr == pytest.approx(both.signal / diagonal, rel=1e-12)
    one = pairs["a_4", "x"]
    assert (one.noise, one.snr, one.snr_infinite, one.label) == (None, None, False, ""), "neither has a diagonal"


def test_no_reference_in_common(tmp_path: Path) -> None:
    claimed = make_document(Layout(references=("ref_0", "ref_1")))
    observed = make_document(Layout(references=("ref_2",)))
    with pytest.raises(EvidenceError, match=r"no reference is in both claimed.json and observed.json") as error:
        analyzed(tmp_path, claimed, observed)
    assert "they hold ref_0, ref_1 and ref_2" in error.value.diagnostics()


@pytest.mark.parametrize(
    ("one", "other", "matched"),
    [
        (1, 1.0, True),
        (1, 1, True),
        ("awq", "awq", True),
        (None, None, True),
        (True, True, True),
        (1, True, False),
        (0, False, False),
        (1, "1", False),
        (None, "null", False),
        ("awq", "AWQ", False),
        (0.5, 0.25, False),
    ],
)
def test_configs_are_matched_by_value_and_kind(tmp_path: Path, one: Any, other: Any, matched: bool) -> None:
    claimed = make_document(Layout((("a", "A100", one),)))
    observed = make_document(Layout((("b", "H100", other),), seed=1))
    for cell in every_cell(analyzed(tmp_path, claimed, observed)):
        assert (cell.diagonal_mean == cell.matrix[0][0]) == matched
        assert (cell.off_diagonal_count == 0) == matched
        assert len(cell.cross_hardware_baseline) == matched


def test_configs_of_one_name_in_two_experiments_are_two(tmp_path: Path) -> None:
    claimed, observed = make_document(Layout(THREE)), make_document(Layout(THREE, seed=1))
    cell = analyzed(tmp_path, claimed, observed)["prefill"]["key_vectors"]
    assert cell.diagonal_mean is not None and cell.diagonal_mean > 0
    assert len(cell.cross_hardware_baseline) == 3, "two machines, though their hardware has one name"
    assert all(each.hardware == ("H100", "H100") for each in cell.cross_hardware_baseline)


def test_a_config_without_a_reference(tmp_path: Path) -> None:
    """Its entries are means over the references that it has."""
    document = make_document(Layout(THREE))
    document["runs"] = [run for run in document["runs"] if (run["config_id"], run["ref_id"]) != ("h_2", "ref_1")]
    for cell in every_cell(analyzed(tmp_path, document)):
        assert [entry(cell, "h_2", name, "ref_1") for name in cell.configs] == [None] * 3
        assert entry(cell, "h_1", "h_2") == entry(cell, "h_1", "h_2", "ref_0")
        both = [entry(cell, "h_1", "h_4", reference) for reference in ("ref_0", "ref_1")]
        assert entry(cell, "h_1", "h_4") == pytest.approx(mean([each for each in both if each]), rel=1e-12)
        assert cell.off_diagonal_count == 6


def test_a_config_without_runs(tmp_path: Path) -> None:
    document = make_document(Layout(THREE))
    document["runs"] = [run for run in document["runs"] if run["config_id"] != "h_2"]
    for cell in every_cell(analyzed(tmp_path, document)):
        assert cell.configs == ("h_1", "h_2", "h_4")
        assert cell.matrix[1] == (None, None, None)
        assert cell.off_diagonal_count == 2 and [each.pair for each in cell.pairwise] == [("h_1", "h_4")]
        assert cell.reproducible == {"h_1": None, "h_2": None, "h_4": None}


def test_a_signal_that_one_side_does_not_have(tmp_path: Path) -> None:
    found = analyzed(tmp_path, make_document(), make_document(Layout(keys=0, seed=1)))
    cell = found["prefill"]["key_vectors"]
    assert cell.matrix == ((None, None), (None, None))
    assert (cell.diagonal_mean, cell.off_diagonal_mean, cell.snr, cell.pairwise) == (None, None, None, ())
    assert found["prefill"]["hidden_states"].snr is not None


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (Layout(positions=(-2, -1)), "measured at different positions"),
        (Layout(hidden=5), "have 4 and 5 values"),
    ],
)
def test_experiments_that_cannot_be_compared(tmp_path: Path, other: Layout, says: str) -> None:
    with pytest.raises(EvidenceError, match=says) as error:
        analyzed(tmp_path, make_document(), make_document(other))
    assert error.value.diagnostics().startswith("ref_0, prefill, hidden_states, layer_1: h_1 and h_1")


def test_different_prompts_under_one_name(tmp_path: Path) -> None:
    document = make_document()
    document["runs"][3]["prompt_sha256"] = "other"
    with pytest.raises(EvidenceError, match=r"runs\[3\].prompt_sha256: another prompt"):
        analyzed(tmp_path, document)
    observed = make_document()
    for run in observed["runs"]:
        run["prompt_sha256"] = "other"
    with pytest.raises(EvidenceError, match="ref_0 is another prompt for h_1 than for h_1"):
        analyzed(tmp_path, make_document(), observed)
    for run in observed["runs"]:
        del run["prompt_sha256"]
    assert analyzed(tmp_path, make_document(), observed), "nothing is said of the prompt: nothing is wrong with it"


def test_hostile_names_stay_one_line(tmp_path: Path) -> None:
    configs = (("a\nb\x1b[31m" + "c" * 5000, "H100", 1),)
    with pytest.raises(EvidenceError) as error:
        analyzed(tmp_path, make_document(Layout(configs)), make_document(Layout(configs, hidden=5)))
    assert error.value.diagnostics().isprintable() and len(error.value.diagnostics()) < 300


def test_a_distance_beyond_float64_is_refused(tmp_path: Path) -> None:
    """Rather than an infinite entry, or a warning on the screen."""
    document = make_document()
    find_run(document, "h_2")["prefill"]["hidden_states"]["layer_1"]["pos_-1"][0] = 1e200
    with pytest.raises(EvidenceError, match=r"ref_0, prefill/hidden_states/layer_1: a distance is too large"):
        analyzed(tmp_path, document)


# --- diverged tokens ---


def test_diverged_tokens_have_no_decode_distance(tmp_path: Path) -> None:
    document = make_document(Layout(THREE, steps=3))
    find_run(document, "h_4", "ref_1")["decode_steps"][1]["token_id"] = 99
    found = analyzed(tmp_path, document)
    for cell in (*found["decode"].values(), *found["decode"]["hidden_states"].per_layer.values()):
        assert [entry(cell, "h_4", name, "ref_1") for name in cell.configs] == [None, None, 0.0]
        assert [entry(cell, name, "h_4", "ref_1") for name in cell.configs] == [None, None, 0.0]
        assert entry(cell, "h_1", "h_2", "ref_1") is not None
        assert entry(cell, "h_1", "h_4") == entry(cell, "h_1", "h_4", "ref_0"), "only where they did not diverge"
        assert [msgspec.to_builtins(each) for each in cell.diverged] == [
            {"configs": ("h_1", "h_4"), "reference": "ref_1", "step": 1},
            {"configs": ("h_2", "h_4"), "reference": "ref_1", "step": 1},
        ]
    for cell in found["prefill"].values():
        assert cell.diverged == () and None not in sum(cell.per_reference["ref_1"], ())


def test_where_all_diverged_there_is_nothing_to_say(tmp_path: Path) -> None:
    claimed, observed = make_document(Layout(steps=1)), make_document(Layout(steps=1, seed=1))
    for run in observed["runs"]:
        run["decode_steps"][0]["token_id"] = 99
    found = analyzed(tmp_path, claimed, observed)
    for cell in found["decode"].values():
        assert cell.matrix == ((None, None), (None, None))
        assert (cell.diagonal_mean, cell.off_diagonal_mean, cell.off_diagonal_count) == (None, None, 0)
        assert (cell.snr, cell.snr_infinite, cell.label, cell.pairwise) == (None, False, "", ())
        assert len(cell.diverged) == 8 and cell.cross_hardware_baseline == ()
    assert all(cell.snr is not None for cell in found["prefill"].values())


def test_a_run_that_stopped_earlier_diverged_there(tmp_path: Path) -> None:
    document = make_document(Layout(references=("ref_0",), steps=3))
    find_run(document, "h_2")["decode_steps"].pop()
    cell = analyzed(tmp_path, document)["decode"]["key_vectors"]
    assert cell.matrix == ((0.0, None), (None, 0.0))
    assert [(each.configs, each.step) for each in cell.diverged] == [(("h_1", "h_2"), 2)]


def test_canonical_ids_of_a_first_config_that_was_elsewhere(tmp_path: Path) -> None:
    """Where the first config's tokens diverged, its ids are of other texts: the row's own are used."""
    document = make_document(Layout(THREE, references=("ref_0",)))
    find_run(document, "h_1")["decode_steps"][0]["token_id"] = 99
    found = analyzed(tmp_path, document, canonical="first", top=2)
    ours, theirs, first = (find_run(document, name) for name in ("h_2", "h_4", "h_1"))
    decode, _ = naive_logprobs(ours, theirs, "decode", ours, 2)
    assert entry(found["decode"]["logprobs"], "h_2", "h_4") == pytest.approx(decode, rel=1e-12)
    prefill, _ = naive_logprobs(ours, theirs, "prefill", first, 2)
    assert entry(found["prefill"]["logprobs"], "h_2", "h_4") == pytest.approx(prefill, rel=1e-12)


# --- reproducibility ---


def test_repetitions_that_differ_in_one_number(tmp_path: Path) -> None:
    """Only where they differ: that config, phase, signal and layer."""
    document = make_document(Layout(repetitions=3))
    vector = find_run(document, "h_2", "ref_1", 2)["decode_steps"][1]["key_vectors"]["layer_12"]["pos_-2"]
    vector[1] = math.nextafter(vector[1], 9.0)
    found = analyzed(tmp_path, document)
    wrong = (found["decode"]["key_vectors"], found["decode"]["key_vectors"].per_layer["layer_12"])
    for cell in every_cell(found):
        assert cell.reproducible == {"h_1": True, "h_2": not any(cell is each for each in wrong)}


def test_repetitions_with_other_ids_tokens_or_phases_differ(tmp_path: Path) -> None:
    document = make_document(Layout(repetitions=2, references=("ref_0",)))
    changed = copy.deepcopy(document)
    find_run(changed, "h_1", "ref_0", 1)["prefill"]["logprobs"]["pos_-1"]["token_ids"].reverse()
    cell = analyzed(tmp_path, changed)["prefill"]["logprobs"]
    assert cell.reproducible == {"h_1": False, "h_2": True}
    changed = copy.deepcopy(document)
    find_run(changed, "h_1", "ref_0", 1)["decode_steps"].pop()
    found = analyzed(tmp_path, changed)
    for cell in found["decode"].values():
        assert cell.reproducible == {"h_1": False, "h_2": True}
    for cell in found["prefill"].values():
        assert cell.reproducible == {"h_1": True, "h_2": True}


def test_a_single_repetition_is_what_the_document_says_of_it(tmp_path: Path) -> None:
    document = make_document(Layout((*THREE, ("h_8", "H100", 8))))
    said = {"h_2": (True, True), "h_4": (False, True), "h_8": (True, True)}
    for run in document["runs"]:
        if run["config_id"] in said:
            identical = said[run["config_id"]][run["ref_id"] == "ref_1"]
            run["repetitions"] = {"count": 3, "bit_identical": identical}
    find_run(document, "h_8", "ref_0")["repetitions"]["count"] = 1  # no repetition at all
    for cell in every_cell(analyzed(tmp_path, document)):
        assert cell.reproducible == {"h_1": None, "h_2": True, "h_4": False, "h_8": True}


def test_a_name_in_two_experiments_is_reproducible_in_both(tmp_path: Path) -> None:
    claimed, observed = make_document(Layout(repetitions=2)), make_document(Layout(repetitions=2, seed=1))
    find_run(observed, "h_2", "ref_0", 1)["prefill"]["logprobs"]["pos_-1"]["log_probs"][0] -= 1e-9
    found = analyzed(tmp_path, claimed, observed)
    assert found["prefill"]["logprobs"].reproducible == {"h_1": True, "h_2": False}
    assert found["decode"]["logprobs"].reproducible == {"h_1": True, "h_2": True}


def test_distances_are_between_first_repetitions(tmp_path: Path) -> None:
    """As in the plan's sketch, wherever in the file they lie."""
    document = make_document(Layout(repetitions=2, references=("ref_0",)))
    other = find_run(document, "h_2", "ref_0", 1)["prefill"]["hidden_states"]["layer_1"]["pos_-1"]
    other[0] += 100.0
    document["runs"].reverse()
    cell = analyzed(tmp_path, document)["prefill"]["hidden_states"].per_layer["layer_1"]
    naive = naive_vectors(find_run(document, "h_1"), find_run(document, "h_2"), "prefill", "hidden_states", "layer_1")
    assert cell.matrix[0][1] == pytest.approx(naive, rel=1e-12)


# --- the plan's questions ---


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
            assert set(getattr(one, question)) == set(getattr(two, question))
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


def test_without_a_second_machine_there_is_no_noise_floor(tmp_path: Path) -> None:
    cell = analyzed(tmp_path, make_document(Layout(THREE)))["decode"]["hidden_states"]
    assert (cell.cross_hardware_baseline, cell.across_hardware) == ((), ())
    assert [each.configs for each in cell.within_hardware] == [("h_1", "h_2"), ("h_1", "h_4")]
    assert all((each.snr, each.snr_infinite, each.label) == (None, False, "") for each in cell.within_hardware)


# --- the result as JSON ---

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


def test_memory_is_one_references_worth(tmp_path: Path) -> None:
    """The runs of a reference are let go before the next one is read."""
    document = make_document(Layout(references=("ref_0",), hidden=800, listed=0, keys=0, steps=0))

    def peak(references: int) -> int:
        many = document | {
            "runs": [run | {"ref_id": f"ref_{i}"} for run in document["runs"] for i in range(references)]
        }
        with open_experiment(write_document(many, tmp_path / "a.json")) as experiment:
            analyze(experiment)
            tracemalloc.start()
            analyze(experiment)
            used = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        return used

    one_run = 2 * 3 * 800 * 8
    assert peak(10) < peak(2) + one_run
