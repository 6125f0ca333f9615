"""What the engine refuses and why, in one line, and what it reports about what really ran."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from engine_runs import forcings, references

from fpforensics.common.config import ExecutionConfig, parse_config
from fpforensics.common.engines import open_engine
from fpforensics.common.engines.base import EngineFacts, Host
from fpforensics.common.errors import Error, MissingDependencyError, ReplayError, UnknownModelError, UsageError
from fpforensics.common.signals import CapturePlan, Sampling

torch = pytest.importorskip("torch", reason="pip install '.[hf]'")

PLAN = CapturePlan(layers=("1",), prefill_positions=2)


def run(path: Path, spec: str) -> EngineFacts:
    engine = open_engine(parse_config(f"model=tiny,{spec}"), Host(device="cpu", models={"tiny": str(path)}))
    try:
        engine.generate(references(1), Sampling(max_new_tokens=4), PLAN)
        return engine.facts()
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("spec", "kind", "said"),
    [
        ("attn=sdpa_efficient", ReplayError, "attn=sdpa_efficient does not run on cpu in bf16"),
        ("attn=sdpa_cudnn,dtype=fp16", ReplayError, "attn=sdpa_cudnn does not run on cpu in fp16"),
        ("tp=2", UsageError, "tp=2 needs backend=vllm"),
        ("tp=2", UsageError, "or emulate_tp=2"),
        ("ep=4", UsageError, "ep=4 needs backend=vllm"),
        ("attn=vllm_triton", UsageError, "attn=vllm_triton needs backend=vllm"),
        ("quant=awq_marlin", UsageError, "quant=awq_marlin needs backend=vllm"),
        ("kv=fp8", UsageError, "kv=fp8 needs backend=vllm"),
        ("pp=2", UsageError, "pp=2 needs backend=vllm"),
        ("batch=auto", UsageError, "batch=auto needs backend=vllm"),
        ("chunk=64", UsageError, "chunk=64 needs backend=vllm"),
        ("graphs=true", UsageError, "graphs=true needs backend=vllm"),
        ("invariant=true", UsageError, "invariant=true needs backend=vllm"),
        ("matmul=fp32-rounded,quant=bnb-int8", UsageError, "does not combine with quant=bnb-int8"),
        ("matmul=fp32-rounded,dtype=fp32", UsageError, "rounds to bf16 or fp16"),
        ("quant=bnb-nf4,dtype=fp64", UsageError, "does not compute in fp64"),
        ("compile=true,attn=flash_attention_2", UsageError, "cannot trace"),
    ],
)
def test_what_cannot_run_says_why(tiny_llama: Path, spec: str, kind: type[Error], said: str) -> None:
    with pytest.raises(kind) as refused:
        run(tiny_llama, spec)
    assert said in refused.value.diagnostics()
    assert "\n" not in refused.value.diagnostics()


@pytest.mark.parametrize(
    ("spec", "package", "install"),
    [
        ("attn=flash_attention_2", "flash_attn", "pip install '.[flash-attn]'"),
    ],
)
def test_a_missing_package_is_answered_with_its_install_command(
    tiny_llama: Path, spec: str, package: str, install: str
) -> None:
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed here")
    with pytest.raises(MissingDependencyError) as refused:
        run(tiny_llama, spec)
    assert install in refused.value.hint


def test_an_unknown_backend_is_answered_with_the_known_ones() -> None:
    config = ExecutionConfig(backend="transformer")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no engine for backend 'transformer'") as refused:
        open_engine(config)
    assert "transformers" in refused.value.hint


def test_other_weights_than_the_config_names_are_refused(tiny_llama: Path) -> None:
    with pytest.raises(UnknownModelError, match="sha256:00"):
        run(tiny_llama, f"weights=sha256:{'00' * 32}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_a_device_that_is_not_there(tiny_llama: Path) -> None:
    with pytest.raises(ReplayError, match="cuda is not available"):
        open_engine(parse_config("model=tiny"), Host(device="cuda", models={"tiny": str(tiny_llama)}))


def test_a_compiler_that_is_not_there_is_named(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a worker, so that nothing that was compiled here earlier can answer instead."""
    from fpforensics.common.engines.remote import start_engine

    host = Host(
        device="cpu",
        models={"tiny": str(tiny_llama)},
        env={"CXX": "/nonexistent/g++", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"},
    )
    with start_engine(parse_config("model=tiny,compile=true"), host) as engine, pytest.raises(ReplayError) as failed:
        engine.generate(references(1), Sampling(max_new_tokens=2), PLAN)
    assert "compile=true could not be compiled" in failed.value.message
    assert "compiler" in failed.value.hint


@pytest.mark.parametrize(
    ("attention", "operator"),
    [
        ("sdpa", "aten::_scaled_dot_product_flash_attention_for_cpu"),
        ("sdpa_flash", "aten::_scaled_dot_product_flash_attention_for_cpu"),
        ("sdpa_math", "aten::_scaled_dot_product_attention_math"),
        ("eager", "eager matmul+softmax"),
    ],
)
def test_facts_name_the_attention_operator_of_each_phase(tiny_llama: Path, attention: str, operator: str) -> None:
    facts = run(tiny_llama, f"attn={attention}")
    assert facts.attention_kernels == {"prefill": [operator], "decode": [operator]}


@pytest.mark.parametrize(
    ("spec", "package", "parts"),
    [
        ("quant=bnb-nf4", "bitsandbytes", ["bitsandbytes.Linear4bit x28", "not quantized: lm_head", "bitsandbytes::"]),
        ("quant=bnb-int8", "bitsandbytes", ["bitsandbytes.Linear8bitLt x28", "activations cast to float16", "int8"]),
        ("quant=torchao-int8", "torchao", ["torchao.Int8Tensor x28"]),
        ("quant=torchao-int4", "torchao", ["int4 asymmetric, groups of 64", "x28"]),
        ("quant=bnb-nf4,matmul=fp32-rounded", "bitsandbytes", ["Linear4bit x28", "products in float32"]),
        ("quant=none", "torch", []),
    ],
)
def test_facts_name_the_quantization(tiny_llama: Path, spec: str, package: str, parts: list[str]) -> None:
    pytest.importorskip(package)
    facts = run(tiny_llama, spec)
    assert all(part in facts.quantization_kernel for part in parts), facts.quantization_kernel
    assert bool(facts.quantization_kernel) == bool(parts)


def test_facts_say_that_fused_experts_are_not_quantized(tiny_qwen3_moe: Path) -> None:
    pytest.importorskip("bitsandbytes")
    said = run(tiny_qwen3_moe, "quant=bnb-nf4").quantization_kernel
    assert "bitsandbytes.Linear4bit x16; not quantized: model.layers.*.mlp.experts, lm_head" in said


def test_facts_describe_model_batch_and_numerics(tiny_qwen3_moe: Path) -> None:
    facts = run(tiny_qwen3_moe, "batch=3,matmul=fp32-rounded")
    assert facts.device == "cpu" and facts.gpu == ""
    assert facts.batch_sizes == [3]
    assert facts.model.architecture == "Qwen3MoeForCausalLM"
    assert (facts.model.vocab_size, facts.model.num_layers, facts.model.hidden_size) == (512, 4, 64)
    assert facts.model.key_width == 32
    assert facts.model.weights_digest.startswith("sha256:")
    assert facts.numerics["matmul"] == "fp32-rounded"
    assert facts.numerics["experts"] == "eager"
    assert facts.numerics["threads"] == str(torch.get_num_threads())
    assert facts.numerics["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert "aten::" in facts.numerics["matmul_operators"]
    assert facts.versions["torch"] == torch.__version__


def test_a_replay_by_prefill_never_ran_a_decode_kernel(tiny_llama: Path) -> None:
    host = Host(device="cpu", models={"tiny": str(tiny_llama)})
    given = references(1)
    engine = open_engine(parse_config("model=tiny"), host)
    trace = engine.generate(given, Sampling(max_new_tokens=4), PLAN)
    engine.close()
    verifier = open_engine(parse_config("model=tiny"), host)
    verifier.teacher_force(forcings(given, trace), PLAN, "prefill")
    assert set(verifier.facts().attention_kernels) == {"prefill"}
    verifier.close()
