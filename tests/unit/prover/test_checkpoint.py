"""Checkpoints in providers' formats: near the source, the same each time, whole or absent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from fpforensics.common.errors import MissingDependencyError, UsageError
from fpforensics.common.int4 import Floats, unpack_awq, unpack_gptq
from fpforensics.common.models import load_tokenizer, read_config, weights_digest
from fpforensics.common.weights import stored_tensors
from fpforensics.prover.checkpoint import make as make_module
from fpforensics.prover.checkpoint.formats import FORMATS, choose_group
from fpforensics.prover.checkpoint.make import RECORD, make_checkpoint
from fpforensics.prover.checkpoint.rounding import (
    round_asymmetric,
    round_rows_fp8,
    round_rows_int8,
    round_symmetric,
)
from fpforensics.prover.checkpoint.tensors import read_floats
from fpforensics.prover.cli import cli
from fpforensics.prover.cli import make_checkpoint as cli_module

OURS = sorted(name for name, made_as in FORMATS.items() if made_as.pack is not None)
DIGESTS = {
    "awq": "32ffaf3d564a",
    "fp8-dynamic": "d2524258cd1c",
    "gptq": "f538e0070827",
    "w4a16": "107ef6a8942d",
    "w8a8-int8": "af4dfc2179cb",
}
WEIGHT = "model.layers.0.self_attn.q_proj"


def weights_of(seed: int, spread: float) -> Floats:
    drawn = np.random.default_rng(seed).standard_normal((16, 64)).astype(np.float32) * np.float32(spread)
    drawn[3] = 0  # a padded output
    drawn[5, :32] = np.abs(drawn[5, :32])  # all of one sign
    return drawn


@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-6, 0.02, 1.0, 100.0]))
def test_rounding_is_to_the_nearest_level(seed: int, spread: float) -> None:
    weights = weights_of(seed, spread)
    # Half a step, and another where the range's last level is cut off or the scale was rounded down.
    levels, scales = round_symmetric(weights, 32)
    wide = np.repeat(scales, 32, axis=1)
    assert np.all(np.abs(levels * wide - weights) <= 0.55 * wide)
    assert levels.min() >= -8
    assert levels.max() <= 7

    levels, zeros, scales = round_asymmetric(weights, 32)
    wide = np.repeat(scales, 32, axis=1)
    assert np.all(np.abs((levels - np.repeat(zeros, 32, axis=1)) * wide - weights) <= 1.05 * wide)
    assert np.all((levels >= 0) & (levels <= 15))
    assert np.all((zeros >= 0) & (zeros <= 15))

    eight, scales = round_rows_int8(weights)
    assert np.all(np.abs(eight * scales - weights) <= 1.05 * scales)
    floats, scales = round_rows_fp8(weights)
    near = np.abs(floats.astype(np.float32) * scales - weights)
    assert np.all(near <= np.maximum(np.abs(weights) / 14, scales * 2.0**-10))


@given(st.integers(0, 2**32 - 1))
def test_scales_are_the_same_number_in_every_dtype(seed: int) -> None:
    for spread in (1e-9, 0.02, 50.0):
        _, scales = round_symmetric(weights_of(seed, spread), 32)
        np.testing.assert_array_equal(scales.astype(np.float16).astype(np.float32), scales)


@pytest.mark.parametrize("name", OURS)
def test_the_same_call_makes_the_same_weights(tiny_llama: Path, tmp_path: Path, name: str) -> None:
    first, second = (make_checkpoint(str(tiny_llama), name, output=tmp_path / f"{n}") for n in range(2))
    assert first.weights_digest == second.weights_digest == weights_digest(first.path)
    assert (first.path / "model.safetensors").read_bytes() == (second.path / "model.safetensors").read_bytes()
    declared = read_config(first.path)["quantization_config"]
    assert declared["quant_method"] in ("awq", "gptq", "compressed-tensors")
    assert load_tokenizer(first.path)("the").input_ids == load_tokenizer(tiny_llama)("the").input_ids
    record = json.loads((first.path / RECORD).read_text())
    assert record["recipe"]["source_weights"] == weights_digest(tiny_llama)
    assert record["weights"] == first.weights_digest


def test_weights_digests_are_those_of_every_machine(tmp_path: Path) -> None:
    # Recorded: arithmetic is elementwise IEEE, so no machine and no version of NumPy may make others.
    source = tmp_path / "source"
    write_drawn_model(source)
    made = {name: make_checkpoint(str(source), name, output=tmp_path / name).weights_digest for name in OURS}
    assert {name: digest[7:19] for name, digest in made.items()} == DIGESTS


def test_formats_hold_the_source_s_weights(tiny_llama: Path, tmp_path: Path) -> None:
    source = {tensor.name: tensor for tensor in stored_tensors(tiny_llama)}
    weights = read_floats(source[f"{WEIGHT}.weight"]).astype(np.float32)
    unpacked = {"awq": unpack_awq, "gptq": unpack_gptq}
    for name, unpack in unpacked.items():
        made = make_checkpoint(str(tiny_llama), name, group_size=32, output=tmp_path / name)
        held = read_all(made.path)
        found = unpack({key.rpartition(".")[2]: array for key, array in held.items() if key.startswith(WEIGHT)})
        assert 0.01 < np.linalg.norm(found - weights) / np.linalg.norm(weights) < 0.15
        assert f"{WEIGHT}.weight" not in held
        np.testing.assert_array_equal(
            held["model.norm.weight"], read_floats(source["model.norm.weight"]).view(np.uint16)
        )


@pytest.mark.parametrize("name", [name for name in OURS if name not in ("awq", "gptq")])
def test_routers_of_experts_are_declared_unquantized(tiny_qwen3_moe: Path, tmp_path: Path, name: str) -> None:
    made = make_checkpoint(str(tiny_qwen3_moe), name, output=tmp_path / name).path
    stored = {tensor.name for tensor in stored_tensors(made)}
    ignored = read_config(made)["quantization_config"]["ignore"]
    assert ignored == ["lm_head", *(f"model.layers.{layer}.mlp.gate" for layer in range(4))]
    assert {f"{each}.weight" for each in ignored} <= stored
    assert "model.layers.0.mlp.experts.0.gate_proj.weight_scale" in stored


def test_cache_is_used_and_mended(tiny_llama: Path) -> None:
    first = make_checkpoint(str(tiny_llama), "gptq")
    assert first.fresh
    again = make_checkpoint(str(tiny_llama), "gptq")
    assert (again.path, again.weights_digest, again.fresh) == (first.path, first.weights_digest, False)
    assert make_checkpoint(str(tiny_llama), "gptq", group_size=32).path != first.path
    config = first.path / "config.json"
    config.write_text(config.read_text().replace('"bits": 4', '"bits": 8'))
    mended = make_checkpoint(str(tiny_llama), "gptq")
    assert mended.fresh
    assert read_config(mended.path)["quantization_config"]["bits"] == 4
    assert not list(mended.path.parent.glob(".*/"))


def test_a_failure_leaves_nothing(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(make_module, "write_tensors", full)
    with pytest.raises(OSError, match="No space"):
        make_checkpoint(str(tiny_llama), "awq", output=tmp_path / "awq")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format_name": "awqq"}, "did you mean 'awq'"),
        ({"format_name": "none"}, "would be the model itself"),
        ({"format_name": "gptq", "group_size": 48}, "group size 48 does not divide all of the inputs' widths 64, 128"),
        ({"format_name": "fp8-dynamic", "group_size": 32}, "has no groups"),
        ({"format_name": "gptq", "pad": "hiden=128"}, "did you mean 'hidden'"),
        ({"format_name": "gptq", "pad": "hidden=32"}, "less than the model's 64"),
        ({"format_name": "gptq", "pad": "heads=6"}, "keep that ratio"),
        ({"format_name": "gptq", "pad": "hidden=96,heads=10,kv_heads=5"}, "e.g. hidden=100"),
    ],
)
def test_what_does_not_fit_is_said(tiny_llama: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        make_checkpoint(str(tiny_llama), output=tmp_path / "made", **options)
    assert message in raised.value.diagnostics()
    assert not (tmp_path / "made").exists()


def test_a_quantized_source_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    made = make_checkpoint(str(tiny_llama), "gptq", output=tmp_path / "gptq")
    with pytest.raises(UsageError, match="quantized already"):
        make_checkpoint(str(made.path), "awq", output=tmp_path / "awq")


def test_a_full_folder_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="not an empty folder"):
        make_checkpoint(str(tiny_llama), "awq", output=tmp_path)


def test_absent_library_is_answered_with_the_command(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_module.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(MissingDependencyError, match="torchao") as raised:
        make_checkpoint(str(tiny_llama), "torchao-int8", output=tmp_path / "made")
    assert raised.value.hint == "run: pip install '.[hf,torchao]'"


def test_group_is_the_largest_that_divides() -> None:
    assert [choose_group(None, widths) for widths in ({768, 1536}, {576, 1536}, {96})] == [128, 64, 32]


def test_command_prints_folder_and_digest(tiny_llama: Path, tmp_path: Path) -> None:
    made = tmp_path / "w8"
    call = ["make-checkpoint", "--model", str(tiny_llama), "--format", "w8a8-int8", "-o", str(made), "-q"]
    result = CliRunner().invoke(cli, call, catch_exceptions=False)
    assert result.output == f"{made}  {weights_digest(made)}\n"
    assert tuple(FORMATS) == cli_module.FORMATS


def read_all(folder: Path) -> dict[str, Any]:
    pytest.importorskip("torch")
    from safetensors.torch import load_file

    held = load_file(folder / "model.safetensors")
    return {name: as_numpy(tensor) for name, tensor in held.items()}


def as_numpy(tensor: Any) -> Any:
    import torch

    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def write_drawn_model(folder: Path) -> None:
    """A source that holds nothing but drawn projections, from a generator that every NumPy has."""
    from fpforensics.prover.checkpoint.tensors import write_tensors

    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    draw = np.random.Generator(np.random.Philox(7))
    sizes = {"self_attn.q_proj": (64, 128), "mlp.down_proj": (128, 64)}
    tensors = {
        f"model.layers.0.{name}.weight": (draw.integers(-(2**20), 2**20, size) / 2.0**24).astype(np.float32)
        for name, size in sizes.items()
    }
    write_tensors(folder / "model.safetensors", tensors)
