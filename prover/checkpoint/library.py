"""Formats that only a library writes, torchao's and bitsandbytes': loaded by transformers under that format, and saved."""

from __future__ import annotations

from pathlib import Path


def quantize_folder(source: Path, folder: Path, format_name: str) -> None:
    """Quantize the checkpoint in ``source`` on the CPU and write weights and config to ``folder``."""
    import torch

    from fpforensics.common.config import ExecutionConfig, parse_config
    from fpforensics.common.engines.transformers_load import load_model, prepare_imports

    prepare_imports()
    config = parse_config(f"quant={format_name},matmul=native", ExecutionConfig(model=str(source)))
    model = load_model(config, source, torch.device("cpu"))
    model.save_pretrained(folder, safe_serialization=True)
    (folder / "generation_config.json").unlink(missing_ok=True)
