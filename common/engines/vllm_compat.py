"""Everything that depends on vLLM's version or insides, in one place: 0.26 on GPUs (torch 2.11) and 0.32 on CPUs (torch 2.13).

What we rely on, and nothing else: the V1 model runner's ``_model_forward`` and ``_sample``, its ``input_batch`` and
``query_start_loc``, the decoder layers' return values, and ``LLMEngine`` with ``worker_cls``. Both versions have them; where they
differ, it is said here.
"""

from __future__ import annotations

import glob
import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fpforensics.common.config import ExecutionConfig
from fpforensics.common.signals import Array

WORKER = "fpforensics.common.engines.vllm_worker.EvidenceWorker"

# Read by vLLM when it is imported. In-process: the engine's worker process is ours, and hooks need no pickles. The V1 runner:
# 0.26 would take the V2 runner for dense models, whose forward has no such seams.
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    # Ranks on a CPU: thread binding fails in containers, and 2 ranks on 2 cores would bind to the same one.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # Model processes start anew: a forked one would inherit our threads and sockets.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
_BACKENDS = {
    "vllm_flash_attn_2": ("FLASH_ATTN", 2),
    "vllm_flash_attn_3": ("FLASH_ATTN", 3),
    "vllm_triton": ("TRITON_ATTN", None),
    "vllm_flex": ("FLEX_ATTENTION", None),
    "vllm_cpu": ("CPU_ATTN", None),
}
_QUANTIZATIONS = {
    "awq": "awq",
    "awq_marlin": "awq_marlin",
    "gptq": "gptq",
    "gptq_marlin": "gptq_marlin",
    "compressed-int4": "compressed-tensors",
    "compressed-int8": "compressed-tensors",
    "compressed-fp8": "compressed-tensors",
    "bnb-nf4": "bitsandbytes",
    "torchao-int8": "torchao",
    "fp8": "fp8",
}
_KERNEL_OF = {"awq_marlin": "marlin", "gptq_marlin": "marlin", "gptq": "exllama"}


def set_environment(config: ExecutionConfig) -> None:
    """The variables that vLLM reads when it is imported; what the user set stays, but for what decides the arithmetic."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    os.environ["VLLM_BATCH_INVARIANT"] = "1" if config.batch_invariant else "0"


def is_cpu() -> bool:
    """Whether the installed vLLM computes on CPUs."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def gpu_count() -> int:
    """How many GPUs this process sees."""
    import torch

    return int(torch.cuda.device_count())


def attention_options(config: ExecutionConfig) -> dict[str, Any]:
    """The engine arguments for ``config.attention``."""
    if config.attention not in _BACKENDS:
        return {}
    name, version = _BACKENDS[config.attention]
    return {"attention_config": {"backend": name, **({"flash_attn_version": version} if version else {})}}


def quantization_options(config: ExecutionConfig) -> dict[str, Any]:
    """The engine arguments for ``config.quantization``.

    Since 0.26 both ``awq`` and ``awq_marlin`` mean vLLM's own choice, which is Marlin wherever it runs. Here they are two
    kernels: Marlin is asked for by ``linear_backend``, and switched off for ``awq`` by :func:`prepare_kernels`.
    """
    name = _QUANTIZATIONS.get(config.quantization)
    if name is None:
        return {}
    options: dict[str, Any] = {"quantization": name}
    if config.quantization in _KERNEL_OF:
        options["linear_backend"] = _KERNEL_OF[config.quantization]
    if name == "bitsandbytes":
        options["load_format"] = "bitsandbytes"
    if name == "torchao":
        options["hf_overrides"] = {"quantization_config_dict_json": _torchao_int8()}
    return options


def compilation_options(config: ExecutionConfig) -> dict[str, Any]:
    """The engine arguments for ``config.compile`` and ``config.cuda_graphs``."""
    if not config.compile and not config.cuda_graphs:
        return {"enforce_eager": True}
    if not config.cuda_graphs:
        return {"compilation_config": {"mode": 3, "cudagraph_mode": "NONE"}}
    if not config.compile:
        return {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}
    return {"compilation_config": {"mode": 3, "cudagraph_mode": "FULL_AND_PIECEWISE"}}


def known_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """``options``, as far as this version's ``EngineArgs`` has them; one that decides arithmetic and is unknown is an error."""
    from vllm import EngineArgs

    known = inspect.signature(EngineArgs).parameters
    missing = sorted(set(options) - set(known))
    if missing:
        raise TypeError(f"this version of vLLM has no engine argument {', '.join(missing)}")
    return options


def platform_worker() -> type[Any]:
    """vLLM's worker class for this platform."""
    if is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker

        worker: type[Any] = CPUWorker
    else:
        from vllm.v1.worker.gpu_worker import Worker

        worker = Worker
    return worker


def prepare_kernels(vllm_config: Any) -> None:
    """Before weights are loaded: the plain AWQ kernel runs only where Marlin is said not to."""
    if vllm_config.additional_config.get("plain_awq"):
        from vllm.model_executor.layers.quantization import auto_awq

        auto_awq.check_marlin_supported = lambda *args, **kwargs: False


def depth(runner: Any) -> int:
    """How many decoder layers the model has, over all pipeline stages."""
    return int(runner.model_config.hf_text_config.num_hidden_layers)


def width(runner: Any) -> int:
    """The width of the residual stream."""
    return int(runner.model_config.hf_text_config.hidden_size)


def graph_tokens(vllm_config: Any) -> int | None:
    """The tokens of the largest CUDA graph, 0 for compiled code without graphs; None where everything runs eagerly."""
    compilation = vllm_config.compilation_config
    compiled, graphs = bool(int(compilation.mode or 0)), _graphs(compilation)
    if not compiled and not graphs:
        return None
    return max(compilation.cudagraph_capture_sizes or [0]) if graphs else 0


def _graphs(compilation: Any) -> bool:
    mode = compilation.cudagraph_mode
    return mode is not None and str(getattr(mode, "name", mode)) != "NONE"


def batch_of(runner: Any) -> tuple[Sequence[str], Array, Array]:
    """The batch that is about to run: request ids, and the first position and the number of positions of each (B,)."""
    count = runner.input_batch.num_reqs
    starts = runner.input_batch.num_computed_tokens_cpu[:count].copy()
    edges = runner.query_start_loc.np[: count + 1]
    return list(runner.input_batch.req_ids[:count]), starts, edges[1:] - edges[:-1]


def sampled(tokens_B: Any) -> Any:  # noqa: N803
    """vLLM's own form of sampled tokens (B,)."""
    import torch
    from vllm.v1.outputs import SamplerOutput

    return SamplerOutput(sampled_token_ids=tokens_B.to(torch.int32)[:, None], logprobs_tensors=None)


def ranks() -> tuple[int, int]:
    """(pipeline rank, tensor-parallel rank) of this worker."""
    from vllm.distributed.parallel_state import get_pp_group, get_tp_group

    return int(get_pp_group().rank_in_group), int(get_tp_group().rank_in_group)


def free(device: str) -> None:
    """Give back the device memory that torch keeps for this process."""
    import torch

    if device == "cuda":
        torch.cuda.empty_cache()


def unname_shared_memory(folder: Path = Path("/dev/shm")) -> None:  # noqa: S108
    """On a CPU, take the names off the memory that ranks share, once all of them hold it: vLLM itself leaves them behind."""
    if instance := os.environ.get("VLLM_DIST_IDENT"):
        for path in folder.glob(f"{glob.escape(instance)}-*-cpushm_*"):
            path.unlink(missing_ok=True)


def token_prompt(ids: Sequence[int]) -> Any:
    """A prompt of token ids."""
    from vllm.inputs import TokensPrompt

    return TokensPrompt(prompt_token_ids=list(ids))


def request_parameters(count: int) -> Any:
    """Exactly ``count`` tokens; which ones is our business."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)


def _torchao_int8() -> str:
    import json

    from torchao.core.config import config_to_dict
    from torchao.quantization import Int8WeightOnlyConfig

    return json.dumps(config_to_dict(Int8WeightOnlyConfig()))
