"""From an execution config to a running vLLM engine core in this process, and vLLM's failures in our words."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fpforensics.common.config import ExecutionConfig
from fpforensics.common.engines import vllm_compat as compat
from fpforensics.common.engines.vllm_rules import check_device, check_ranks
from fpforensics.common.errors import Error, ReplayError, UsageError
from fpforensics.common.models import context_length, read_config

MAX_CONTEXT = 32768
_MOST_AT_ONCE = 1 << 16
_TOGETHER = 8192
_SEQUENCES = 256
_CPU_SEQUENCES = 8
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_WIDTHS = {"bf16": 2, "fp16": 2, "fp32": 4}
_BLOCK = 128
_GPU_MEMORY = 0.8
GPU_MEMORY_VARIABLE = "FPFORENSICS_VLLM_GPU_MEMORY"
_NO_SHARE = 0.01  # asks for next to nothing to be free at the start
_CACHE_SIZE = re.compile(r"([0-9]{1,6})(M|G)iB")
_UNITS = {"M": 1 << 20, "G": 1 << 30}
_NO_MEMORY = (
    "out of memory",
    "CUDA error: out of memory",
    "No available memory for the cache blocks",
    "is less than desired GPU memory utilization",
    "is less than requested memory",
    "is needed, which is larger than the available KV cache memory",
    "can't allocate memory",
    "not enough memory",
)


def prepare_imports(config: ExecutionConfig, wanted: str) -> str:
    """Import vLLM quietly; returns the device that it computes on, cpu or cuda. ``wanted`` is ``Host.device``."""
    compat.set_environment(config)
    if importlib.util.find_spec("torchvision") is not None:
        try:
            import torchvision  # type: ignore[import-not-found,unused-ignore]  # noqa: F401
        except Exception as error:
            raise ReplayError(
                f"torchvision does not import beside this torch: {_one_line(error)}",
                "run: pip uninstall -y torchvision torchaudio torchcodec",
            ) from error
    try:
        device = "cpu" if compat.is_cpu() else "cuda"
    except ImportError as error:
        raise ReplayError(
            f"vLLM does not import: {_one_line(error)}", "check that it fits the installed torch"
        ) from error
    if wanted not in ("auto", device):
        raise ReplayError(
            f"device {wanted}: the installed vLLM computes on {'CPUs' if device == 'cpu' else 'GPUs'} only",
            f"use --device {device}, or give --python one with the other vLLM",
        )
    check_device(config, device)
    check_ranks(config, device, compat.gpu_count() if device == "cuda" else None)
    return device


def start(config: ExecutionConfig, path: Path, device: str) -> Any:
    """A running ``LLMEngine`` on the checkpoint in ``path``."""
    from vllm import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    options = compat.known_arguments(engine_options(config, path, device))
    return LLMEngine.from_engine_args(EngineArgs(**options), enable_multiprocessing=False)


def engine_options(config: ExecutionConfig, path: Path, device: str) -> dict[str, Any]:
    """vLLM's engine arguments for ``config``: everything that decides the arithmetic is named."""
    length = min(context_length(path) or MAX_CONTEXT, MAX_CONTEXT)
    together = config.batch_size == 0
    budget = config.max_batched_tokens or (
        _TOGETHER if together else min(config.batch_size * length, max(_MOST_AT_ONCE, length))
    )
    sequences = min(_SEQUENCES, budget) if together else config.batch_size
    ranks = config.tensor_parallel * config.pipeline_parallel
    options: dict[str, Any] = {
        "model": str(path),
        "skip_tokenizer_init": True,
        "trust_remote_code": False,
        "generation_config": "vllm",
        "load_format": "safetensors",
        "dtype": _DTYPES[config.dtype],
        "seed": 0,
        "max_model_len": length,
        "max_num_seqs": sequences,
        "max_num_batched_tokens": max(budget, sequences),
        "enable_chunked_prefill": True,
        "enable_prefix_caching": False,
        "async_scheduling": False,
        "disable_log_stats": True,
        "tensor_parallel_size": config.tensor_parallel,
        "pipeline_parallel_size": config.pipeline_parallel,
        "enable_expert_parallel": config.expert_parallel > 1,
        "distributed_executor_backend": "mp" if ranks > 1 else "uni",
        "kv_cache_dtype": config.kv_cache,
        "worker_cls": compat.WORKER,
        "additional_config": {
            "plain_awq": config.quantization == "awq",
            "evidence": 2,
        },  # part of the key of compiled code
        **compat.attention_options(config),
        **compat.compilation_options(config),
        **compat.quantization_options(config),
    }
    if device == "cpu":
        rows = min(sequences, _CPU_SEQUENCES) if together else config.batch_size
        tokens = rows * length + (sequences + 2) * _BLOCK
        of_one_rank = tokens * _token_bytes(config, path) // config.tensor_parallel
        _require_memory(config, of_one_rank * ranks)
        options["kv_cache_memory_bytes"] = of_one_rank
    else:
        options.update(_gpu_memory())
    return options


@contextlib.contextmanager
def explained(config: ExecutionConfig, device: str) -> Iterator[None]:
    """Turn what vLLM raises into an :class:`Error` that names the config's part and the way out."""
    try:
        yield
    except Error:
        raise
    except Exception as error:
        raise _explain(config, device, error) from error


def _gpu_memory() -> dict[str, float]:
    """vLLM's memory arguments on a GPU: its share of the memory, or a KV cache of so many bytes where the variable is a size.

    Each on every GPU. With a share vLLM measures what is left for its cache, and fails where another process frees memory meanwhile;
    with a size it does not, so that engines may start beside each other on one GPU.
    """
    text = os.environ.get(GPU_MEMORY_VARIABLE, str(_GPU_MEMORY))
    if (size := _CACHE_SIZE.fullmatch(text)) and (cache := int(size[1]) * _UNITS[size[2]]):
        return {"kv_cache_memory_bytes": cache, "gpu_memory_utilization": _NO_SHARE}
    with contextlib.suppress(ValueError):
        if 0.0 < (share := float(text)) <= 1.0:
            return {"gpu_memory_utilization": share}
    raise UsageError(
        f"{GPU_MEMORY_VARIABLE}={text!r}",
        "a share of the GPU's memory, above 0 and at most 1, or the KV cache's size, e.g. 2GiB",
    )


def _require_memory(config: ExecutionConfig, wanted: int) -> None:
    """Raise :class:`ReplayError` for a KV cache, over all ranks, that would take more than half of what this machine has left."""
    available = available_memory()
    if wanted > available // 2:
        batch = config.batch_size or "auto"
        raise ReplayError(
            f"a KV cache of {wanted} bytes, where half of the {available} available may be taken: "
            f"out of memory on cpu: model {config.model}, dtype={config.dtype}, batch={batch}",
            "use a smaller model or batch, a checkpoint with a shorter context, or another device",
        )


def available_memory() -> int:
    """Bytes of memory that this machine can give without swapping; all of it where Linux does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _token_bytes(config: ExecutionConfig, path: Path) -> int:
    """Bytes of KV cache for one token over all layers; generous where a model is unusual."""
    content = read_config(path)
    text = content.get("text_config")
    text = text if isinstance(text, dict) else content
    heads = int(text.get("num_attention_heads") or 32)
    key_heads = int(text.get("num_key_value_heads") or heads)
    size = int(text.get("head_dim") or int(text.get("hidden_size") or 4096) // heads)
    # Ranks beyond the KV heads hold copies.
    return (
        2
        * max(key_heads, config.tensor_parallel)
        * size
        * int(text.get("num_hidden_layers") or 32)
        * _WIDTHS[config.dtype]
    )


def _explain(config: ExecutionConfig, device: str, error: Exception) -> Error:
    chain: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(chain) < 5:
        chain.append(" ".join(str(cause).split()))
        cause = cause.__cause__ or cause.__context__
    text = " | ".join(chain)
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(p in text for p in _NO_MEMORY)
    ):
        return ReplayError(
            f"out of memory on {device}: model {config.model}, dtype={config.dtype}, batch={config.batch_size or 'auto'}",
            "use a smaller model, batch or prompt, more ranks (tp), or another device"
            + (f"; {GPU_MEMORY_VARIABLE} says how much vLLM may take" if device == "cuda" else ""),
        )
    if "are not supported for now" in text or "no vLLM implementation" in text or "architectures" in text:
        return UsageError(f"vLLM has no implementation of {config.model}: {text[:300]}", "use backend=transformers")
    if any(
        part in text for part in ("is not valid for this configuration", "attention backend", "attention configuration")
    ):
        way_out = "use backend=transformers" if config.attention == "auto" else "use attn=auto"
        return ReplayError(f"attn={config.attention} does not run on {device}: {text[:300]}", way_out)
    if any(part in text for part in ("uantiz", "WNA16", "linear-backend", "Marlin", "MoE backend")):
        return ReplayError(
            f"quant={config.quantization} does not run on {device}: {text[:300]}",
            "use another quantization, or backend=transformers",
        )
    if "divisible" in text and ("tensor" in text or "parallel" in text):
        return UsageError(f"tp={config.tensor_parallel} does not divide the model: {text[:200]}", "use another tp")
    if "World size" in text or "world size" in text:
        return ReplayError(
            f"tp={config.tensor_parallel}, pp={config.pipeline_parallel}: {text[:200]}", "use fewer ranks"
        )
    return ReplayError(
        f"vLLM failed: {type(error).__name__}: {text[:400]}",
        f"config: dtype={config.dtype}, attn={config.attention}, quant={config.quantization}",
    )


def _one_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
