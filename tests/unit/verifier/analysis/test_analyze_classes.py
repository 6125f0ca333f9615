"""Kernel classes, and whether a config is reproducible."""

from __future__ import annotations

import copy
import math
from itertools import product
from pathlib import Path

import pytest
from lab_analysis import THREE, THREE_ELSEWHERE, analyzed, copy_signals, entry, every_cell
from lab_documents import (
    Layout,
    find_run,
    make_document,
    mean,
)


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


def test_a_class_of_the_same_ids_in_both_is_named_once(tmp_path: Path) -> None:
    claimed, observed = make_document(Layout(THREE)), make_document(Layout(THREE, seed=1))
    copy_signals(claimed, "h_1", "h_2")
    copy_signals(observed, "h_1", "h_2")
    copy_signals(claimed, "h_1", "h_4")
    for cell in every_cell(analyzed(tmp_path, claimed, observed)):
        assert cell.kernel_classes == (("h_1", "h_2", "h_4"), ("h_1", "h_2"))
        assert cell.kernel_class_sides == (("claimed",), ("observed",))
    copy_signals(observed, "h_1", "h_4")
    for cell in every_cell(analyzed(tmp_path, claimed, observed)):
        assert (cell.kernel_classes, cell.kernel_class_sides) == ((("h_1", "h_2", "h_4"),), (("claimed", "observed"),))


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
        assert cell.kernel_class_sides == ((side,),)
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
