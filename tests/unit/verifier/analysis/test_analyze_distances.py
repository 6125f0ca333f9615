"""Distances of made-up experiments against plain loops over the same numbers, and what cannot be compared."""

from __future__ import annotations

import tracemalloc
from itertools import product
from pathlib import Path
from typing import Any

import msgspec
import pytest
from lab_analysis import SIGNALS, THREE, THREE_ELSEWHERE, analyzed, entry
from lab_documents import (
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
from fpforensics.verifier.analysis import analyze


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


def test_a_distance_beyond_float64_is_refused(tmp_path: Path) -> None:
    """Rather than an infinite entry, or a warning on the screen."""
    document = make_document()
    find_run(document, "h_2")["prefill"]["hidden_states"]["layer_1"]["pos_-1"][0] = 1e200
    with pytest.raises(EvidenceError, match=r"ref_0, prefill/hidden_states/layer_1: a distance is too large"):
        analyzed(tmp_path, document)


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
        asked = [(each.question, each.pairs, each.diverged, each.step) for each in cell.unanswered]
        # Within one machine the tokens are the same.
        assert asked == [("cross_hardware_baseline", 2, 2, 0), ("across_hardware", 2, 2, 0)]
    assert not any(cell.unanswered for cell in found["prefill"].values())
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


def test_distances_are_between_first_repetitions(tmp_path: Path) -> None:
    """As in the plan's sketch, wherever in the file they lie."""
    document = make_document(Layout(repetitions=2, references=("ref_0",)))
    other = find_run(document, "h_2", "ref_0", 1)["prefill"]["hidden_states"]["layer_1"]["pos_-1"]
    other[0] += 100.0
    document["runs"].reverse()
    cell = analyzed(tmp_path, document)["prefill"]["hidden_states"].per_layer["layer_1"]
    naive = naive_vectors(find_run(document, "h_1"), find_run(document, "h_2"), "prefill", "hidden_states", "layer_1")
    assert cell.matrix[0][1] == pytest.approx(naive, rel=1e-12)


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
