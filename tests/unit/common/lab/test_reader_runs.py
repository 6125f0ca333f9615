"""Reading what is right: every number at its place, in order, with what the document says of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from lab_documents import LAB_FILES, Json, Layout, find_run, lab_document, lab_path, make_document, write_document
from lab_problems import SMALL, changed, set_at

from fpforensics.common.lab.reader import open_experiment


@pytest.mark.parametrize("name", LAB_FILES)
def test_published_recordings_are_read_whole(name: str) -> None:
    """Every number of the file comes out, at its place."""
    document = lab_document(name)
    with open_experiment(lab_path(name)) as experiment:
        assert [each.raw for each in experiment.configurations] == document["configurations"]
        assert experiment.metadata == document["experiment_metadata"]
        assert len(experiment.runs) == len(document["runs"])
        for info, raw in zip(experiment.runs, document["runs"], strict=True):
            assert (info.config_id, info.ref_id, info.rep_id) == (raw["config_id"], raw["ref_id"], raw["rep_id"])
            signals = experiment.read(info).phases["prefill"]
            for signal, layers in ((name, raw["prefill"][name]) for name in raw["prefill"] if name != "logprobs"):
                for layer, positions in layers.items():
                    vectors = signals.vectors[signal, layer]
                    assert {f"pos_{at}" for _, at in vectors.places} == set(positions)
                    for (_, at), values in zip(vectors.places, vectors.values, strict=True):
                        assert values.tolist() == positions[f"pos_{at}"]
            if signals.logprobs is not None:
                ranked = signals.logprobs
                for (_, at), ids, values in zip(ranked.places, ranked.ids, ranked.logprobs, strict=True):
                    top = raw["prefill"]["logprobs"][f"pos_{at}"]
                    listed = len(top["token_ids"])
                    assert (ids[:listed].tolist(), values[:listed].tolist()) == (top["token_ids"], top["log_probs"])
                    assert (ids[listed:] == -1).all() and np.isnan(values[listed:]).all()


def test_places_come_in_order_whatever_the_files_order(tmp_path: Path) -> None:
    document = make_document(Layout(positions=(-1, -3, -20)))
    with open_experiment(write_document(document, tmp_path / "a.json")) as experiment:
        run = experiment.read(experiment.runs[1])
    vectors = run.phases["decode"].vectors["key_vectors", "layer_12"]
    assert vectors.places == ((0, -20), (0, -3), (0, -1), (1, -20), (1, -3), (1, -1))
    raw = find_run(document, "h_1", "ref_1")["decode_steps"][1]["key_vectors"]["layer_12"]
    assert vectors.values[3].tolist() == raw["pos_-20"]


def test_first_repetitions_come_first(tmp_path: Path) -> None:
    """Distances are between the first repetitions, wherever they lie in the file."""
    document = make_document(Layout(references=("ref_0",), repetitions=2))
    document["runs"].reverse()
    with open_experiment(write_document(document, tmp_path / "a.json")) as experiment:
        order = [(run.info.rep_id, run.info.config_id) for run in experiment.read_all("ref_0")]
    assert order == [(0, "h_2"), (0, "h_1"), (1, "h_2"), (1, "h_1")]


@pytest.mark.parametrize(
    ("run", "tokens"),
    [
        ({"decode_steps": []}, None),
        ({"decode_steps": [], "token_ids": [7, 8]}, (7, 8)),
        ({"decode_steps": [{"step": 0, "token_id": 5}, {"step": 1, "token_id": 6}]}, (5, 6)),
        ({"decode_steps": [{"step": 0, "token_id": 5}, {"step": 1}]}, None),
        ({"decode_steps": [{"step": 0}, {"step": 1}], "token_ids": [5, 6, 7]}, (5, 6)),
        # The last generated token was never fed to the model: its distances do not depend on it.
        ({"decode_steps": [{"step": 0, "token_id": 5}], "token_ids": [5, 6]}, (5,)),
        # Steps were left out: what lies between them counts too.
        ({"decode_steps": [{"step": 0, "token_id": 5}, {"step": 3, "token_id": 8}], "token_ids": [5, 6, 7, 8, 9]}, (5, 6, 7, 8)),
    ],
)  # fmt: skip
def test_tokens_are_those_that_were_fed(tmp_path: Path, run: Json, tokens: tuple[int, ...] | None) -> None:
    document = make_document(SMALL)
    document["runs"] = [{"config_id": "h_1", "rep_id": 0} | run]
    with open_experiment(write_document(document, tmp_path / "a.json")) as experiment:
        assert experiment.runs[0].tokens == tokens
        assert experiment.runs[0].ref_id == "ref_0"


@pytest.mark.parametrize(
    ("repetitions", "said"),
    [({"count": 3, "bit_identical": True}, True), ({"count": 3, "bit_identical": False}, False), ({"count": 1, "bit_identical": True}, None)],
)  # fmt: skip
def test_what_the_document_says_of_repetitions(tmp_path: Path, repetitions: Json, said: bool | None) -> None:
    document = changed(set_at("runs", 0, "repetitions", to=repetitions))
    with open_experiment(write_document(document, tmp_path / "a.json")) as experiment:
        assert [info.bit_identical for info in experiment.runs] == [said, None, None, None]
