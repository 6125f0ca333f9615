"""The scope of a measurement: which config and weights made the evidence, on which hardware, and how it was replayed.

A calibration holds where the whole scope is the same. What may change low-order bits without being another machine
(library versions, threads, switches) is kept beside it as details: a difference there is said, not refused.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from fpforensics.common.config import Backend, ExecutionConfig, Matmul, config_id
from fpforensics.common.engines.base import EngineFacts, ReplayMode
from fpforensics.common.environment import Environment
from fpforensics.common.errors import shorten
from fpforensics.verifier.exact import gpu_family

DETAILS = (
    "threads",
    "mkl",
    "onednn",
    "float32_matmul_precision",
    "deterministic_algorithms",
    "cuda",
    "cudnn",
    "cuda_matmul_tf32",
    "cudnn_tf32",
    "bf16_reduced_precision_reduction",
    "fp16_reduced_precision_reduction",
    "CUBLAS_WORKSPACE_CONFIG",
    "MKL_CBWR",
)
"""The engine's numerics that belong to a machine and not to a config."""
LIBRARIES = ("torch", "transformers", "vllm")
X86 = "x86 CPU"
_CAPS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
_SHOWN = 100


class Platform(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where something ran. ``hardware`` is the GPU's name, or the CPU's with the instruction sets that its kernels use;
    ``family`` what rounds much alike. A prover's is the prover's word."""

    hardware: str
    family: str
    details: dict[str, str]


class Scope(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``config`` with the digest of its weights; ``matmul`` and ``backend`` are the replay's path of products and engine."""

    config: ExecutionConfig
    prover: Platform
    verifier: Platform
    mode: ReplayMode
    matmul: Matmul
    backend: Backend = "transformers"

    @property
    def label(self) -> str:
        """The config's name, without the model's."""
        return config_id(self.config, ExecutionConfig(model=self.config.model))


def platform_of(environment: Environment, facts: EngineFacts) -> Platform:
    """Where a config ran, from what its engine saw."""
    versions = {name: facts.versions[name] for name in LIBRARIES if name in facts.versions}
    details = versions | {name: facts.numerics[name] for name in DETAILS if name in facts.numerics}
    if facts.gpu:
        return Platform(hardware=facts.gpu, family=gpu_family(facts.gpu), details=details)
    cap = next((facts.numerics[name] for name in _CAPS if name in facts.numerics), "")
    narrow = " ".join(flag for flag in environment.cpu_flags if flag.endswith(("bf16", "fp16")))
    parts = (environment.cpu, facts.numerics.get("cpu_capability", ""), narrow, f"oneDNN up to {cap}" if cap else "")
    is_x86 = bool(environment.cpu_flags) or "x86_64" in environment.platform or "AMD64" in environment.platform
    return Platform(hardware=", ".join(filter(None, parts)), family=X86 if is_x86 else "CPU", details=details)


def same_weights(a: ExecutionConfig, b: ExecutionConfig) -> bool:
    """Whether two configs are about the same tensors on disk, whatever each side calls the model."""
    return bool(a.weights_digest) and a.weights_digest == b.weights_digest


def differences(measured: Scope, found: Scope) -> Iterator[str]:
    """What keeps a measurement in ``measured`` from speaking for ``found``, each in words; nothing if it does."""
    if not same_weights(measured.config, found.config):
        ours, theirs = (f"{each.config.model} ({_digest(each)})" for each in (measured, found))
        yield _differ("model", ours, theirs)
    pairs = (
        ("config", measured.label, found.label),
        ("prover hardware", measured.prover.hardware, found.prover.hardware),
        ("verifier hardware", measured.verifier.hardware, found.verifier.hardware),
        ("replay mode", measured.mode, found.mode),
        ("replay's products", measured.matmul, found.matmul),
        ("replay's engine", measured.backend, found.backend),
    )
    yield from (_differ(name, ours, theirs) for name, ours, theirs in pairs if ours != theirs)


def detail_differences(measured: Scope, found: Scope) -> Iterator[str]:
    """Details of either platform that are not what they were when it was measured."""
    for side, ours, theirs in (
        ("prover", measured.prover.details, found.prover.details),
        ("verifier", measured.verifier.details, found.verifier.details),
    ):
        for name in sorted(ours.keys() | theirs.keys()):
            one, other = ours.get(name, "absent"), theirs.get(name, "absent")
            if one != other:
                yield _differ(f"{side}'s {name}", one, other)


def _differ(name: str, measured: str, found: str) -> str:
    return f"{name} {shorten(found, _SHOWN)} where {shorten(measured, _SHOWN)} was measured"


def _digest(scope: Scope) -> str:
    return scope.config.weights_digest.removeprefix("sha256:")[:12] or "no digest"
