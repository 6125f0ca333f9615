"""Which kernels run: the one attention backend that a config asks for, and the names of the operators that
really ran.

Operators are read off the measured forward itself with the profiler's CPU events, which sit beside the
dispatcher and change nothing in it: the first forward of each phase of an engine's life. (Under
``torch.compile`` and flex attention, where the first forward compiles, see ``TransformersEngine``.)
"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fpforensics.common.config import Attention, ExecutionConfig
from fpforensics.common.errors import Error, ReplayError
from fpforensics.common.signals import Phase

_BACKENDS: dict[Attention, SDPBackend] = {
    "sdpa_math": SDPBackend.MATH,
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
}
_ATTENTION = (
    "_scaled_dot_product_",
    "_flash_attention",
    "_efficient_attention",
    "_cudnn_attention",
    "flex_attention",
)
_NO_KERNEL = ("No viable backend", "No available kernel", "No execution plans support")
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
_COMPILER = ("compiler", "Inductor", "dynamo", "gcc", "g++", "clang")


class KernelWatch:
    """Remembers which operators ran in the first watched forward of each phase."""

    def __init__(self) -> None:
        self.operators: dict[Phase, Counter[str]] = {}

    @contextlib.contextmanager
    def watching(self, phase: Phase) -> Iterator[None]:
        """Record the operators inside, if this phase has not been recorded yet."""
        if phase in self.operators:
            yield
            return
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            yield
        self.operators[phase] = Counter(event.name for event in profile.events() or ())

    def attention(self, config: ExecutionConfig) -> dict[str, list[str]]:
        """Phase -> names of the attention operators seen."""
        return {phase: _attention_names(config, names) for phase, names in self.operators.items()}

    def products(self) -> list[str]:
        """Names of the matrix product operators seen in any phase."""
        return sorted(name for name in self._seen() if _is_product(name))

    def quantized_products(self) -> str:
        """Names of the quantization libraries' own operators seen in any phase."""
        return ", ".join(sorted(name for name in self._seen() if _is_quantized(name)))

    def _seen(self) -> set[str]:
        return {name for names in self.operators.values() for name in names}


@contextlib.contextmanager
def attention_backend(config: ExecutionConfig, device: torch.device) -> Iterator[None]:
    """Inside, scaled_dot_product_attention may use the one backend of ``config.attention`` and no other.

    Raises :class:`ReplayError` for whatever goes wrong inside, with the reason in one line.
    """
    backend = _BACKENDS.get(config.attention)
    with warnings.catch_warnings(record=True) as said, explained(config, device, said):
        warnings.simplefilter("default")
        with sdpa_kernel([backend]) if backend is not None else contextlib.nullcontext():
            yield


@contextlib.contextmanager
def explained(
    config: ExecutionConfig, device: torch.device, said: list[warnings.WarningMessage] | None = None
) -> Iterator[None]:
    """Turn what torch raises into a :class:`ReplayError` that names the config's part and the reason."""
    try:
        yield
    except Error:
        raise
    except (
        RuntimeError,
        MemoryError,
        ImportError,
        ValueError,
        TypeError,
        AssertionError,
    ) as error:
        raise _explain(config, device, error, said or []) from error


def _attention_names(config: ExecutionConfig, names: Counter[str]) -> list[str]:
    if config.attention == "eager":
        return ["eager matmul+softmax"]
    found = sorted(name for name in names if any(part in name for part in _ATTENTION))
    if config.attention == "flex":
        return found or ["flex_attention, compiled by inductor"]
    if config.attention == "flash_attention_2":
        return found or ["flash_attn"]
    return found or ["scaled_dot_product_attention, kernel not seen"]


def _is_product(name: str) -> bool:
    return name in ("aten::mm", "aten::addmm", "aten::bmm", "aten::_int_mm", "aten::_grouped_mm") or (
        "linear_pointwise" in name or "weight_int" in name or "4bit" in name or "int8_linear" in name
    )


def _is_quantized(name: str) -> bool:
    return name.startswith(("bitsandbytes::", "torchao::", "gptq")) or "weight_int" in name


def _explain(
    config: ExecutionConfig, device: torch.device, error: Exception, said: list[warnings.WarningMessage]
) -> ReplayError:
    text = " ".join(str(error).split())
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(part in text for part in _NO_MEMORY):
        return ReplayError(
            f"out of memory on {device}: model {config.model}, dtype={config.dtype}, batch={config.batch_size}",
            "use a smaller model, batch or prompt, or another device",
        )
    if any(part in text for part in _NO_KERNEL):
        heard = [" ".join(str(warning.message).split()).partition(" (Triggered")[0] for warning in said]
        reasons = [line for line in heard if any(word in line for word in ("ttention", "cuDNN", "kernel", "SDPA"))]
        why = (
            "; ".join(dict.fromkeys(reasons))
            or f"torch {torch.__version__} has no such kernel for this device and dtype"
        )
        return ReplayError(
            f"attn={config.attention} does not run on {device.type} in {config.dtype}: {why[:400]}",
            "use attn=sdpa, or eager",
        )
    module = type(error).__module__
    if module.startswith(("torch._dynamo", "torch._inductor")) or (
        (config.compile or config.attention == "flex") and any(word in text for word in _COMPILER)
    ):
        what = "compile=true" if config.compile else f"attn={config.attention}"
        text = next((line for line in str(error).splitlines() if ": error:" in line), text)
        return ReplayError(
            f"{what} could not be compiled: {text[:300]}", "it needs a working C++ compiler (gcc) on a CPU"
        )
    return ReplayError(
        f"the engine failed: {type(error).__name__}: {text[:300]}",
        f"config: dtype={config.dtype}, attn={config.attention}, quant={config.quantization}",
    )
