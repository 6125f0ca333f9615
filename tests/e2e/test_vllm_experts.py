"""AWQ experts that vLLM ran on an H200: not by their weights as stored, but by those with the scales where its kernel found them."""

from __future__ import annotations

from pathlib import Path

from bench_modules import bench_module
from tiny_models import make_tiny_model

from fpforensics.common.config import parse_config
from fpforensics.prover.checkpoint.make import make_checkpoint
from fpforensics.verifier.distance import Cell
from fpforensics.verifier.replay import experts_apart

bench = bench_module("vllm_experts")
BLOCK = Cell(phase="decode", signal="hidden_states", layer="1")
KEYS = Cell(phase="decode", signal="key_vectors", layer="1")


def test_the_evidence_says_which_weights_were_multiplied(tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "head_dim": 64, "num_hidden_layers": 8, "moe_intermediate_size": 128}
    make_tiny_model(tmp_path / "moe", "qwen3_moe", **sizes)
    make_checkpoint(str(tmp_path / "moe"), "awq", output=tmp_path / "awq")
    bench.misread(tmp_path / "awq", tmp_path / "misread")
    stored, misread = (bench.distances(tmp_path / name) for name in ("awq", "misread"))
    assert stored[KEYS] == misread[KEYS] < 0.1  # what comes before the experts
    assert stored[BLOCK] > 15
    assert misread[BLOCK] < 1  # the unquantized model's session lies 0.85 from its replay
    assert experts_apart(parse_config("backend=vllm,quant=awq_marlin"), tmp_path / "awq")
