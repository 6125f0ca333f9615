"""Tiny seeded checkpoints of real architectures: a real tokenizer, a chat template, weights that keep numerics alive.

The tokenizer is byte-level BPE over 256 bytes, 252 letter pairs and 4 special tokens: it round-trips any text, and
its merges make the ids of a text depend on where the text is cut.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

Kind = Literal["llama", "qwen3", "qwen3_moe"]
VOCAB_SIZE = 512
SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_LETTERS = "etaoinshrdlcumwf"  # 16 * 16 pairs, of which the vocabulary holds all but the last four


def make_tiny_model(folder: Path, kind: Kind, seed: int = 0, **overrides: Any) -> Path:
    """Write a bf16 safetensors checkpoint of ``kind`` with its tokenizer to ``folder``; returns ``folder``.

    4 blocks, hidden size 64, 4 heads, 2 KV heads of 16; ``overrides`` go to the transformers config. The same
    arguments write the same weights.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = _config(kind, overrides)
    # Built with weights of any value: each is drawn below from a generator of our own.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weights in sorted(model.named_parameters()):
            drawn = torch.randn(weights.shape, generator=generator)
            if weights.dim() == 1:
                weights.copy_(1 + 0.1 * drawn if "norm" in name else 0.1 * drawn)
            else:
                # Unit-sized activations, and logits spread enough that greedy tokens are not ties.
                gain = 1.0 if "embed" in name else 2.0 / math.sqrt(weights.shape[-1])
                weights.copy_(gain * drawn)
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path, *, chat_template: str | None = CHAT_TEMPLATE) -> None:
    """Write the tokenizer's files to ``folder``; ``chat_template=None`` makes it a base model's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(a, b) for a in _LETTERS for b in _LETTERS][: VOCAB_SIZE - len(SPECIAL_TOKENS) - len(alphabet)]
    vocabulary = [*SPECIAL_TOKENS, *alphabet, *(a + b for a, b in merges)]
    assert len(set(vocabulary)) == VOCAB_SIZE
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
        "pad_token": "<|eos|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }
    if chat_template is not None:
        settings["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _config(kind: Kind, overrides: dict[str, Any]) -> Any:
    from transformers import LlamaConfig, Qwen3Config, Qwen3MoeConfig

    settings: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    if kind == "qwen3_moe":
        settings |= {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "norm_topk_prob": True,
        }
    classes = {"llama": LlamaConfig, "qwen3": Qwen3Config, "qwen3_moe": Qwen3MoeConfig}
    return classes[kind](**(settings | overrides))
