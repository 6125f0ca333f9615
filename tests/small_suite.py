"""A small suite on a tiny model of a real architecture, for runs with real workers."""

from __future__ import annotations

from pathlib import Path

from tiny_models import make_tiny_model

SUITE = """
name = "small"
repetitions = 2
[baseline]
config = "model=tiny,attn=sdpa,dtype=bf16"
[references]
count = 1
prompt_tokens = 24
new_tokens = 5
documents = ["{document}"]
[capture]
layers = ["1", "2", "last"]
top_k = 5
[replay]
device = "cpu"
[[prover]]
name = "here"
device = "cpu"
[[experiment]]
name = "attention"
variable = "attn"
values = ["attn=eager"]
[[experiment]]
name = "expert_parallel"
variable = "ep"
values = ["ep=2"]
"""


CONCURRENT = """
[[experiment]]
name = "concurrent_streams"
variable = "concurrent"
values = ["concurrent=true"]
"""


def write_suite(folder: Path, more: str = "") -> tuple[Path, Path]:
    """A suite's file, ending with ``more``, and the tiny model that it is about."""
    make_tiny_model(folder / "model", "llama")
    document = folder / "text.txt"
    document.write_text(" ".join(f"Sentence number {number} has its own words." for number in range(30)))
    (folder / "small.toml").write_text(SUITE.format(document=document) + more)
    return folder / "small.toml", folder / "model"
