"""Reading: what is wrong with a document is one clear line that names where, and never anything else."""

from __future__ import annotations

import copy
import gzip
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lab_documents import LAB_FILES, Json, Layout, find_run, lab_document, lab_path, make_document, write_document

from fpforensics.common.errors import Error, EvidenceError, UsageError
from fpforensics.common.lab import reader
from fpforensics.common.lab.document import MAX_CONFIGURATIONS
from fpforensics.common.lab.reader import open_experiment
from fpforensics.common.lab.schema import experiment_schema

SMALL = Layout(references=("ref_0", "ref_1"), layers=(1, 12), positions=(-2, -1))
# Fields that the schema types and reading ignores.
IGNORED = {"timestamp", "runtime_seconds", "prompt_text", "token_text"}


def problem_of(path: Path) -> str:
    """What reading everything complains about, checked to be one line."""
    with pytest.raises(EvidenceError) as error, open_experiment(path) as experiment:
        experiment.validate()
    line = error.value.diagnostics()
    assert line.isprintable(), "one line, without control characters"
    assert len(line) < 500
    return error.value.message


def read_everything(path: Path) -> None:
    with open_experiment(path) as experiment:
        experiment.validate()


def changed(change: Callable[[Json], None], layout: Layout = SMALL) -> Json:
    document = make_document(layout)
    change(document)
    return document


def set_at(*path: str | int, to: Any) -> Callable[[Json], None]:
    def change(document: Json) -> None:
        holder: Any = document
        for step in path[:-1]:
            holder = holder[step]
        holder[path[-1]] = to

    return change


def rename(*path: str | int, to: str) -> Callable[[Json], None]:
    def change(document: Json) -> None:
        holder: Any = document
        for step in path[:-1]:
            holder = holder[step]
        holder[to] = holder.pop(path[-1])

    return change


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


def test_gzip_is_recognized_by_its_bytes_not_its_name(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(gzip.compress(json.dumps(make_document(SMALL)).encode()))
    with open_experiment(path) as experiment:
        assert len(experiment.runs) == 4
        experiment.validate()


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


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    text = json.dumps(make_document(Layout(references=("ref_0",), layers=(1,), positions=(-1,), steps=1))).encode()
    path = tmp_path / "a.json"
    for length in range(1, len(text), 7):
        path.write_bytes(text[:length])
        assert "not JSON" in problem_of(path), length


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "a.json is empty: 0 bytes"),
        (b"hello", "the document: not JSON: invalid character (byte 0)"),
        (b"\0" * 100, "the document: not JSON: invalid character (byte 0)"),
        (b"\xef\xbb\xbf{}", "the document: not JSON: invalid character (byte 0)"),
        ('{"runs": []}'.encode("utf-16"), "the document: not JSON: invalid character (byte 0)"),
        (b'{"runs": [{"config_id": "\xff\xfe"}]}', "the document: not UTF-8"),
        (b"[]", "the document: a list where object is expected"),
        (b"{}", "the document: 'experiment_metadata' is a required property"),
        (b'{"experiment_metadata": ' + b"[" * 5000, "the document: it nests too deeply"),
        (b'{"runs": [{"rep_id": ' + b"1" * 5000 + b"}]}", "runs[0].rep_id: Integer value out of range"),
    ],
)
def test_what_is_no_document_at_all(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    assert problem_of(tmp_path / "a.json") == says


@pytest.mark.parametrize("name", ["missing.json", "folder", "folder/missing.json", "a\0b"])
def test_no_file_there(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match="no file") as error:
        open_experiment(tmp_path / name)
    assert error.value.diagnostics().isprintable()


def test_a_hostile_file_name_stays_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a\nb\x1b[31m.json"
    path.write_text("{}")
    problem_of(path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data[:5],
        lambda data: data[:2],
        lambda data: data[:2] + b"garbage" * 10,
        lambda data: data[:40] + bytes(byte ^ 0xFF for byte in data[40:60]) + data[60:],
        lambda data: data[:-8] + bytes(4) + data[-4:],  # the checksum
        lambda data: data + b"more",
    ],
)
def test_damaged_gzip(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(json.dumps(make_document(SMALL)).encode()))
    read_everything(path)
    path.write_bytes(damage(path.read_bytes()))
    assert "a.json.gz is damaged" in problem_of(path)


def test_gzip_of_garbage_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(b"garbage"))
    assert "not JSON" in problem_of(tmp_path / "a.json.gz")
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(b""))
    assert "is empty" in problem_of(tmp_path / "a.json.gz")


def test_a_gzip_bomb_stops_at_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_UNPACKED_BYTES", 1 << 20)
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(b" " * (4 << 20)))
    before = {each.name for each in Path(tempfile.gettempdir()).glob("fpforensics-*")}
    assert "unpacks to over" in problem_of(path)
    assert {each.name for each in Path(tempfile.gettempdir()).glob("fpforensics-*")} <= before


def test_an_error_comes_through_the_with_statement(tmp_path: Path) -> None:
    """What its traceback holds points into the mapped file: closing must not fail on that, and hide the error."""
    path = write_document(changed(set_at(*LOGPROBS, "log_probs", 0, to=None)), tmp_path / "a.json")
    with pytest.raises(EvidenceError) as error, open_experiment(path) as experiment:
        experiment.validate()
    assert error.value.__context__ is None or isinstance(error.value.__context__, ValueError)
    with pytest.raises(KeyError), open_experiment(path) as experiment:
        raw = experiment._runs[0]
        raise KeyError(raw.config_id)


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


# Any JSON value, and what Python's writer makes of what is none.
numbers = st.one_of(
    st.integers(),
    st.integers(-1, 3),
    st.floats(),
    st.sampled_from([2**63 - 1, 2**63, 2**64, 10**400, -(10**400), 1e308, 5e-324, -0.0]),
)
texts = st.one_of(st.text(max_size=20), st.sampled_from(["", "h_1", "ref_0", "layer_1", "pos_-1", "\ud800", "\n", "a" * 5000]))  # fmt: skip
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=8,
)
BASE = make_document(Layout(steps=2, positions=(-2, -1), hidden=2, keys=2, listed=2))


def paths_of(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    yield path
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from paths_of(inner, (*path, name))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from paths_of(inner, (*path, index))


PATHS = list(paths_of(BASE))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(PATHS), values, st.booleans()), min_size=1, max_size=2))
def test_any_value_anywhere_is_read_or_refused_and_what_is_read_fits_the_schema(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[tuple[str | int, ...], Any, bool]]
) -> None:
    document: Any = copy.deepcopy(BASE)
    for path, value, as_name in changes:
        holder, parent = document, document
        for step in path:
            parent, holder = holder, holder[step] if _has(holder, step) else None
        if not path:
            document = value
        elif not _has(parent, path[-1]):
            continue  # the other change took it away
        elif as_name and isinstance(parent, dict) and isinstance(value, str):
            parent[value] = parent.pop(path[-1])
        else:
            parent[path[-1]] = value
    check_read_or_refused(document, tmp_path_factory.getbasetemp() / "mutated.json")


def check_read_or_refused(document: Any, file: Path) -> None:
    file.write_text(json.dumps(document), encoding="utf-8")
    try:
        read_everything(file)
    except Error as error:
        assert isinstance(error, EvidenceError)
        assert error.diagnostics().isprintable()
        assert len(error.diagnostics()) < 500
        return
    for problem in jsonschema.Draft202012Validator(experiment_schema()).iter_errors(json.loads(file.read_text())):
        assert problem.absolute_path and problem.absolute_path[-1] in IGNORED, problem.message


TINY = make_document(Layout((("h_1", "H100", 1),), ("ref_0",), 1, True, 1, (-1,), (1,), 1, 1, 1))
PLAIN: list[Any] = [None, True, -1, 0, 1, 1.5, "", "x", [], [1], {}, {"x": 1}, 2**63, 10**400, float("nan"), "\ud800"]


@pytest.mark.parametrize("path", list(paths_of(TINY)), ids=str)
def test_each_kind_of_value_at_each_path(tmp_path: Path, path: tuple[str | int, ...]) -> None:
    for value in PLAIN:
        document = copy.deepcopy(TINY)
        if path:
            set_at(*path, to=value)(document)
        check_read_or_refused(document if path else value, tmp_path / "a.json")


def _has(holder: Any, step: str | int) -> bool:
    if isinstance(holder, dict):
        return step in holder
    return isinstance(holder, list) and isinstance(step, int) and step < len(holder)
