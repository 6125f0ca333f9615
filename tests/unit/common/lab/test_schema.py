"""The shipped schema: what fits it, what it says in words, and that it and the reader agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
from lab_documents import LAB_FILES, Json, Layout, lab_document, make_document, write_document

from fpforensics.common.errors import EvidenceError
from fpforensics.common.lab.reader import open_experiment
from fpforensics.common.lab.schema import experiment_schema, explain, first_problem, show_path


def set_at(document: Any, path: tuple[str | int, ...], value: Any) -> None:
    for step in path[:-1]:
        document = document[step]
    document[path[-1]] = value


def test_schema_is_draft_2020_12() -> None:
    schema = experiment_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    jsonschema.Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize("name", LAB_FILES)
def test_published_recordings_fit(name: str) -> None:
    jsonschema.Draft202012Validator(experiment_schema()).validate(lab_document(name))


def test_the_plans_own_example_fits() -> None:
    """With unknown fields, without its optional ones, and with a layer that is empty; an empty position is none."""
    vector = [0.5, -1.25]
    step = {
        "step": 0,
        "token_id": 12345,
        "token_text": "Hello",
        "hidden_states": {"layer_1": {"pos_-3": vector, "pos_-2": vector, "pos_-1": vector}, "layer_2": {}},
        "key_vectors": {"layer_39": {"pos_-1": vector}},
        "logprobs": {"pos_-1": {"token_ids": [1, 2], "log_probs": [-0.5, -1]}},
    }
    document: Json = {
        "experiment_metadata": {
            "experiment_type": "batch_size",
            "variable_tested": "batch_size",
            "model": "Qwen3-30B-A3B-GPTQ-Int4",
            "model_size": "30B",
            "architecture": "MoE",
            "sequence_length": 8192,
            "decode_steps": 30,
            "extraction_config": {
                "layers": [1, 2, 4, 12, 39],
                "positions": [-3, -2, -1],
                "hidden_dim": 3584,
                "key_dim": 512,
                "top_k_logprobs": 10,
            },
            "date_created": "YYYY-MM-DD HH:MM:SS",
        },
        "configurations": [
            {
                "config_id": "A100_bs1",
                "hardware": "A100-80GB",
                "provider": "RunPod",
                "variable_value": 1,
                "cuda_version": "12.8",
                "fixed_params": {"compile": False, "attention_impl": "flash_attention_2", "tp_size": 1},
            }
        ],
        "runs": [
            {
                "config_id": "A100_bs1",
                "rep_id": 0,
                "timestamp": "YYYY-MM-DD HH:MM:SS",
                "runtime_seconds": 123.45,
                "prompt_text": "...",
                "decode_steps": [step],
            }
        ],
    }
    assert first_problem(document) == ""
    for key in ("provider", "cuda_version", "fixed_params"):
        del document["configurations"][0][key]
    for key in ("timestamp", "runtime_seconds", "prompt_text"):
        del document["runs"][0][key]
    assert first_problem(document | {"ours": 1}) == ""
    set_at(step, ("logprobs", "pos_-2"), {})
    assert first_problem(document) == ("runs[0].decode_steps[0].logprobs.pos_-2: 'token_ids' is a required property")


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("runs",), [], "runs: an empty list"),
        (("configurations",), [], "configurations: an empty list"),
        (("configurations",), {}, "configurations: an object where array is expected"),
        (("experiment_metadata",), {}, "experiment_metadata: 'experiment_type' is a required property"),
        (("experiment_metadata", "experiment_type"), "", "experiment_metadata.experiment_type: '' should be non-empty"),
        (("configurations", 1, "variable_value"), [1], "configurations[1].variable_value: a list where"),
        (("configurations", 1, "hardware"), None, "configurations[1].hardware: null where string is expected"),
        (("runs", 2, "rep_id"), -1, "runs[2].rep_id: -1 is less than the minimum of 0"),
        (("runs", 2, "rep_id"), True, "runs[2].rep_id: a boolean where integer is expected"),
        (("runs", 0, "prefill", "hidden_states", "layer_0"), {}, "layer_0', names look like layer_12"),
        (("runs", 0, "prefill", "logprobs", "pos_1"), {}, "unexpected name 'pos_1', names look like pos_-1"),
        (("runs", 0, "prefill", "hidden_states", "layer_1", "pos_-1"), [], "layer_1.pos_-1: an empty list"),
        (
            ("runs", 0, "prefill", "key_vectors", "layer_1", "pos_-1", 1),
            "x" * 500,
            f"runs[0].prefill.key_vectors.layer_1.pos_-1[1]: '{'x' * 39}… where number is expected",
        ),
    ],
)
def test_problem_names_path_and_kind(path: tuple[str | int, ...], value: Any, says: str) -> None:
    document = make_document()
    assert first_problem(document) == ""
    set_at(document, path, value)
    problem = first_problem(document)
    assert says in problem
    assert "\n" not in problem and len(problem) < 200


@pytest.mark.parametrize(
    "path",
    [
        ("experiment_metadata", "experiment_type"),
        ("configurations", 0, "config_id"),
        ("configurations", 0, "hardware"),
        ("configurations", 0, "variable_value"),
        ("runs", 0, "config_id"),
        ("runs", 0, "rep_id"),
        ("runs", 0, "decode_steps"),
        ("runs", 0, "decode_steps", 0, "step"),
        ("runs", 0, "prefill", "logprobs", "pos_-1", "token_ids"),
        ("runs", 0, "prefill", "logprobs", "pos_-1", "log_probs"),
    ],
)
def test_reader_and_schema_require_the_same(tmp_path: Path, path: tuple[str | int, ...]) -> None:
    document: Any = make_document(Layout(references=("ref_0",)))
    holder: Any = document
    for step in path[:-1]:
        holder = holder[step]
    del holder[path[-1]]
    assert repr(path[-1]) in first_problem(document)
    with pytest.raises(EvidenceError), open_experiment(write_document(document, tmp_path / "a.json")) as experiment:
        experiment.validate()


def explained(text: bytes) -> str:
    """As the reader does: decode what is typed, and say what went wrong."""
    try:
        msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return explain(error, text)
    raise AssertionError("it decodes")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b'{"a": [1, NaN]}', "a[1]: NaN is not a number"),
        (b'{"a": [1], "b c": [0, 1, 2, -Infinity]}', "['b c'][3]: -Infinity is not a number"),
        (
            b'{"a": [1.5e-3, -2E+4 ,7,{"x]\\"": [[], {"y":1, "z": Infinity',
            "a[3]['x]\"'][1].z: Infinity is not a number",
        ),
        (b'{"a": [1, 2', "a[1]: not JSON: it ends too early"),
        (b'{"a": [1, 2], "b": "text', "b: not JSON: it ends too early"),
        (b'{"a": [1 2]}', "a[0]: not JSON: expected ',' or ']' (byte 9)"),
        (b'{"a": [1]} {}', "the document: not JSON: trailing characters (byte 12)"),
        (b'{"a": [], "b": ["\\ud800"]}', "the document: not JSON: half a surrogate pair"),
        (b"", "the document: not JSON: it ends too early"),
        (b"[" * 100_000, "the document: Expected object, got array"),
        (b'{"a": ' + b"[" * 100_000, "the document: it nests too deeply"),
        (b'{"\xff": 1}', "the document: not UTF-8"),
    ],
)
def test_what_cannot_be_decoded_is_found_again(text: bytes, says: str) -> None:
    assert explained(text) == says


def test_a_number_too_large_is_named() -> None:
    text = b'{"experiment_metadata": {"a": [1, {"b": 1e999}]}}'
    with pytest.raises(msgspec.DecodeError) as error:
        msgspec.json.decode(text)
    assert explain(error.value, text) == "experiment_metadata.a[1].b: a number too large for float64"


def test_a_path_is_printable_and_short() -> None:
    path = ("runs", 3, "pre\nfill", "x" * 1000)
    shown = show_path(path)
    assert shown.startswith("runs[3]['pre\N{REPLACEMENT CHARACTER}fill'].xxx")
    assert shown.isprintable() and len(shown) <= 100
    assert show_path(()) == "the document"
    assert len(show_path(("deep",) * 1000)) <= 201


def test_words_do_not_quote_a_whole_value() -> None:
    document: Json = make_document()
    document["experiment_metadata"]["experiment_type"] = json.loads("[" * 500 + "]" * 500)
    assert first_problem(document) == "experiment_metadata.experiment_type: a list where string is expected"
