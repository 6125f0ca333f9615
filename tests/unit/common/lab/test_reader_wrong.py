"""What is wrong with a document is one clear line that names where."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from lab_documents import Json, Layout, make_document, write_document
from lab_problems import SMALL, changed, problem_of, read_everything, rename, set_at

from fpforensics.common.errors import EvidenceError
from fpforensics.common.lab.document import MAX_CONFIGURATIONS

LOGPROBS = ("runs", 3, "decode_steps", 0, "logprobs", "pos_-1")

WRONG: dict[str, tuple[Callable[[Json], None], str]] = {
    "unknown config": (
        set_at("runs", 1, "config_id", to="h_3"),
        r"runs\[1\].config_id: 'h_3' is no configuration, did you mean 'h_2'\?",
    ),
    "same run twice": (
        set_at("runs", 1, "ref_id", to="ref_0"),
        r"runs\[1\]: h_1, ref_0, repetition 0 is runs\[0\] already",
    ),
    "same config twice": (
        set_at("configurations", 1, "config_id", to="h_1"),
        r"configurations\[1\].config_id: 'h_1' is configurations\[0\] already",
    ),
    "too many configs": (
        set_at("configurations", to=[{"config_id": str(i), "hardware": "h", "variable_value": i} for i in range(1025)]),
        rf"configurations: 1025 of them, at most {MAX_CONFIGURATIONS} are compared",
    ),
    "no runs": (set_at("runs", to=[]), "runs: an empty list"),
    "no configurations": (set_at("configurations", to=[]), "configurations: an empty list"),
    "negative step": (
        set_at("runs", 0, "decode_steps", 0, "step", to=-1),
        r"runs\[0\].decode_steps\[0\].step: -1 is less than the minimum of 0",
    ),
    "negative repetition": (set_at("runs", 0, "rep_id", to=-1), r"runs\[0\].rep_id: -1 is less than the minimum of 0"),
    "steps out of order": (
        set_at("runs", 0, "decode_steps", 0, "step", to=5),
        r"runs\[0\].decode_steps\[1\].step: 1 after 5",
    ),
    "step twice": (
        set_at("runs", 0, "decode_steps", 1, "step", to=0),
        r"runs\[0\].decode_steps\[1\].step: 0 after 0",
    ),
    "positive log_prob": (
        set_at(*LOGPROBS, "log_probs", 2, to=0.5),
        r"runs\[3\].decode_steps\[0\].logprobs.pos_-1: log_prob 0.5 is above 0",
    ),
    "token id twice": (
        set_at(*LOGPROBS, "token_ids", to=[4, 5, 4, 6]),
        r"runs\[3\].decode_steps\[0\].logprobs.pos_-1: token id 4 is listed twice",
    ),
    "negative token id": (
        set_at(*LOGPROBS, "token_ids", 2, to=-4),
        r"runs\[3\].decode_steps\[0\].logprobs.pos_-1.token_ids\[2\]: Expected `int` >= 0",
    ),
    "token id beyond 64 bits": (
        set_at(*LOGPROBS, "token_ids", 2, to=2**63),
        r"runs\[3\].decode_steps\[0\].logprobs.pos_-1.token_ids\[2\]: Expected `int` <= 9223372036854775807",
    ),
    "nothing listed": (
        set_at(*LOGPROBS, to={"token_ids": [], "log_probs": []}),
        r"runs\[3\].decode_steps\[0\].logprobs.pos_-1: no token_ids",
    ),
    "empty vector": (
        set_at("runs", 0, "prefill", "hidden_states", "layer_1", "pos_-2", to=[]),
        r"runs\[0\].prefill.hidden_states.layer_1.pos_-2: no values",
    ),
    "ragged within a run": (
        set_at("runs", 0, "decode_steps", 1, "key_vectors", "layer_12", "pos_-1", to=[1.0, 2.0]),
        r"runs\[0\].decode_steps\[1\].key_vectors.layer_12.pos_-1: 2 values, 3 in "
        r"runs\[0\].decode_steps\[0\].key_vectors.layer_12.pos_-2",
    ),
    "longer within a run": (
        set_at("runs", 0, "decode_steps", 1, "key_vectors", "layer_12", "pos_-1", to=[1.0, 2.0, 3.0, 4.0]),
        r"runs\[0\].decode_steps\[1\].key_vectors.layer_12.pos_-1: 4 values, 3 in "
        r"runs\[0\].decode_steps\[0\].key_vectors.layer_12.pos_-2",
    ),
    "ragged between runs": (
        set_at("runs", 3, "prefill", "key_vectors", "layer_12", to={"pos_-2": [1.0, 2.0], "pos_-1": [1.0, 2.0]}),
        r"runs\[3\].prefill.key_vectors.layer_12: 2 values, 3 in runs\[1\]",
    ),
    "other positions": (
        rename("runs", 3, "prefill", "key_vectors", "layer_12", "pos_-2", to="pos_-3"),
        r"runs\[3\].prefill.key_vectors.layer_12: positions -3, -1 \(2 in all\), -2, -1 \(2 in all\) in runs\[1\]",
    ),
    "fewer positions": (
        set_at("runs", 3, "decode_steps", 0, "logprobs", to={}),
        r"runs\[3\].decode_steps.logprobs: positions -2, -1 \(2 in all\), -2, -1 \(4 in all\) in runs\[1\]",
    ),
    "other layers": (
        rename("runs", 3, "prefill", "hidden_states", "layer_12", to="layer_13"),
        r"runs\[3\].prefill.hidden_states.layer_12: missing, unlike in runs\[1\]",
    ),
    "prefill only in one": (
        lambda document: document["runs"][3].pop("prefill"),
        r"runs\[3\].prefill: missing, unlike in runs\[1\]",
    ),
    "another prompt": (
        set_at("runs", 3, "prompt_sha256", to="other"),
        r"runs\[3\].prompt_sha256: another prompt than runs\[1\] has for ref_1",
    ),
    "bad layer name": (
        rename("runs", 0, "prefill", "hidden_states", "layer_12", to="lay\ner\x1b[31m" + "x" * 9999),
        r"runs\[0\].prefill.hidden_states: layer 'lay.er.\[31mx+…' is not named like layer_12",
    ),
    "layer zero": (
        rename("runs", 0, "prefill", "hidden_states", "layer_12", to="layer_0"),
        r"runs\[0\].prefill.hidden_states: layer 'layer_0' is not named like layer_12",
    ),
    "layer of many digits": (
        rename("runs", 0, "prefill", "hidden_states", "layer_12", to="layer_" + "1" * 5000),
        r"runs\[0\].prefill.hidden_states: layer 'layer_1+…' is not named like layer_12",
    ),
    "bad position name": (
        rename("runs", 0, "prefill", "logprobs", "pos_-1", to="pos_1"),
        r"runs\[0\].prefill.logprobs: position 'pos_1' is not named like pos_-1",
    ),
    "position zero": (
        rename("runs", 0, "prefill", "logprobs", "pos_-1", to="pos_-0"),
        r"runs\[0\].prefill.logprobs: position 'pos_-0' is not named like pos_-1",
    ),
    "one position under two names": (
        set_at("runs", 0, "prefill", "hidden_states", "layer_1", "pos_-01", to=[1.0, 2.0, 3.0, 4.0]),
        r"runs\[0\].prefill.hidden_states.layer_1: position 'pos_-01' is not named like pos_-1",
    ),
    "null prefill": (set_at("runs", 0, "prefill", to=None), r"runs\[0\].prefill: null where object is expected"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_one_line_that_names_where(tmp_path: Path, name: str) -> None:
    change, says = WRONG[name]
    assert re.fullmatch(says, problem_of(write_document(changed(change), tmp_path / "a.json")))


def test_the_unwrong_document_is_read(tmp_path: Path) -> None:
    """The control of the test above."""
    read_everything(write_document(make_document(SMALL), tmp_path / "a.json"))


REPEATED = {
    '"runs":': ('"runs": [], "runs":', "the document: 'runs' is given twice"),
    '"variable_tested":': ('"variable_tested": "x", "variable_tested":', "experiment_metadata: 'variable_tested' is given twice"),
    '"hardware": "H100", "variable_value": 2': ('"hardware": "A", "hardware": "H100", "variable_value": 2', "configurations[1]: 'hardware' is given twice"),
    '"layer_12":': ('"layer_12": {}, "layer_12":', "runs[0].prefill.hidden_states: 'layer_12' is given twice"),
    '"token_ids":': ('"token_ids": [1], "token_ids":', "runs[0].prefill.logprobs.pos_-2: 'token_ids' is given twice"),
}  # fmt: skip


@pytest.mark.parametrize("name", REPEATED)
def test_a_name_given_twice_is_not_the_last_one(tmp_path: Path, name: str) -> None:
    written = json.dumps(make_document(SMALL))
    assert name in written
    twice, says = REPEATED[name]
    (tmp_path / "a.json").write_text(written.replace(name, twice, 1))
    assert problem_of(tmp_path / "a.json") == says


def test_nine_log_probs_for_ten_token_ids(tmp_path: Path) -> None:
    document = make_document(Layout(listed=10, vocabulary=12))
    read_everything(write_document(document, tmp_path / "good.json"))
    del document["runs"][3]["decode_steps"][0]["logprobs"]["pos_-1"]["log_probs"][9]
    path = write_document(document, tmp_path / "a.json")
    assert problem_of(path) == "runs[3].decode_steps[0].logprobs.pos_-1: 9 log_probs for 10 token_ids"
    with pytest.raises(EvidenceError) as error:
        read_everything(path)
    assert error.value.diagnostics().startswith("runs[3].decode_steps[0].logprobs.pos_-1: 9 log_probs for 10")


@pytest.mark.parametrize(
    ("token", "says"),
    [
        ("NaN", "NaN is not a number"),
        ("Infinity", "Infinity is not a number"),
        ("-Infinity", "-Infinity is not a number"),
        ("1e999", "Number out of range"),
        ("1" * 400, "Number out of range"),
        ("null", "Expected `float`, got `null`"),
        ('"0.5"', "Expected `float`, got `str`"),
        ("true", "Expected `float`, got `bool`"),
        ("[]", "Expected `float`, got `array`"),
        ("{}", "Expected `float`, got `object`"),
    ],
)
@pytest.mark.parametrize(
    "where",
    [
        ("runs", 3, "decode_steps", 1, "hidden_states", "layer_12", "pos_-2", 2),
        ("runs", 0, "prefill", "key_vectors", "layer_1", "pos_-1", 0),
        (*LOGPROBS, "log_probs", 3),
    ],
)
def test_what_is_no_number_is_named_with_its_index(
    tmp_path: Path, where: tuple[str | int, ...], token: str, says: str
) -> None:
    text = json.dumps(changed(set_at(*where, to="HERE"))).replace('"HERE"', token)
    (tmp_path / "a.json").write_text(text)
    path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in where)[1:]
    assert problem_of(tmp_path / "a.json") == f"{path}: {says}"


def test_a_nan_is_found_in_a_document_too_large_to_parse_twice(tmp_path: Path) -> None:
    """Python's own writer makes NaN: the likeliest defect of a large file must not be a byte's number only."""
    document = make_document(Layout(references=("ref_0",), steps=1, layers=(1,), positions=(-1,), hidden=1000))
    document["runs"][1]["decode_steps"][0]["hidden_states"]["layer_1"]["pos_-1"][700] = float("nan")
    document["runs"][0]["prompt_text"] = 'a "quoted", [nested] \\ text ' * 500_000
    path = write_document(document, tmp_path / "a.json")
    assert path.stat().st_size > 10 << 20
    assert problem_of(path) == "runs[1].decode_steps[0].hidden_states.layer_1.pos_-1[700]: NaN is not a number"


def test_padding_does_not_multiply(tmp_path: Path) -> None:
    """One endless list among thousands of short ones: as a table, 16 times what was listed at most."""
    document = make_document(Layout(references=("ref_0",), steps=0, hidden=0, keys=0))
    short: Json = {"token_ids": [1], "log_probs": [-1.0]}
    tops = {f"pos_-{at}": short for at in range(1, 3000)}
    tops["pos_-7"] = {"token_ids": list(range(5000)), "log_probs": [-1.0] * 5000}
    for run in document["runs"]:
        run["prefill"]["logprobs"] = tops
    says = "runs[0].prefill.logprobs.pos_-7: 5000 token_ids, far more than at other positions"
    assert problem_of(write_document(document, tmp_path / "a.json")) == says
