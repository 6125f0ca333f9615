"""AWQ and GPTQ checkpoints in the Transformers engine: their own weights, exactly, and replays that are bit-identical."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_runs import differences, forcings, references

from fpforensics.common.config import parse_config
from fpforensics.common.engines import open_engine
from fpforensics.common.engines.base import EngineFacts, Host
from fpforensics.common.errors import UsageError
from fpforensics.common.signals import CapturePlan, Sampling, Trace
from fpforensics.prover.checkpoint.make import make_checkpoint

torch = pytest.importorskip("torch", reason="pip install '.[hf]'")

PLAN = CapturePlan(layers=("1", "2", "last"), prefill_positions=4)


@pytest.fixture(scope="module")
def made(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("made")
    names = ("awq", "gptq", "w4a16")
    return {name: make_checkpoint(str(tiny_llama), name, group_size=32, output=folder / name).path for name in names}


def run(path: Path, spec: str) -> tuple[list[Trace], EngineFacts]:
    engine = open_engine(parse_config(f"model=tiny,{spec}"), Host(device="cpu", models={"tiny": str(path)}))
    try:
        originals = references(2)
        traces = engine.generate(originals, Sampling(max_new_tokens=6), PLAN)
        assert not differences(traces, engine.generate(originals, Sampling(max_new_tokens=6), PLAN))
        assert not differences(traces, engine.teacher_force(forcings(originals, traces), PLAN, "decode"))
        return traces, engine.facts()
    finally:
        engine.close()


@pytest.mark.parametrize("name", ["awq", "gptq"])
@pytest.mark.parametrize("spec", ["dtype=bf16", "dtype=fp32", "dtype=bf16,matmul=fp32-rounded"])
def test_replay_is_bit_identical_and_far_from_unquantized(
    tiny_llama: Path, made: dict[str, Path], name: str, spec: str
) -> None:
    whole, _ = run(tiny_llama, spec)
    rounded, facts = run(made[name], f"quant={name},{spec}")
    dtype = "fp32" if "fp32" in spec.partition(",")[0] else "bf16"
    assert facts.quantization_kernel.startswith(f"{name} dequantized at load to {dtype} x28; not quantized: lm_head")
    before, after = (traces[0].phase("prefill").hidden_states["1"].astype(np.float64) for traces in (whole, rounded))
    assert np.linalg.norm(after - before) > 0.02 * np.linalg.norm(before)


def test_fused_experts_are_dequantized_too(tiny_qwen3_moe: Path, tmp_path: Path) -> None:
    path = make_checkpoint(str(tiny_qwen3_moe), "awq", group_size=32, output=tmp_path / "awq").path
    whole, _ = run(tiny_qwen3_moe, "dtype=bf16")
    rounded, facts = run(path, "dtype=bf16,quant=awq")
    assert facts.quantization_kernel == "awq dequantized at load to bf16 x20; not quantized: lm_head"
    before, after = (traces[0].phase("prefill").hidden_states["1"].astype(np.float64) for traces in (whole, rounded))
    assert np.linalg.norm(after - before) > 0.02 * np.linalg.norm(before)


def test_gptq_holds_the_weights_that_compressed_tensors_reads(made: dict[str, Path]) -> None:
    # Same levels, same scales, another library: compressed-tensors' own decompression is the judge of our layout.
    pytest.importorskip("compressed_tensors", reason="pip install '.[compressed-tensors]'")
    from transformers import AutoModelForCausalLM

    from fpforensics.common.engines.transformers_load import load_model

    theirs = AutoModelForCausalLM.from_pretrained(made["w4a16"], dtype=torch.float32, device_map="cpu")
    ours = load_model(parse_config("quant=gptq,dtype=fp32"), made["gptq"], torch.device("cpu"))
    ids = torch.arange(10, 40)[None]
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, ours(ids).logits)


# GPTQModel's AWQ kernel multiplies in float16 whatever is asked for.
@pytest.mark.parametrize(("name", "kernel", "near"), [("awq", "torch_awq", 1e-2), ("gptq", "torch", 1e-5)])
def test_gptqmodel_computes_the_same(made: dict[str, Path], name: str, kernel: str, near: float) -> None:
    pytest.importorskip("gptqmodel", reason="pip install --no-deps gptqmodel==7.6.0 optimum, and what they import")
    from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig

    from fpforensics.common.engines.transformers_load import load_model

    chosen = (GPTQConfig if name == "gptq" else AwqConfig)(bits=4, group_size=32, backend=kernel)
    theirs = AutoModelForCausalLM.from_pretrained(
        made[name], dtype=torch.float32, device_map="cpu", quantization_config=chosen
    )
    ours = load_model(parse_config(f"quant={name},dtype=fp32"), made[name], torch.device("cpu"))
    ids = torch.arange(10, 40)[None]
    with torch.no_grad():
        expected, found = theirs(ids).logits.float(), ours(ids).logits
    assert torch.norm(found - expected) <= near * torch.norm(expected)


@pytest.mark.parametrize(
    ("name", "changed", "said"),
    [
        ("gptq", {"bits": 8}, "has bits=8, checkpoint_format=gptq"),
        ("gptq", {"checkpoint_format": "gptq_v2"}, "checkpoint_format=gptq_v2; the transformers engine reads bits=4"),
        ("gptq", {"dynamic": {"a": {}}}, "mixed widths"),
        ("awq", {"version": "gemv"}, "version=gemv"),
        ("awq", {"quant_method": "gptq"}, "is stored quantized as gptq, the config says quant=awq"),
    ],
)
def test_other_layouts_are_refused(
    made: dict[str, Path], tmp_path: Path, name: str, changed: dict[str, Any], said: str
) -> None:
    config = json.loads((made[name] / "config.json").read_text())
    config["quantization_config"] |= changed
    link(made[name], tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError) as refused:
        run(tmp_path, f"quant={name}")
    assert said in refused.value.diagnostics()


def test_an_incomplete_weight_is_refused(made: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    link(made["gptq"], tmp_path)
    tensors = load_file(made["gptq"] / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.qzeros"]
    (tmp_path / "model.safetensors").unlink()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=r"gptq weight 'model\.layers\.0\.mlp\.up_proj' .* is incomplete"):
        run(tmp_path, "quant=gptq")


def link(source: Path, folder: Path) -> None:
    for file in source.iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file)
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
