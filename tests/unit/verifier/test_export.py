"""A bundle as uniform JSON: every number comes back equal, at the place where the plan puts it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from synthetic import TEST_KEY, Size, trace, write_synthetic

from fpforensics.common.errors import UsageError
from fpforensics.common.keys import Keyring
from fpforensics.common.lab.reader import open_experiment
from fpforensics.common.lab.run import Run
from fpforensics.common.lab.schema import first_problem
from fpforensics.common.signals import Trace
from fpforensics.verifier.analysis import analyze
from fpforensics.verifier.cli.analyze import analyze as analyze_command
from fpforensics.verifier.cli.export import export
from fpforensics.verifier.export import export_bundle
from fpforensics.verifier.intake import open_bundle

SIZE = Size(rows=2, references=2, prompt=6, output=5, prefill=3, layers=("1", "2", "last"), depth=4)
H100 = Path(__file__).parents[2] / "assets" / "h100"


def exported(folder: Path, size: Size = SIZE, name: str = "experiment.json", variable: str = "") -> Path:
    write_synthetic(folder / "bundle.msgpack", size)
    with open_bundle(folder / "bundle.msgpack", Keyring([TEST_KEY.public])) as bundle:
        export_bundle(bundle, folder / name, variable)
    return folder / name


def stored(full: Trace, tensor: str, position: int) -> np.ndarray:
    """A tensor's row at an absolute position, from whichever phase holds it."""
    for phase in (full.prefill, full.decode):
        rows = np.flatnonzero(phase.positions == position)
        if len(rows) and tensor in phase.tensors():
            return np.asarray(phase.tensors()[tensor][rows[0]])
    raise AssertionError(f"{tensor} at {position} is nowhere")


def check_run(run: Run, full: Trace, size: Size) -> int:
    """Every number of ``run`` is the stored one; returns how many vectors that were."""
    seen = 0
    for phase, signals in run.phases.items():
        assert signals.logprobs is not None
        for (signal, layer), vectors in signals.vectors.items():
            name = layer.removeprefix("layer_")
            tensor = f"{signal}/{'last' if name == str(size.depth) else name}"
            for (step, offset), values in zip(vectors.places, vectors.values, strict=True):
                end = size.prompt - 1 if phase == "prefill" else size.prompt + step
                expected = stored(full, tensor, end + 1 + offset)
                assert values.tolist() == expected.astype(np.float64).tolist()
                seen += 1
        for (step, offset), ids, logprobs in zip(
            signals.logprobs.places, signals.logprobs.ids, signals.logprobs.logprobs, strict=True
        ):
            end = size.prompt - 1 if phase == "prefill" else size.prompt + step
            assert ids.tolist() == stored(full, "logprob_ids", end + 1 + offset).tolist()
            assert logprobs.tolist() == stored(full, "logprobs", end + 1 + offset).astype(np.float64).tolist()
    return seen


@pytest.mark.parametrize("name", ["experiment.json", "experiment.json.gz"])
@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_numbers_come_back_equal(tmp_path: Path, name: str, dtype: str) -> None:
    size = Size(**(vars(SIZE) | {"dtype": dtype}))
    with open_experiment(exported(tmp_path, size, name)) as experiment:
        assert len(experiment.runs) == 4
        for info in experiment.runs:
            row, reference = divmod(info.index, 2)
            full = trace(size, row, reference)
            run = experiment.read(info)
            # 3 prefill positions and 4 steps of 3, of two signals in three layers.
            assert check_run(run, full, size) == (3 + 12) * 6
            assert info.tokens == tuple(full.output_ids[:-1].tolist()), "the last token was never fed"
            assert info.bit_identical is True
            assert info.rep_id == 1, "of two repetitions, the last one is stored"


def test_document_fits_the_schema(tmp_path: Path) -> None:
    document = json.loads(gzip.decompress(exported(tmp_path, name="a.json.gz").read_bytes()))
    assert first_problem(document) == ""
    assert document["experiment_metadata"]["experiment_type"] == "attention"
    assert [each["variable_value"] for each in document["configurations"]] == ["eager", "sdpa"]
    assert "attention" not in document["configurations"][0]["fixed_params"]
    assert document["runs"][0]["decode_steps"][0]["hidden_states"].keys() == {"layer_1", "layer_2", "layer_4"}
    assert list(document["runs"][0]["decode_steps"][0]["logprobs"]) == ["pos_-3", "pos_-2", "pos_-1"]


def test_a_position_that_was_not_captured_is_missing(tmp_path: Path) -> None:
    size = Size(**(vars(SIZE) | {"prefill": 1}))
    with open_experiment(exported(tmp_path, size)) as experiment:
        run = experiment.read(experiment.runs[0])
    ranked = run.phases["decode"].logprobs
    assert ranked is not None
    assert ranked.places[:5] == ((0, -2), (0, -1), (1, -3), (1, -2), (1, -1))
    assert run.phases["prefill"].vectors["hidden_states", "layer_1"].places == ((0, -1),)


def test_analysis_of_an_exported_bundle(tmp_path: Path) -> None:
    with open_experiment(exported(tmp_path)) as experiment:
        found = analyze(experiment)
    cell = found["decode"]["hidden_states"].per_layer["layer_1"]
    ours, theirs = trace(SIZE, 0, 0), trace(SIZE, 1, 0)
    naive = [
        np.linalg.norm(
            stored(ours, "hidden_states/1", at).astype(np.float64)
            - stored(theirs, "hidden_states/1", at).astype(np.float64)
        )
        for step in range(4)
        for at in range(SIZE.prompt + step - 2, SIZE.prompt + step + 1)
    ]
    entry = cell.per_reference["ref_0"][0][1]
    assert entry == pytest.approx(np.mean(naive), rel=1e-12)
    assert cell.reproducible == {"attn=eager": True, "attn=sdpa": True}


def test_variable(tmp_path: Path) -> None:
    document = json.loads(exported(tmp_path, variable="dtype").read_text())
    assert document["experiment_metadata"]["variable_tested"] == "dtype"
    assert {each["variable_value"] for each in document["configurations"]} == {"bf16"}
    with pytest.raises(UsageError, match=r"unknown variable 'atn'") as error:
        exported(tmp_path, variable="atn")
    assert "did you mean 'attn'" in error.value.diagnostics()


def test_command_on_real_evidence(tmp_path: Path) -> None:
    output = tmp_path / "h100.json.gz"
    arguments = [str(H100 / "sdpa-eager.msgpack"), "--key", str(H100 / "prover.key.pub"), "-o", str(output)]
    result = CliRunner().invoke(export, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    with open_experiment(output) as experiment:
        assert {each.hardware for each in experiment.configurations} == {"NVIDIA H100 80GB HBM3"}
        experiment.validate()
        assert analyze(experiment)["prefill"]["hidden_states"].label == "TRIVIALLY DETECTABLE"


def test_command_needs_a_trusted_key(tmp_path: Path) -> None:
    write_synthetic(tmp_path / "bundle.msgpack", SIZE)
    other = tmp_path / "other.pub"
    other.write_bytes((H100 / "prover.key.pub").read_bytes())
    arguments = [str(tmp_path / "bundle.msgpack"), "--key", str(other), "-o", str(tmp_path / "out.json")]
    result = CliRunner().invoke(export, arguments)
    assert result.exception is not None
    assert not (tmp_path / "out.json").exists()


def test_an_output_never_destroys_an_input(tmp_path: Path) -> None:
    write_synthetic(tmp_path / "bundle.msgpack", SIZE)
    before = (tmp_path / "bundle.msgpack").read_bytes()
    (tmp_path / "link.json").symlink_to(tmp_path / "bundle.msgpack")
    key = str(H100 / "prover.key.pub")
    for output in ("bundle.msgpack", "link.json"):
        arguments = [str(tmp_path / "bundle.msgpack"), "--key", key, "-o", str(tmp_path / output)]
        result = CliRunner().invoke(export, arguments)
        assert isinstance(result.exception, UsageError)
        assert "is an input" in result.exception.diagnostics()
    experiment = exported(tmp_path)
    text = experiment.read_bytes()
    refused = CliRunner().invoke(analyze_command, [str(experiment), "--html", str(experiment)])
    assert isinstance(refused.exception, UsageError)
    assert experiment.read_bytes() == text
    assert (tmp_path / "bundle.msgpack").read_bytes() == before
