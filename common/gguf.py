"""A GGUF file of a Llama-family model, converted to a transformers checkpoint in safetensors.

Dequantized to bfloat16, with the query and key rows put back from GGUF's rotary order to transformers'. The
tokenizer is written from the file's own vocabulary and merges. Needs the ``gguf`` library, not torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from fpforensics.common.errors import MissingDependencyError, UsageError
from fpforensics.common.signals import Array

_BLOCK_NAMES: Mapping[str, str] = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL_TOKEN = 3
_SUPPORTED = ("llama", "gpt2", "smollm")
Progress = Callable[[int, int], None]
"""Called with (tensors done, tensors in all)."""


def convert(source: Path, folder: Path, progress: Progress | None = None) -> list[str]:
    """Write config, tokenizer and weights to ``folder``; returns the names of the files beside the weights.

    For ``llama`` models with the ``smollm`` byte-level tokenizer; others raise :class:`UsageError`. Every file is
    synced to disk. Raises :class:`MissingDependencyError` without the ``gguf`` library.
    """
    try:
        from gguf import GGUFReader
        from gguf.quants import dequantize
    except ImportError as error:
        raise MissingDependencyError(f"converting {source.name}", "gguf", "pip install '.[demo]'") from error
    reader = GGUFReader(source)

    def value(key: str) -> Any:
        return reader.fields[key].contents()

    found = tuple(value(key) for key in ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre"))
    if found != _SUPPORTED:
        raise UsageError(f"{source} is of kind {'/'.join(found)}", f"only {'/'.join(_SUPPORTED)} is converted")
    heads = {"attn_q": value("llama.attention.head_count"), "attn_k": value("llama.attention.head_count_kv")}
    stored = {_tensor_name(tensor.name): tensor for tensor in reader.tensors}
    shapes = {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in stored.items()}

    def weights(name: str) -> Array:
        tensor = stored[name]
        rows = dequantize(tensor.data, tensor.tensor_type).reshape(shapes[name])
        kind = tensor.name.split(".")[-2]
        return (_rotary_order(rows, heads[kind]) if kind in heads else rows).astype(ml_dtypes.bfloat16)

    texts = {
        "config.json": _dump(_config(value, tied="lm_head.weight" not in stored)),
        "tokenizer.json": _dump(_tokenizer(value)),
        "tokenizer_config.json": _dump(_tokenizer_config(value)),
    }
    for name, content in texts.items():
        _write_synced(folder / name, content)
    _write_safetensors(folder / "model.safetensors", shapes, weights, progress)
    return sorted(texts)


def _write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    weights: Callable[[str], Array],
    progress: Progress | None,
) -> None:
    """All tensors as bfloat16, one in memory at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(shapes):
        begin, end = end, end + 2 * int(np.prod(shapes[name]))
        header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for done, name in enumerate(sorted(shapes), start=1):
            file.write(np.ascontiguousarray(weights(name)).view(np.uint8).data)
            if progress is not None:
                progress(done, len(shapes))
        file.flush()
        os.fsync(file.fileno())


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _rotary_order(rows: Array, heads: int) -> Array:
    """(heads * D, columns): a head's rotary pairs side by side, GGUF's order, to halves, transformers' order."""
    size = rows.shape[0] // heads
    return rows.reshape(heads, size // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)


def _tensor_name(name: str) -> str:
    whole = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if name in whole:
        return whole[name]
    if name == "output.weight":
        return "lm_head.weight"
    _, block, kind, _ = name.split(".")
    return f"model.layers.{block}.{_BLOCK_NAMES[kind]}.weight"


def _config(value: Callable[[str], Any], tied: bool) -> dict[str, Any]:
    heads = value("llama.attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": value("tokenizer.ggml.bos_token_id"),
        "dtype": "bfloat16",
        "eos_token_id": value("tokenizer.ggml.eos_token_id"),
        "head_dim": value("llama.embedding_length") // heads,
        "hidden_act": "silu",
        "hidden_size": value("llama.embedding_length"),
        "intermediate_size": value("llama.feed_forward_length"),
        "max_position_embeddings": value("llama.context_length"),
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": value("llama.block_count"),
        "num_key_value_heads": value("llama.attention.head_count_kv"),
        "pad_token_id": value("tokenizer.ggml.padding_token_id"),
        # the shortest decimal that is the file's float32
        "rms_norm_eps": float(str(np.float32(value("llama.attention.layer_norm_rms_epsilon")))),
        "rope_parameters": {"rope_theta": value("llama.rope.freq_base"), "rope_type": "default"},
        "tie_word_embeddings": tied,
        "use_cache": True,
        "vocab_size": value("llama.vocab_size"),
    }


def _tokenizer(value: Callable[[str], Any]) -> dict[str, Any]:
    """A ``tokenizer.json``: byte-level BPE that splits digits first, which is what ``smollm`` stands for."""
    tokens, kinds = value("tokenizer.ggml.tokens"), value("tokenizer.ggml.token_type")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": token, **plain}
            for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind == _CONTROL_TOKEN
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in value("tokenizer.ggml.merges")],
        },
    }


def _tokenizer_config(value: Callable[[str], Any]) -> dict[str, Any]:
    tokens = value("tokenizer.ggml.tokens")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[value("tokenizer.ggml.bos_token_id")],
        "eos_token": tokens[value("tokenizer.ggml.eos_token_id")],
        "pad_token": tokens[value("tokenizer.ggml.padding_token_id")],
        "unk_token": tokens[value("tokenizer.ggml.unknown_token_id")],
        "model_max_length": value("llama.context_length"),
        "clean_up_tokenization_spaces": False,
        "chat_template": value("tokenizer.chat_template"),
    }


def _dump(entries: dict[str, Any]) -> bytes:
    return (json.dumps(entries, ensure_ascii=False) + "\n").encode()
