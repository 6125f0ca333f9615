"""One line that says where a table comes from."""

from __future__ import annotations

from typing import Any

from fpforensics.common.config import ExecutionConfig, config_id
from fpforensics.common.environment import describe_environment


def describe(config: ExecutionConfig, device: Any) -> str:
    """Machine, threads, libraries and config."""
    import torch
    import transformers

    environment = describe_environment()
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else environment.cpu
    return (
        f"{chip}, {environment.cpu_count} CPUs, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, {config.model}, {config_id(config, ExecutionConfig(model=config.model))}"
    )
