"""What a loaded model is and what decides its rounding, read from the model and from torch itself."""

from __future__ import annotations

import os
import re
from collections import Counter

import torch
from torch import nn
from transformers import PreTrainedModel

from fpforensics.common.config import ExecutionConfig
from fpforensics.common.engines.base import ModelFacts
from fpforensics.common.engines.transformers_load import int4_group_size

_LAYER = re.compile(r"\.\d+(?=\.)")
_VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "CUBLAS_WORKSPACE_CONFIG",
)


def model_facts(model: PreTrainedModel, name: str, digest: str) -> ModelFacts:
    """The checkpoint's shape and identity."""
    text = model.config.get_text_config()
    heads = int(text.num_attention_heads)
    head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    return ModelFacts(
        name=name,
        architecture=type(model).__name__,
        weights_digest=digest,
        vocab_size=int(text.vocab_size),
        num_layers=int(text.num_hidden_layers),
        hidden_size=int(text.hidden_size),
        key_width=int(getattr(text, "num_key_value_heads", None) or heads) * head_dim,
    )


def quantized_modules(model: nn.Module, config: ExecutionConfig) -> str:
    """How many linear layers and fused experts hold quantized weights, and in which class; empty for unquantized configs."""
    if config.quantization == "none":
        return ""
    holders: Counter[str] = Counter()
    plain: dict[str, None] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if type(module).__module__.startswith("bitsandbytes"):
            holders[f"{type(module).__module__.partition('.')[0]}.{type(module).__name__}"] += 1
        elif getattr(module, "dequantized", False):
            holders[f"{config.quantization} dequantized at load to {config.dtype}"] += 1
        elif type(weight).__module__.startswith("torchao"):
            holders[f"torchao.{type(weight).__name__}"] += 1
        elif isinstance(module, nn.Linear) or _is_fused(module):
            plain[_LAYER.sub(".*", name)] = None
    parts = [f"{name} x{count}" for name, count in sorted(holders.items())]
    if config.quantization == "torchao-int4":
        parts.append(f"int4 asymmetric, groups of {int4_group_size(model.config)}")
    if config.quantization == "bnb-int8" and config.dtype != "fp16":
        parts.append("activations cast to float16")
    if plain:
        parts.append(f"not quantized: {', '.join(list(plain)[:3])}{', …' if len(plain) > 3 else ''}")
    if config.matmul == "fp32-rounded":
        parts.append("dequantized once, products in float32")
    return "; ".join(parts)


def _is_fused(module: nn.Module) -> bool:
    """Whether a module holds its experts' weights as one tensor, as libraries that quantize linear layers leave it."""
    return any(weights.dim() == 3 for weights in module.parameters(recurse=False)) and "xperts" in type(module).__name__


def numerics(model: PreTrainedModel, config: ExecutionConfig) -> dict[str, str]:
    """Everything else that decides rounding. Nothing is set here: what providers run is only recorded."""
    facts = {
        "threads": str(torch.get_num_threads()),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "mkl": str(torch.backends.mkl.is_available()),
        "onednn": str(torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic_algorithms": str(torch.are_deterministic_algorithms_enabled()),
        "matmul": config.matmul,
        "compile": "each decoder block, dynamic shapes" if config.compile else "off",
        **{name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }
    if (experts := getattr(model.config, "_experts_implementation", None)) and _has_experts(model):
        facts["experts"] = str(experts)
    if (ranks := config.emulate_tensor_parallel) > 1:
        facts["emulated_tensor_parallel"] = f"{ranks} partial sums in {config.dtype}"
    if torch.cuda.is_available():
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


def gpu_name(device: torch.device) -> str:
    """The device's name as its driver gives it; empty on a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def _has_experts(model: nn.Module) -> bool:
    return any(name.endswith("experts") for name, _ in model.named_modules())
