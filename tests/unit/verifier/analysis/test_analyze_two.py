"""Two experiments side by side: what is matched, what one of them lacks, what does not fit."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
from lab_analysis import THREE, THREE_ELSEWHERE, analyzed, entry, every_cell
from lab_documents import (
    Layout,
    find_run,
    make_document,
    mean,
    naive_vectors,
)

from fpforensics.common.errors import EvidenceError, UsageError
from fpforensics.verifier.analysis import CellAnalysis


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


def gaps(cell: CellAnalysis) -> set[tuple[str, str, str, tuple[str, ...]]]:
    return {(each.side, each.reason, each.config, each.references) for each in cell.not_compared}


def test_what_one_side_lacks_is_said(tmp_path: Path) -> None:
    claimed = make_document(Layout(THREE_ELSEWHERE, references=("ref_0", "ref_1", "ref_2")))
    observed = make_document(Layout((*THREE[:2], ("x", "H100", 8)), references=("ref_0", "ref_1", "ref_3"), seed=1))
    observed["runs"] = [run for run in observed["runs"] if (run["config_id"], run["ref_id"]) != ("h_2", "ref_1")]
    said = {
        ("claimed", "one side", "", ("ref_2",)),
        ("observed", "one side", "", ("ref_3",)),
        ("claimed", "no counterpart", "a_4", ()),
        ("observed", "no counterpart", "x", ()),
        ("observed", "not measured", "h_2", ("ref_1",)),
    }
    for cell in every_cell(analyzed(tmp_path, claimed, observed)):
        assert gaps(cell) == said
    for cell in every_cell(
        analyzed(tmp_path, claimed, make_document(Layout(THREE, ("ref_0", "ref_1", "ref_2"), seed=1)))
    ):
        assert gaps(cell) == set()


def test_what_one_file_lacks_is_said(tmp_path: Path) -> None:
    """A config without runs; one without a reference; one without a layer, which is then not pooled either."""
    document = make_document(Layout((*THREE, ("h_8", "H100", 8)), references=("ref_0", "ref_1"), steps=0))
    document["runs"] = [
        run
        for run in document["runs"]
        if run["config_id"] != "h_8" and (run["config_id"], run["ref_id"]) != ("h_4", "ref_0")
    ]
    for run in document["runs"]:
        if run["ref_id"] == "ref_1":
            del run["prefill"]["key_vectors"]["layer_12"]
    found = analyzed(tmp_path, document)["prefill"]
    never, once = ("claimed", "not measured", "h_8", ()), ("claimed", "not measured", "h_4", ("ref_0",))
    assert gaps(found["logprobs"]) == gaps(found["hidden_states"]) == {never, once}
    keys = found["key_vectors"]
    assert gaps(keys.per_layer["layer_1"]) == {never, once}
    no_layer = {("claimed", "not measured", "", ("ref_1",)), never, ("claimed", "not measured", "h_4", ())}
    assert gaps(keys) == gaps(keys.per_layer["layer_12"]) == no_layer
    # Means of other layers are no mean of these: the reference has no pooled distance.
    assert entry(keys, "h_1", "h_2", "ref_1") is None
    assert entry(keys.per_layer["layer_1"], "h_1", "h_2", "ref_1") is not None
    assert entry(keys, "h_1", "h_2") == entry(keys, "h_1", "h_2", "ref_0")


def test_a_signal_that_one_side_lacks_is_said_once(tmp_path: Path) -> None:
    found = analyzed(tmp_path, make_document(), make_document(Layout(keys=0, seed=1)))
    assert gaps(found["prefill"]["key_vectors"]) == {("observed", "not measured", "", ())}
    assert gaps(found["prefill"]["logprobs"]) == set()


def test_a_pair_of_two_experiments_is_one_of_values(tmp_path: Path) -> None:
    """Its ids are the claimed ones, where there are any: its values say which distances it is of."""
    claimed = make_document(Layout(THREE_ELSEWHERE[:2]))
    observed = make_document(Layout((("x", "H100", 8), ("y", "H100", 2)), seed=1))
    for cell in every_cell(analyzed(tmp_path, claimed, observed)):
        pairs = {each.values: each for each in cell.pairwise}
        assert {values: each.pair for values, each in pairs.items()} == {
            ("1", "2"): ("a_1", "a_2"),
            ("1", "8"): ("a_1", "x"),
            ("2", "8"): ("a_2", "x"),
        }
        assert pairs["1", "2"].signal == entry(cell, "a_1", "y")
    for cell in every_cell(analyzed(tmp_path, claimed)):
        assert [(each.pair, each.values) for each in cell.pairwise] == [(("a_1", "a_2"), ("1", "2"))]


def test_two_variables_are_not_compared(tmp_path: Path) -> None:
    observed = make_document(Layout(seed=1))
    observed["experiment_metadata"]["variable_tested"] = "other"
    with pytest.raises(UsageError) as error:
        analyzed(tmp_path, make_document(), observed)
    assert error.value.message == "claimed.json tests 'value' and observed.json tests 'other'"


def test_runs_without_any_signal(tmp_path: Path) -> None:
    with pytest.raises(EvidenceError, match=r"claimed\.json: no run holds a signal"):
        analyzed(tmp_path, make_document(Layout(prefill=False, steps=0)))
