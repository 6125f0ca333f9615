"""From an execution config to a loaded model: what is asked for is checked before torch is imported, and
nothing falls back.

The checkpoint must be safetensors with every weight present; no code of the checkpoint is run.
"""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fpforensics.common.config import ExecutionConfig, is_vllm_attention
from fpforensics.common.engines.transformers_int4 import (
    STORED_INT4,
    check_layout,
    dequantized_state,
    mark_dequantized,
)
from fpforensics.common.engines.transformers_shares import require_shares
from fpforensics.common.errors import MissingDependencyError, ReplayError, UsageError
from fpforensics.common.models import ANOTHER, stored_quantization

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

INSTALL_HF = "pip install '.[hf]'"
INSTALL_FLASH = "pip install '.[flash-attn]'"
# Each weight is turned back into the compute dtype before the product, so that the product may be ours.
WEIGHT_ONLY = frozenset({"none", "bnb-nf4", "bnb-fp4", "torchao-int8", "torchao-int4", "awq", "gptq"})
_PACKAGES = {
    "bnb": ("bitsandbytes", INSTALL_HF),
    "torchao": ("torchao", "pip install '.[torchao]'"),
}
_INT4_GROUPS = (128, 64, 32, 16)
_VLLM_ONLY = frozenset({"awq_marlin", "gptq_marlin", "compressed-int4", "compressed-int8", "compressed-fp8", "fp8"})


def check_config(config: ExecutionConfig) -> None:
    """Raise :class:`UsageError` or :class:`MissingDependencyError` for what this engine does not do; needs no
    torch.
    """
    check_combination(config)
    check_packages(config)


def check_combination(config: ExecutionConfig) -> None:
    """Raise :class:`UsageError` for what this engine does nowhere."""
    _check_parallelism(config)
    if is_vllm_attention(config.attention):
        raise UsageError(f"attn={config.attention} needs backend=vllm", "use attn=sdpa, or backend=vllm")
    if config.quantization in _VLLM_ONLY:
        raise UsageError(f"quant={config.quantization} needs backend=vllm", "name both, or another quantization")
    for asked, what in (
        (config.kv_cache != "auto", f"kv={config.kv_cache}"),
        (config.pipeline_parallel > 1, f"pp={config.pipeline_parallel}"),
        (config.batch_size == 0, "batch=auto"),
        (config.max_batched_tokens > 0, f"chunk={config.max_batched_tokens}"),
        (config.cuda_graphs, "graphs=true"),
        (config.batch_invariant, "invariant=true"),
    ):
        if asked:
            raise UsageError(f"{what} needs backend=vllm", "leave it out, or use backend=vllm")
    if config.matmul == "fp32-rounded":
        if config.quantization not in WEIGHT_ONLY:
            raise UsageError(
                f"matmul=fp32-rounded does not combine with quant={config.quantization}: its own kernels multiply",
                "use matmul=native",
            )
        if config.dtype not in ("bf16", "fp16"):
            raise UsageError(f"matmul=fp32-rounded rounds to bf16 or fp16, not to {config.dtype}", "use matmul=native")
    if config.dtype == "fp64" and config.quantization != "none":
        raise UsageError(f"quant={config.quantization} does not compute in fp64", "use dtype=bf16")
    if config.compile and config.attention == "flash_attention_2":
        raise UsageError("compile=true cannot trace attn=flash_attention_2", "use attn=sdpa_flash")
    if config.attention == "flash_attention_2" and config.dtype not in ("bf16", "fp16"):
        raise UsageError(f"attn=flash_attention_2 computes in bf16 or fp16, not {config.dtype}", "use attn=sdpa")


def check_packages(config: ExecutionConfig) -> None:
    """Raise :class:`MissingDependencyError` for a package that ``config`` needs and this interpreter lacks."""
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError("backend transformers", package, INSTALL_HF)
    if config.attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise MissingDependencyError("attn=flash_attention_2", "flash-attn", INSTALL_FLASH)
    package, install = _PACKAGES.get(config.quantization.partition("-")[0], ("", ""))
    if package and importlib.util.find_spec(package) is None:
        raise MissingDependencyError(f"quant={config.quantization}", package, install)


def check_checkpoint(config: ExecutionConfig, path: Path) -> None:
    """Raise :class:`UsageError` where the checkpoint in ``path`` is not stored as ``config`` says; needs no torch."""
    settings = stored_quantization(path)
    declared = str(settings.get("quant_method", ""))
    if declared != (config.quantization if config.quantization in STORED_INT4 else ""):
        stored = f"quantized as {declared}" if declared else "unquantized"
        raise UsageError(
            f"the checkpoint of {config.model} is stored {stored}, the config says quant={config.quantization}",
            f"use quant={declared}" if declared in STORED_INT4 else ANOTHER,
        )
    if declared:
        check_layout(path, settings)
    if config.emulate_tensor_parallel > 1:
        require_shares(path, config.emulate_tensor_parallel)


def prepare_imports() -> None:
    """Import torch and transformers quietly, or say what keeps them from importing; after :func:`check_packages`."""
    # What they say while importing is not about this run: optional GPU libraries of torchao that do not load, casts of
    # bitsandbytes at every product (recorded as a fact instead).
    for name in ("torchao", "torch.utils._pytree", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import torch

    if importlib.util.find_spec("torchvision") is not None:
        try:
            import torchvision  # type: ignore[import-not-found,unused-ignore]  # noqa: F401
        except Exception as error:
            # transformers imports it wherever it is installed, and every model then fails with an unrelated
            # message.
            raise ReplayError(
                f"torchvision does not import beside torch {torch.__version__}: {_one_line(error)}",
                "run: pip uninstall -y torchvision torchaudio torchcodec",
            ) from error
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def choose_device(name: str, config: ExecutionConfig) -> torch.device:
    """The device for ``Host.device``. Raises :class:`ReplayError` if it is not there or cannot run
    ``config``.
    """
    import torch

    if name not in ("auto", "cpu", "cuda"):
        raise UsageError(f"unknown device {name!r}", "use auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ReplayError("device cuda is not available here", "use device auto or cpu")
    device = torch.device("cuda:0" if name != "cpu" and torch.cuda.is_available() else "cpu")
    if config.attention == "flash_attention_2" and device.type != "cuda":
        raise ReplayError("attn=flash_attention_2 needs a CUDA device and runs on cpu here", "use attn=sdpa_flash")
    return device


def compute_dtype(config: ExecutionConfig) -> torch.dtype:
    """The torch dtype of ``config.dtype``."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}[config.dtype]


def load_model(config: ExecutionConfig, path: Path, device: torch.device) -> PreTrainedModel:
    """The model of the checkpoint in ``path``, quantized as ``config`` says, ready for inference on
    ``device``.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

    check_checkpoint(config, path)
    architecture = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    options: dict[str, Any] = {
        "dtype": compute_dtype(config),
        "attn_implementation": _attention_name(config),
        "device_map": {"": device},
        "output_loading_info": True,
    }
    quantization = _quantization_config(config, architecture)
    if quantization is not None:
        options["quantization_config"] = quantization
    if config.matmul == "fp32-rounded":
        options["experts_implementation"] = "eager"  # one product per expert, which can be ours
    if config.quantization in STORED_INT4:
        state = dequantized_state(path, config.quantization, compute_dtype(config))
        del architecture.quantization_config
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(architecture)]
        model, report = model_class.from_pretrained(None, config=architecture, state_dict=state, **options)
        mark_dequantized(model, path)
    else:
        model, report = AutoModelForCausalLM.from_pretrained(
            path, local_files_only=True, trust_remote_code=False, use_safetensors=True, **options
        )
    # transformers would fill what is missing with random numbers.
    for what in ("missing_keys", "mismatched_keys", "error_msgs"):
        if report.get(what):
            names = ", ".join(str(name) for name in sorted(report[what], key=str)[:3])
            raise ReplayError(
                f"the checkpoint of {config.model} does not fit its model: {what.replace('_', ' ')}: {names}",
                "check that all its files are there",
            )
    loaded: PreTrainedModel = model.eval()
    return loaded


def int4_group_size(architecture: Any) -> int:
    """The largest group that divides every projection's input width.

    Not 32: a checkpoint that was stored in 4-bit blocks of 32, as the embedded one was, quantizes in the same
    blocks almost without loss, and evidence of int4 would be evidence of nothing.
    """
    text = architecture.get_text_config()
    heads = text.num_attention_heads
    widths = {
        text.hidden_size,
        heads * (getattr(text, "head_dim", None) or text.hidden_size // heads),
        getattr(text, "intermediate_size", None) or text.hidden_size,
    }
    for size in _INT4_GROUPS:
        if all(width % size == 0 for width in widths):
            return size
    raise UsageError(
        f"quant=torchao-int4 needs widths divisible by {_INT4_GROUPS[-1]}; this model has {sorted(widths)}",
        "use quant=torchao-int8",
    )


def _check_parallelism(config: ExecutionConfig) -> None:
    tp, ep, emulated = config.tensor_parallel, config.expert_parallel, config.emulate_tensor_parallel
    if tp > 1 and emulated > 1:
        raise UsageError(
            f"tp={tp} does not combine with emulate_tp={emulated}: products are split among devices or on one",
            f"use emulate_tp={emulated} alone",
        )
    if tp > 1:
        raise UsageError(
            f"tp={tp} needs backend=vllm: backend transformers runs on one device",
            f"use backend=vllm, or emulate_tp={tp} for the partial sums of {tp} ranks on one device",
        )
    if ep > 1:
        raise UsageError(
            f"ep={ep} needs backend=vllm: backend transformers runs on one device", "use backend=vllm, or ep=1"
        )
    if emulated > 1 and config.quantization != "none":
        raise UsageError(
            f"emulate_tp={emulated} does not combine with quant={config.quantization}: "
            "products of quantized weights are not split",
            "use quant=none",
        )


def _attention_name(config: ExecutionConfig) -> str:
    if config.attention.startswith("sdpa"):
        return "sdpa"
    return "flex_attention" if config.attention == "flex" else config.attention


def _quantization_config(config: ExecutionConfig, architecture: Any) -> Any:
    from transformers import BitsAndBytesConfig, TorchAoConfig

    dtype = compute_dtype(config)
    match config.quantization:
        case "bnb-int8":
            return BitsAndBytesConfig(load_in_8bit=True)
        case "bnb-nf4" | "bnb-fp4":
            kind = config.quantization.removeprefix("bnb-")
            return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=dtype)
        case "torchao-int8":
            from torchao.quantization import Int8WeightOnlyConfig

            return TorchAoConfig(Int8WeightOnlyConfig())
        case "torchao-int4":
            import torch
            from torchao.quantization import IntxWeightOnlyConfig
            from torchao.quantization.granularity import PerGroup
            from torchao.quantization.quant_primitives import MappingType

            # Not Int4WeightOnlyConfig: its packings run on GPUs only, and both sides must hold the same
            # integers.
            return TorchAoConfig(
                IntxWeightOnlyConfig(
                    weight_dtype=torch.int4,
                    granularity=PerGroup(int4_group_size(architecture)),
                    mapping_type=MappingType.ASYMMETRIC,
                )
            )
    return None


def _one_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
