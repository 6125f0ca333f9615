"""What can be refused before anything is hashed, loaded or started: needs neither torch nor a model."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from fpforensics.common.config import ExecutionConfig
from fpforensics.common.engines import find_engine, transformers_load, vllm_rules
from fpforensics.common.engines.base import Host
from fpforensics.common.errors import ReplayError, UsageError, shorten


def require_host(host: Host) -> None:
    """Raise :class:`UsageError` for an interpreter that is not there, :class:`ReplayError` for a GPU that is not."""
    if not has_interpreter(host):
        raise UsageError(
            f"--python {shorten(host.python)}: no such interpreter", "give one that has fpforensics installed"
        )
    if why := lacks_device(host):
        raise ReplayError(why, "use --device auto or cpu")


def has_interpreter(host: Host) -> bool:
    """Whether the interpreter that the host names, if any, is there."""
    return not host.python or shutil.which(host.python, path=host.env.get("PATH")) is not None


def lacks_device(host: Host) -> str:
    """Why the host's device is certainly not there; empty where only torch can tell."""
    why = _no_cuda(host) if host.device == "cuda" else ""
    return f"device cuda is not available here: {why}" if why else ""


def require_runnable(configs: Iterable[ExecutionConfig], host: Host) -> None:
    """Raise what the engines would raise for configs that no machine, or not this one, can run.

    Packages are looked for in this interpreter only: what another one holds (``host.python``) is its worker's to say.
    """
    for config in configs:
        require_possible(config)
        rules = vllm_rules if config.backend == "vllm" else transformers_load
        if not host.python:
            rules.check_packages(config)
        if config.backend == "vllm":
            vllm_rules.check_host(config, host)
        if config.attention == "flash_attention_2" and (host.device == "cpu" or _no_cuda(host)):
            raise ReplayError("attn=flash_attention_2 needs a CUDA device", "use attn=sdpa_flash")


def require_possible(config: ExecutionConfig) -> None:
    """Raise :class:`UsageError` for a config that the engines run on no machine."""
    find_engine(config)
    rules = vllm_rules if config.backend == "vllm" else transformers_load
    rules.check_combination(config)


def check_checkpoint(config: ExecutionConfig, path: Path) -> None:
    """Raise :class:`UsageError` where the checkpoint in ``path`` is not what ``config`` says; loads no weights."""
    rules = vllm_rules if config.backend == "vllm" else transformers_load
    rules.check_checkpoint(config, path)


def _no_cuda(host: Host) -> str:
    """Why a worker on ``host`` will certainly see no GPU; empty where only torch can tell."""
    visible = {**os.environ, **host.env}.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides every GPU"
    if host.python:
        return ""
    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return ""
    build = torch.partition("+")[2]
    if build == "cpu" or sys.platform == "darwin":
        return f"torch {torch} computes on CPUs only"
    if (not build or build.startswith("cu")) and "LD_LIBRARY_PATH" not in host.env and not has_driver():
        return "no NVIDIA driver is installed"
    return ""


def has_driver() -> bool:
    """Whether this machine has NVIDIA's driver."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True
