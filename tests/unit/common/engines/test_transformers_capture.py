"""What is captured is what transformers itself reports: hidden states, cached keys, log-probabilities, in their own bits."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from engine_runs import references

from fpforensics.common.config import parse_config
from fpforensics.common.engines import open_engine
from fpforensics.common.engines.base import Host
from fpforensics.common.errors import ReplayError, UsageError
from fpforensics.common.signals import CapturePlan, Sampling, Trace

transformers = pytest.importorskip("transformers", reason="pip install '.[hf]'")
torch = pytest.importorskip("torch")

LAYERS = ("1", "2", "3", "4", "7", "last")


def generate(path: Path, spec: str, plan: CapturePlan, tokens: int = 5) -> Trace:
    engine = open_engine(parse_config(f"model=tiny,{spec}"), Host(device="cpu", models={"tiny": str(path)}))
    try:
        return engine.generate(references(1), Sampling(max_new_tokens=tokens), plan)[0]
    finally:
        engine.close()


@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_qwen3", "tiny_qwen3_moe"])
def test_against_transformers_in_fp32(kind: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(kind)
    plan = CapturePlan(layers=LAYERS, prefill_positions=6, top_k=9, full_logits=True)
    trace = generate(path, "dtype=fp32,attn=eager", plan)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", use_safetensors=True
    ).eval()
    (given,) = references(1)
    fed = np.concatenate([given.prompt_ids, trace.output_ids[:-1]]).astype(np.int64)
    with torch.inference_mode():
        prompt = model(torch.from_numpy(given.prompt_ids.astype(np.int64))[None], output_hidden_states=True)
        whole = model(torch.from_numpy(fed)[None], output_hidden_states=True, use_cache=True)
        normed = {
            phase: model.model.norm(torch.from_numpy(trace.phase(phase).hidden_states["last"].copy())).numpy()
            for phase in ("prefill", "decode")
        }
    for phase, reported, tolerance in (("prefill", prompt, 0.0), ("decode", whole, 2e-4)):
        captured = trace.phase(phase)  # type: ignore[arg-type]
        rows = captured.positions
        assert set(captured.hidden_states) == set(captured.key_vectors) == {"1", "2", "3", "4", "last"}
        for layer in ("1", "2", "3"):
            expected = reported.hidden_states[int(layer)][0].numpy()[rows]
            np.testing.assert_allclose(captured.hidden_states[layer], expected, atol=tolerance, rtol=0)
        # transformers reports the last block after the final norm; ours is before it
        np.testing.assert_allclose(normed[phase], reported.hidden_states[4][0].numpy()[rows], atol=max(tolerance, 1e-5))
        np.testing.assert_array_equal(captured.hidden_states["last"], captured.hidden_states["4"])
        for layer in ("1", "2", "3", "4"):
            keys = reported.past_key_values.layers[int(layer) - 1].keys[0].numpy()  # (heads, L, head_dim)
            expected = keys[:, rows].transpose(1, 0, 2).reshape(len(rows), -1)
            np.testing.assert_allclose(captured.key_vectors[layer], expected, atol=tolerance, rtol=0)
        logits = reported.logits[0].float()[torch.from_numpy(rows.astype(np.int64))]
        logprobs = torch.log_softmax(logits, -1).numpy()
        assert captured.logits is not None
        np.testing.assert_allclose(captured.logits, logits.numpy(), atol=2e-4)
        np.testing.assert_allclose(captured.logprobs, -np.sort(-logprobs, axis=1)[:, :9], atol=2e-4)
        followers = np.concatenate([given.prompt_ids, trace.output_ids])[rows + 1]
        np.testing.assert_allclose(captured.chosen_logprobs, logprobs[np.arange(len(rows)), followers], atol=2e-4)


def test_tokens_are_those_of_transformers_own_greedy_search(tiny_llama: Path) -> None:
    trace = generate(tiny_llama, "dtype=fp32,attn=eager", CapturePlan(), tokens=12)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_llama, dtype=torch.float32, attn_implementation="eager", use_safetensors=True
    ).eval()
    prompt = torch.from_numpy(references(1)[0].prompt_ids.astype(np.int64))[None]
    # all ones: the padding token may occur in a random prompt and would be masked
    asked = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "eos_token_id": None}
    theirs = model.generate(prompt, max_new_tokens=12, **asked)
    assert theirs[0, prompt.shape[1] :].tolist() == trace.output_ids.tolist()


@pytest.mark.parametrize(
    ("dtype", "held"),
    [
        ("bf16", np.dtype(ml_dtypes.bfloat16)),
        ("fp16", np.dtype(np.float16)),
        ("fp32", np.dtype(np.float32)),
        ("fp64", np.dtype(np.float64)),
    ],
)
def test_native_dtype_is_kept(tiny_llama: Path, dtype: str, held: np.dtype[np.generic]) -> None:
    trace = generate(tiny_llama, f"dtype={dtype}", CapturePlan(full_logits=True))
    for rows in (trace.decode.hidden_states["1"], trace.decode.key_vectors["last"], trace.decode.logits):
        assert rows is not None and rows.dtype == held
    assert trace.decode.logprobs.dtype == trace.decode.chosen_logprobs.dtype == np.float32


def test_bfloat16_bits_survive(tiny_llama: Path) -> None:
    """bf16 is not widened and narrowed on the way: each captured value is one that bf16 can hold, and they differ."""
    rows = generate(tiny_llama, "dtype=bf16", CapturePlan()).decode.hidden_states["1"]
    assert np.array_equal(rows.astype(np.float32).astype(ml_dtypes.bfloat16).view(np.uint16), rows.view(np.uint16))
    assert len(np.unique(rows.view(np.uint16))) > 50


@pytest.mark.parametrize("layer", ["0", "-1", "first", "1.5", "", "٣"])
def test_layers_that_mean_nothing_are_refused(tiny_llama: Path, layer: str) -> None:
    with pytest.raises(UsageError, match="neither a block number"):
        generate(tiny_llama, "dtype=bf16", CapturePlan(layers=(layer,)))


def test_overflow_names_the_first_layer_and_position(tiny_llama: Path, tmp_path: Path) -> None:
    """Weights that overflow in fp16, and in fp16 only, in the third block."""
    from safetensors.torch import load_file, save_file

    for file in tiny_llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.layers.2.mlp.down_proj.weight"
    weights[name] = weights[name] * 1e6
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ReplayError) as failed:
        generate(tmp_path, "dtype=fp16", CapturePlan(layers=("1", "2", "3", "4")))
    assert "hidden_states/3 is not finite at position" in failed.value.message
    assert generate(tmp_path, "dtype=bf16", CapturePlan(layers=("3",))).decode.hidden_states


def test_a_checkpoint_with_a_missing_weight_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in tiny_llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ReplayError, match=r"missing keys: model\.layers\.1\.mlp\.up_proj"):
        generate(tmp_path, "dtype=bf16", CapturePlan())


def test_a_sliding_window_that_dropped_a_key_is_named(tmp_path: Path) -> None:
    from tiny_models import make_tiny_model

    path = make_tiny_model(
        tmp_path / "sliding", "qwen3", use_sliding_window=True, sliding_window=8, max_window_layers=0
    )
    trace = generate(path, "dtype=fp32", CapturePlan(prefill_positions=4), tokens=12)
    assert trace.decode.key_vectors["1"].shape == (11, 32)
    with pytest.raises(ReplayError, match="sliding window"):
        generate(path, "dtype=fp32", CapturePlan(prefill_positions=20))
