"""Made checkpoints load in transformers on a CPU and compute nearly what the source does."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from fpforensics.prover.checkpoint.make import make_checkpoint

torch = pytest.importorskip("torch")
IDS = list(range(10, 58))
NEEDS = {
    "w4a16": ("compressed_tensors", "pip install compressed-tensors==0.17.0"),
    "w8a8-int8": ("compressed_tensors", "pip install compressed-tensors==0.17.0"),
    "fp8-dynamic": ("compressed_tensors", "pip install compressed-tensors==0.17.0"),
    "torchao-int8": ("torchao", "pip install '.[torchao]'"),
    "bnb-nf4": ("bitsandbytes", "pip install '.[hf]'"),
}
# Of the source's logits' norm, at most: rounding a tiny model's weights to 4 or 8 bits moves them this far, a wrong
# layout to about 1.4.
FAR = {"w4a16": 0.9, "bnb-nf4": 0.9, "w8a8-int8": 0.1, "fp8-dynamic": 0.7, "torchao-int8": 0.1}


def logits_of(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu", use_safetensors=True)
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].float()


@pytest.mark.parametrize("name", sorted(NEEDS))
def test_transformers_loads_it(tiny_llama: Path, tmp_path: Path, name: str) -> None:
    package, install = NEEDS[name]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: {install}")
    made = make_checkpoint(str(tiny_llama), name, output=tmp_path / "made")
    expected, found = logits_of(tiny_llama), logits_of(made.path)
    distance = float(torch.norm(found - expected) / torch.norm(expected))
    assert 1e-4 < distance < FAR[name]
    again = make_checkpoint(str(tiny_llama), name, output=tmp_path / "again")
    assert again.weights_digest == made.weights_digest
