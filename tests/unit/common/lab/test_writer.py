"""Writing: every number comes back bit for bit, the schema takes it, and a file is whole or not touched."""

from __future__ import annotations

import gzip
import json
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lab_documents import LAB_FILES, Json, Layout, lab_path, make_document, write_document

from fpforensics.common.errors import UsageError
from fpforensics.common.lab.reader import open_experiment
from fpforensics.common.lab.run import Layered, Place, Ranked, Run, RunInfo, RunSignals, Vectors
from fpforensics.common.lab.schema import experiment_schema
from fpforensics.common.lab.writer import RunDetails, write_experiment
from fpforensics.common.signals import Phase, Signal

METADATA = {"experiment_type": "made_up", "variable_tested": "value"}
CONFIGURATIONS = [{"config_id": f"c{value}", "hardware": "H100", "variable_value": value} for value in range(3)]
EXTREMES = [5e-324, 2.2250738585072014e-308, 1.7976931348623157e308, 0.1, 1 / 3, 2.0**53 + 2, 1e22, 1e23, -0.0, 0.0]

floats = st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.sampled_from([*EXTREMES, *(-x for x in EXTREMES)]))  # fmt: skip
logprobs = st.one_of(st.floats(max_value=0.0, allow_nan=False, allow_infinity=False), st.sampled_from([-x for x in EXTREMES]))  # fmt: skip
token_ids = st.one_of(st.integers(0, 200_000), st.integers(0, 2**63 - 1))


@st.composite
def signals_of(draw: st.DrawFn, steps: Sequence[int]) -> RunSignals:
    def places() -> tuple[Place, ...]:
        every = [(step, position) for step in steps for position in (-1000, -3, -2, -1)]
        return tuple(sorted(draw(st.sets(st.sampled_from(every), min_size=1, max_size=5))))

    vectors: dict[Layered, Vectors] = {}
    kinds: tuple[Signal, ...] = ("hidden_states", "key_vectors")
    for signal in kinds:
        for layer in draw(st.lists(st.sampled_from([1, 2, 12, 999_999_999]), max_size=2, unique=True)):
            at, width = places(), draw(st.integers(1, 4))
            rows = draw(st.lists(st.lists(floats, min_size=width, max_size=width), min_size=len(at), max_size=len(at)))
            vectors[signal, f"layer_{layer}"] = Vectors(at, np.array(rows, np.float64))
    if not draw(st.booleans()):
        return RunSignals(None, vectors)
    at = places()
    listed = [draw(st.lists(token_ids, min_size=1, max_size=4, unique=True)) for _ in at]
    most = max(map(len, listed))
    ids, values = np.full((len(at), most), -1, np.int64), np.full((len(at), most), np.nan)
    for row, tokens in enumerate(listed):
        ids[row, : len(tokens)] = tokens
        values[row, : len(tokens)] = draw(st.lists(logprobs, min_size=len(tokens), max_size=len(tokens)))
    return RunSignals(Ranked(at, ids, values), vectors)


def is_empty(signals: RunSignals) -> bool:
    return signals.logprobs is None and not signals.vectors


@st.composite
def runs_of(draw: st.DrawFn) -> list[Run]:
    names = draw(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["ref_0", "a b", "\N{SNOWMAN}"]), st.integers(0, 3)), min_size=1, max_size=4, unique=True))  # fmt: skip
    runs = []
    for index, (config, reference, repetition) in enumerate(names):
        phases: dict[Phase, RunSignals] = {}
        if draw(st.booleans()):
            phases["prefill"] = draw(signals_of((0,)))
        decode = draw(signals_of(draw(st.sampled_from([(0, 1, 2), (0, 7), (3,)]))))
        if not is_empty(decode):
            phases["decode"] = decode
        tokens = draw(st.one_of(st.none(), st.lists(token_ids, max_size=9).map(tuple)))
        info = RunInfo(index, f"c{config}", reference, repetition, tokens, draw(st.sampled_from(["", "abc"])))
        runs.append(Run(info, phases))
    return runs


def fed(run: Run) -> tuple[int, ...] | None:
    """The tokens as far as the last step that was written."""
    signals = run.phases.get("decode", RunSignals())
    places = [vectors.places for vectors in signals.vectors.values()]
    if signals.logprobs is not None:
        places.append(signals.logprobs.places)
    steps = [step for each in places for step, _ in each]
    return run.info.tokens[: max(steps) + 1] if steps and run.info.tokens is not None else run.info.tokens


def same_bits(a: Any, b: Any) -> bool:
    return bool(a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes())


def check_equal(run: Run, back: Run) -> None:
    assert back.info == replace(run.info, tokens=fed(run))
    assert back.phases.keys() == run.phases.keys()
    for phase, signals in run.phases.items():
        other = back.phases[phase]
        assert other.vectors.keys() == signals.vectors.keys()
        for key, vectors in signals.vectors.items():
            assert other.vectors[key].places == vectors.places
            assert same_bits(other.vectors[key].values, vectors.values)
        assert (other.logprobs is None) == (signals.logprobs is None)
        if signals.logprobs is not None and other.logprobs is not None:
            assert other.logprobs.places == signals.logprobs.places
            assert same_bits(other.logprobs.ids, signals.logprobs.ids)
            listed = signals.logprobs.ids >= 0
            assert same_bits(other.logprobs.logprobs[listed], signals.logprobs.logprobs[listed])
            assert np.isnan(other.logprobs.logprobs[~listed]).all()


def validate(path: Path) -> Json:
    data = path.read_bytes()
    document: Json = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
    jsonschema.Draft202012Validator(experiment_schema()).validate(document)
    return document


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
@settings(max_examples=60, deadline=None)
@given(runs=runs_of())
def test_what_is_written_comes_back_and_fits_the_schema(
    tmp_path_factory: pytest.TempPathFactory, name: str, runs: list[Run]
) -> None:
    """Float64 to the last bit (subnormals and -0.0 too), ragged lists, any layers, positions and steps."""
    path = tmp_path_factory.getbasetemp() / name
    write_experiment(path, METADATA, CONFIGURATIONS, ((run, {}) for run in runs))
    validate(path)
    with open_experiment(path) as experiment:
        assert len(experiment.runs) == len(runs)
        for info, run in zip(experiment.runs, runs, strict=True):
            check_equal(run, experiment.read(info))


@pytest.mark.parametrize("name", LAB_FILES)
def test_a_published_recording_survives_being_copied(tmp_path: Path, name: str) -> None:
    with open_experiment(lab_path(name)) as experiment:
        runs = [experiment.read(info) for info in experiment.runs]
        write_experiment(
            tmp_path / "copy.json.gz",
            experiment.metadata,
            [each.raw for each in experiment.configurations],
            ((run, {}) for run in runs),
        )
    with open_experiment(tmp_path / "copy.json.gz") as copy:
        for info, run in zip(copy.runs, runs, strict=True):
            check_equal(run, copy.read(info))


def one_run(**changes: Any) -> Run:
    ranked = Ranked(((0, -1),), np.array([[3, 4]]), np.array([[-0.5, -1.5]]))
    vectors: dict[Layered, Vectors] = {("key_vectors", "layer_1"): Vectors(((0, -1),), np.array([[1.0, 2.0]]))}
    info = RunInfo(0, "c0", "ref_0", 0, (5,), "abc")
    return replace(Run(info, {"decode": RunSignals(ranked, vectors)}), **changes)


def test_the_document_is_the_plans(tmp_path: Path) -> None:
    details = {"timestamp": "2025-11-30 09:42:50", "runtime_seconds": 1.5, "repetitions": {"count": 3, "bit_identical": True}}  # fmt: skip
    write_experiment(tmp_path / "a.json", METADATA, CONFIGURATIONS[:1], [(one_run(), details)])
    assert validate(tmp_path / "a.json") == {
        "experiment_metadata": METADATA,
        "configurations": CONFIGURATIONS[:1],
        "runs": [
            {
                "config_id": "c0",
                "rep_id": 0,
                "ref_id": "ref_0",
                "prompt_sha256": "abc",
                "token_ids": [5],
                **details,
                "decode_steps": [
                    {
                        "step": 0,
                        "token_id": 5,
                        "key_vectors": {"layer_1": {"pos_-1": [1.0, 2.0]}},
                        "logprobs": {"pos_-1": {"token_ids": [3, 4], "log_probs": [-0.5, -1.5]}},
                    }
                ],
            }
        ],
    }
    with open_experiment(tmp_path / "a.json") as experiment:
        assert experiment.runs[0].bit_identical is True


def test_the_same_experiment_is_the_same_bytes(tmp_path: Path) -> None:
    """Packed too: no time, no file name."""
    for name in ("one.json.gz", "two.json.gz"):
        write_experiment(tmp_path / name, METADATA, CONFIGURATIONS, [(one_run(), {})])
    packed = (tmp_path / "one.json.gz").read_bytes()
    assert packed == (tmp_path / "two.json.gz").read_bytes()
    assert packed[3] == 0 and packed[4:8] == bytes(4), "RFC 1952: no flags, no time"


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_a_failure_in_the_middle_leaves_the_old_file(tmp_path: Path, name: str) -> None:
    def failing() -> Iterator[tuple[Run, RunDetails]]:
        for _ in range(1000):
            yield one_run(), {}
        raise KeyboardInterrupt

    path = tmp_path / name
    with pytest.raises(KeyboardInterrupt):
        write_experiment(path, METADATA, CONFIGURATIONS, failing())
    assert list(tmp_path.iterdir()) == []
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        write_experiment(path, METADATA, CONFIGURATIONS, failing())
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    write_experiment(path, METADATA, CONFIGURATIONS, [(one_run(), {})])
    assert list(tmp_path.iterdir()) == [path]
    validate(path)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o000])
def test_the_mode_is_what_the_umask_says(tmp_path: Path, mask: int) -> None:
    """Not the 0600 of a temporary file."""
    before = os.umask(mask)
    try:
        write_experiment(tmp_path / "a.json", METADATA, CONFIGURATIONS, [(one_run(), {})])
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o666 & ~mask


def with_value(value: float) -> Run:
    vectors: dict[Layered, Vectors] = {("hidden_states", "layer_1"): Vectors(((0, -1),), np.array([[1.0, value]]))}
    return one_run(phases={"prefill": RunSignals(None, vectors)})


def with_logprob(value: float) -> Run:
    return one_run(phases={"decode": RunSignals(Ranked(((0, -1),), np.array([[3, 4]]), np.array([[-1.0, value]])), {})})


@pytest.mark.parametrize(
    ("metadata", "configurations", "runs", "says"),
    [
        ({}, CONFIGURATIONS, [(one_run(), {})], "experiment_metadata: 'experiment_type' is a required property"),
        (METADATA, [], [(one_run(), {})], "configurations: an empty list"),
        (METADATA, [{"config_id": "c0"}], [(one_run(), {})], r"configurations\[0\]: 'hardware' is a required"),
        (METADATA, CONFIGURATIONS, [], "runs: an empty list"),
        (METADATA, CONFIGURATIONS, [(one_run(), {}), (one_run(), {"timestamp": 5})], r"runs\[1\].timestamp: 5 where"),
        (METADATA, CONFIGURATIONS, [(one_run(), {"repetitions": {}})], r"runs\[0\].repetitions: 'count' is a required"),
        # JSON has no word for these: written as null, they would be refused only when read.
        (METADATA, CONFIGURATIONS, [(with_value(np.nan), {})], r"runs\[0\], prefill, hidden_states, layer_1: .* finite"),
        (METADATA, CONFIGURATIONS, [(with_value(np.inf), {})], r"runs\[0\], prefill, hidden_states, layer_1: .* finite"),
        (METADATA, CONFIGURATIONS, [(with_logprob(np.nan), {})], r"runs\[0\], decode, logprobs: a value is not finite"),
        (METADATA, CONFIGURATIONS, [(with_logprob(-np.inf), {})], r"runs\[0\], decode, logprobs: a value is not finite"),
    ],
)  # fmt: skip
def test_what_could_not_be_read_back_is_not_written(
    tmp_path: Path, metadata: Json, configurations: list[Json], runs: list[tuple[Run, RunDetails]], says: str
) -> None:
    (tmp_path / "a.json").write_bytes(b"old")
    with pytest.raises(UsageError, match=f"cannot write a.json: {says}"):
        write_experiment(tmp_path / "a.json", metadata, configurations, runs)
    assert [each.name for each in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_bytes() == b"old"


def test_runs_are_written_as_they_come(tmp_path: Path) -> None:
    """So that an experiment may be larger than memory: no run is held after it was written."""
    alive = 0

    class Counted(Run):
        def __init__(self, *arguments: Any) -> None:
            nonlocal alive
            alive += 1
            super().__init__(*arguments)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    most = 0

    def runs() -> Iterator[tuple[Run, RunDetails]]:
        nonlocal most
        for index in range(50):
            most = max(most, alive)
            info = RunInfo(index, "c0", "ref_0", index)
            yield Counted(info, one_run().phases), {}

    write_experiment(tmp_path / "a.json", METADATA, CONFIGURATIONS, runs())
    assert most <= 2


def test_made_documents_are_read_back_as_they_are_written(tmp_path: Path) -> None:
    """The documents that other tests are built on hold what they say: the writer's copy of one is the same document."""
    document = make_document(Layout(repetitions=2))
    with open_experiment(write_document(document, tmp_path / "a.json")) as experiment:
        runs = [experiment.read(info) for info in experiment.runs]
        write_experiment(tmp_path / "b.json", experiment.metadata, document["configurations"], ((run, {}) for run in runs))  # fmt: skip
    copy = validate(tmp_path / "b.json")
    for run in copy["runs"]:
        assert run.pop("token_ids") == [10, 11]
    assert copy == document
