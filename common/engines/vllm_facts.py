"""What vLLM resolved, read from a loaded worker: attention, quantization and MoE kernels, sizes of graphs."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import torch
from torch import nn

from fpforensics.common.engines import vllm_compat as compat
from fpforensics.common.engines.transformers_capture import decoder_blocks
from fpforensics.common.engines.vllm_jobs import WorkerFacts
from fpforensics.common.engines.vllm_taps import key_source

_VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "CUBLAS_WORKSPACE_CONFIG",
    "VLLM_CPU_INT4_W4A8",
    "VLLM_DISABLED_KERNELS",
    "VLLM_USE_TRITON_AWQ",
)


def worker_facts(runner: Any, vllm_config: Any) -> WorkerFacts:
    """What this rank's model runner holds."""
    pipeline_rank, tensor_rank = compat.ranks()
    model, text = runner.get_model(), runner.model_config.hf_text_config
    blocks = decoder_blocks(model, compat.depth(runner))
    sources: list[Any] = [source for module in blocks if (source := key_source(module)) is not None]
    cuda = runner.device.type == "cuda"
    return WorkerFacts(
        pipeline_rank=pipeline_rank,
        tensor_rank=tensor_rank,
        gpu=torch.cuda.get_device_name(runner.device) if cuda else "",
        architecture=type(model).__name__,
        vocab_size=int(runner.model_config.get_vocab_size()),
        num_layers=compat.depth(runner),
        hidden_size=int(text.hidden_size),
        head_dim=int(runner.model_config.get_head_size()),
        key_heads=int(sources[0].num_kv_heads) if sources else 0,
        total_key_heads=int(runner.model_config.get_total_num_kv_heads()),
        attention=sorted({_attention(source) for source in sources}),
        quantization=_named(_quantized(model)),
        experts=_named(_experts(model)),
        products=_named(_linear(model)),
        numerics=_numerics(runner, vllm_config, cuda),
    )


def _attention(source: Any) -> str:
    """The kernel's name, with the version of FlashAttention where it has one."""
    impl = source.impl
    version = getattr(impl, "vllm_flash_attn_version", None)
    isa = getattr(impl, "isa", None)
    name = source.attn_backend.get_name()
    details = [f"version {version}"] if version else []
    details += [f"isa {isa}"] if isa else []
    cache = str(getattr(source, "kv_cache_dtype", "auto"))
    details += [f"KV cache {cache}"] if cache != "auto" else []
    return f"{name} ({', '.join(details)})" if details else name


def _linear(model: nn.Module) -> Counter[str]:
    """Methods of unquantized linear layers."""
    return Counter(
        type(method).__name__
        for module in model.modules()
        if (method := getattr(module, "quant_method", None)) is not None
        and type(method).__name__ == "UnquantizedLinearMethod"
    )


def _quantized(model: nn.Module) -> Counter[str]:
    """Methods and kernels of quantized layers."""
    found: Counter[str] = Counter()
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        name = type(method).__name__
        if method is None or "Unquantized" in name or "KVCache" in name or _is_experts(module):
            continue
        scheme = getattr(module, "scheme", None)
        parts = [name, type(scheme).__name__ if scheme is not None else "", _kernel(method) or _kernel(scheme)]
        parts += ["int8 activations"] if getattr(module, "use_w4a8", False) else []  # on CPUs with AMX
        found[" ".join(filter(None, parts))] += 1
    return found


def _experts(model: nn.Module) -> Counter[str]:
    """Methods and kernels of mixture-of-experts layers."""
    found: Counter[str] = Counter()
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if method is not None and _is_experts(module):
            found[" ".join(filter(None, [type(method).__name__, _kernel(method)]))] += 1
    return found


def _is_experts(module: nn.Module) -> bool:
    return "MoE" in type(getattr(module, "quant_method", None)).__name__


def _kernel(method: Any) -> str:
    """What a method will call: the class of its kernel, or the name of the backend it chose."""
    for name, value in sorted(getattr(method, "__dict__", {}).items()):
        if name in ("kernel", "fp8_linear", "experts_cls") or name.endswith(("_kernel", "_backend")):
            if isinstance(value, (str, int, bool, type(None))):
                continue
            return str(getattr(value, "__name__", "") or getattr(value, "name", "") or type(value).__name__)
    return ""


def _named(found: Counter[str]) -> list[str]:
    return [f"{name} x{count}" for name, count in sorted(found.items())]


def _numerics(runner: Any, vllm_config: Any, cuda: bool) -> dict[str, str]:
    compilation, cache = vllm_config.compilation_config, vllm_config.cache_config
    facts = {
        "threads": str(torch.get_num_threads()),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "mkl": str(torch.backends.mkl.is_available()),
        "onednn": str(torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic_algorithms": str(torch.are_deterministic_algorithms_enabled()),
        "compile": str(getattr(compilation.mode, "name", compilation.mode)),
        "cuda_graphs": str(getattr(compilation.cudagraph_mode, "name", compilation.cudagraph_mode)),
        "graph_sizes": ", ".join(map(str, compilation.cudagraph_capture_sizes or [])) or "none",
        "max_batched_tokens": str(vllm_config.scheduler_config.max_num_batched_tokens),
        "block_size": str(cache.block_size),
        "prefix_caching": str(bool(cache.enable_prefix_caching)),
        "kv_cache_dtype": str(cache.cache_dtype),
        "quantization": str(vllm_config.model_config.quantization or "none"),
        "model_runner": type(runner).__name__,
        **{name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }
    if cuda:
        matmul = torch.backends.cuda.matmul
        facts |= {
            "cuda": str(torch.version.cuda),
            "cudnn": str(torch.backends.cudnn.version()),
            "cuda_matmul_tf32": str(matmul.allow_tf32),
            "cudnn_tf32": str(torch.backends.cudnn.allow_tf32),
            "bf16_reduced_precision_reduction": str(matmul.allow_bf16_reduced_precision_reduction),
            "fp16_reduced_precision_reduction": str(matmul.allow_fp16_reduced_precision_reduction),
        }
    return facts
