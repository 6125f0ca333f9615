"""A padded checkpoint computes the source's function, in a shape that kernels and tensor parallelism take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import make_tiny_model

from fpforensics.common.errors import UsageError
from fpforensics.common.models import load_tokenizer, read_config
from fpforensics.prover.checkpoint.make import make_checkpoint
from fpforensics.prover.checkpoint.pad import Padding, parse_padding

torch = pytest.importorskip("torch")


def logits_of(folder: Path, ids: list[int]) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize(
    ("kind", "pad"),
    [
        ("llama", "hidden=96,heads=8,kv_heads=4,mlp=160"),
        ("llama", "hidden=100"),
        ("llama", "mlp=256"),
        ("qwen3", "heads=8,kv_heads=4,mlp=192"),
    ],
)
def test_function_is_the_same(tmp_path: Path, kind: Any, pad: str) -> None:
    source = make_tiny_model(tmp_path / "source", kind)
    made = make_checkpoint(str(source), "none", pad=pad, output=tmp_path / "padded")
    ids = list(range(10, 58))
    expected, found = logits_of(source, ids), logits_of(made.path, ids)
    assert torch.norm(found - expected) / torch.norm(expected) < 1e-5
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


def test_norms_and_eps_must_be_scaled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_tiny_model(tmp_path / "source", "llama")

    def unscaled(self: Padding, weights: Any) -> Any:
        return np.concatenate([weights, np.zeros(self.new.hidden - len(weights), weights.dtype)])

    monkeypatch.setattr(Padding, "_norm", unscaled)
    made = make_checkpoint(str(source), "none", pad="hidden=96", output=tmp_path / "padded")
    ids = list(range(10, 58))
    expected, found = logits_of(source, ids), logits_of(made.path, ids)
    assert torch.norm(found - expected) / torch.norm(expected) > 1e-2


def test_real_model_gets_the_shape_that_two_gpus_share(smollm2: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    made = make_checkpoint(str(smollm2), "none", pad="hidden=768,heads=12,kv_heads=4", output=tmp_path / "padded")
    config = read_config(made.path)
    shape = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")
    assert [config[name] for name in shape] == [768, 12, 4, 64, 1536]
    ids = load_tokenizer(smollm2)("The capital of France is Paris, and the capital of Germany is")["input_ids"]
    models = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
        for folder in (smollm2, made.path)
    ]
    with torch.no_grad():
        expected, found = (model(torch.tensor([ids])).logits for model in models)
        assert torch.norm(found - expected) / torch.norm(expected) < 1e-4
        texts = [model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False).tolist() for model in models]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_padded_places_stay_zero_when_rounded(tmp_path: Path, name: str) -> None:
    from fpforensics.common.int4 import unpack_awq, unpack_gptq

    source = make_tiny_model(tmp_path / "source", "llama")
    made = make_checkpoint(str(source), name, pad="hidden=128,heads=8,kv_heads=4", output=tmp_path / "padded")
    from safetensors import safe_open

    prefix = "model.layers.1.self_attn.o_proj."
    with safe_open(made.path / "model.safetensors", framework="np") as held:
        parts = {key.removeprefix(prefix): held.get_tensor(key) for key in held.keys() if key.startswith(prefix)}  # noqa: SIM118
    weights = (unpack_gptq if name == "gptq" else unpack_awq)(parts)
    assert weights.shape == (128, 128)
    assert np.count_nonzero(weights[:64, :64])
    assert not np.count_nonzero(weights[64:])
    assert not np.count_nonzero(weights[:, 64:])


def test_what_cannot_be_padded_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="share eps"):
        Padding(read_config(make_tiny_model(tmp_path / "qwen3", "qwen3")), {"hidden": 128})
    with pytest.raises(UsageError, match="'qwen3_moe' cannot be padded"):
        Padding({"model_type": "qwen3_moe"}, {"hidden": 128})
    with pytest.raises(UsageError, match="twice"):
        parse_padding("hidden=128,hidden=128")
    with pytest.raises(UsageError, match="not a whole number"):
        parse_padding("hidden=-1")
    assert parse_padding("hidden=768, heads=12") == {"hidden": 768, "heads": 12}
