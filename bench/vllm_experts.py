"""A bundle of AWQ experts under vLLM, against their weights as stored and as vLLM 0.26 was seen to read them.

    PYTHONPATH=tests python bench/vllm_experts.py

The bundle is of one H200 (``examples/results/two-h200-ranks``), the model a tiny Qwen3-MoE of random weights that this script makes, with
its AWQ form. vLLM's Marlin permutes the scales of gate and up projections by the wrong length (of their output, where their input was meant:
vllm-project/vllm#50196). It shows where the experts' width on a rank is no more than a group. Prints the mean L2 over positions, then over references.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from fpforensics.common.config import parse_config
from fpforensics.common.engines import in_process
from fpforensics.common.engines.base import Host
from fpforensics.common.keys import Keyring
from fpforensics.prover.checkpoint.make import make_checkpoint
from fpforensics.verifier.distance import Cell, trace_distances
from fpforensics.verifier.intake import open_bundle

EVIDENCE = Path(__file__).parents[1] / "examples" / "results" / "two-h200-ranks"
GROUPED = [row + 8 * column for row in range(8) for column in range(8)]
WHOLE = [2 * row + column for row in range(4) for column in (0, 1, 8, 9, 16, 17, 24, 25)]
"""Marlin's orders of scales: of several groups, in 64 columns, and of a single one, in 32."""


def main() -> None:
    from tiny_models import make_tiny_model

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_tiny_model(
            folder / "moe",
            "qwen3_moe",
            hidden_size=256,
            head_dim=64,
            num_hidden_layers=8,
            moe_intermediate_size=128,
        )
        make_checkpoint(str(folder / "moe"), "awq", output=folder / "awq")
        misread(folder / "awq", folder / "misread")
        for what in ("awq", "misread"):
            found = distances(folder / what)
            print(
                f"{what:8s}",
                "; ".join(f"{cell} {value:.3g}" for cell, value in found.items() if cell.layer in ("", "1", "last")),
            )


def misread(stored: Path, folder: Path) -> None:
    """The AWQ checkpoint ``stored`` with the scales of its experts' gate and up projections where that kernel finds them."""
    shutil.copytree(stored, folder)
    weights = load_file(stored / "model.safetensors")
    for name, scales in weights.items():
        if ".experts." in name and name.endswith((".gate_proj.scales", ".up_proj.scales")):
            written = scales.reshape(-1, 32)[:, WHOLE].reshape(-1, 64)
            read = torch.empty_like(written)
            read[:, GROUPED] = written
            weights[name] = read.reshape(scales.shape).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def distances(checkpoint: Path) -> dict[Cell, float]:
    """How far the recorded evidence lies from a prefill replay of ``checkpoint`` by transformers on this CPU."""
    config = parse_config("model=moe,dtype=bf16,quant=awq,matmul=fp32-rounded")
    keyring = Keyring.from_paths([EVIDENCE / "prover.key.pub"])
    with open_bundle(EVIDENCE / "awq_marlin.msgpack", keyring) as bundle:
        (row,) = bundle.evidence.rows
        names = [reference.id for reference in bundle.references()]
        with in_process(config, Host(device="cpu", models={"moe": str(checkpoint)}), lambda: False) as engine:
            forcings = [bundle.forcing(row, name) for name in names]
            replays = engine.teacher_force(forcings, bundle.evidence.capture, "prefill")
        found = [trace_distances(bundle.trace(row, name), replay) for name, replay in zip(names, replays, strict=True)]
    return {cell: float(np.mean([each[cell] for each in found])) for cell in found[0]}


if __name__ == "__main__":
    main()
