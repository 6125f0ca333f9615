"""The same function in a larger shape: zeros where heads, hidden units or MLP units are added.

GPU kernels and tensor parallelism want widths that divide: SmolLM2-135M with 9 heads, 3 KV heads and 576 hidden units
has none that two GPUs share. A unit whose weights are zero, in and out, changes nothing, save that RMSNorm divides by
the root of a mean over all units: with H of H' units in use,

    x / sqrt(sum x² / H + eps) = x sqrt(H / H') / sqrt(sum x² / H' + eps H / H')

so norms are scaled by sqrt(H / H') and eps by H / H'. The scaled norms are stored as float32: in float32 the function is
then the same up to rounding; a loader that computes in bfloat16 rounds them like any other weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fpforensics.common.errors import UsageError, did_you_mean, shorten
from fpforensics.common.signals import Array

_KEYS: Mapping[str, str] = {
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "mlp": "intermediate_size",
}
_DENSE = ("llama", "mistral", "qwen2", "qwen3")
_MAX = 1 << 20


@dataclass(frozen=True)
class Shape:
    """The widths of a dense model: D is the width of a head."""

    hidden: int
    heads: int
    kv_heads: int
    mlp: int
    head: int


def parse_padding(spec: str) -> dict[str, int]:
    """``hidden=640,heads=12,kv_heads=4,mlp=2048``, any of them. Raises :class:`UsageError`."""
    wanted: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in spec.split(","))):
        key, _, value = (piece.strip() for piece in part.partition("="))
        if key not in _KEYS:
            raise UsageError(f"unknown part {shorten(key)!r} of --pad", did_you_mean(key, _KEYS))
        if key in wanted:
            raise UsageError(f"--pad gives {key} twice", "give it once")
        if not value.isascii() or not value.isdigit() or not 1 <= int(value[:9]) <= _MAX:
            raise UsageError(f"--pad {key}={shorten(value)!r} is not a whole number from 1 to {_MAX}", f"e.g. {key}=64")
        wanted[key] = int(value)
    return wanted


class Padding:
    """From one checkpoint's config and tensors to those of the larger shape."""

    def __init__(self, config: Mapping[str, Any], wanted: Mapping[str, int]) -> None:
        """Raises :class:`UsageError` where a model of ``config`` cannot become what is ``wanted``."""
        kind = str(config.get("model_type", ""))
        if kind not in _DENSE:
            raise UsageError(f"a model of type {shorten(kind)!r} cannot be padded", f"--pad knows {', '.join(_DENSE)}")
        self._config = dict(config)
        heads = int(config["num_attention_heads"])
        now = Shape(
            hidden=int(config["hidden_size"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            mlp=int(config["intermediate_size"]),
            head=int(config.get("head_dim") or config["hidden_size"] // heads),
        )
        new = Shape(head=now.head, **{key: wanted.get(key, getattr(now, key)) for key in _KEYS})
        for key in _KEYS:
            if getattr(new, key) < getattr(now, key):
                raise UsageError(
                    f"--pad {key}={getattr(new, key)} is less than the model's {getattr(now, key)}", "raise it"
                )
        if new.heads * now.kv_heads != now.heads * new.kv_heads:
            raise UsageError(
                f"--pad heads={new.heads},kv_heads={new.kv_heads} would change how many heads share a KV head",
                f"the model has {now.heads} heads to {now.kv_heads} KV heads: keep that ratio",
            )
        if kind == "llama" and new.hidden % new.heads:
            raise UsageError(
                f"--pad makes hidden={new.hidden} no multiple of heads={new.heads}, which loaders of llama refuse",
                f"e.g. hidden={-(-new.hidden // new.heads) * new.heads}",
            )
        if new.hidden > now.hidden and kind == "qwen3":
            raise UsageError(
                "--pad hidden= cannot keep the function of qwen3, whose head norms share eps", "leave hidden out"
            )
        self.now, self.new = now, new

    def config(self) -> dict[str, Any]:
        """``config.json`` of the padded model."""
        sizes = {name: getattr(self.new, key) for key, name in _KEYS.items()}
        config = {**self._config, **sizes, "head_dim": self.new.head}
        if self.new.hidden != self.now.hidden:
            config["rms_norm_eps"] = self._config["rms_norm_eps"] * self.now.hidden / self.new.hidden
        return config

    def tensor(self, name: str, weights: Array) -> Array:
        """The padded tensor of that ``name``."""
        kind = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
        if kind in ("q_norm", "k_norm"):
            return weights
        if kind == "norm" or kind.endswith("layernorm"):
            return self._norm(weights)
        sizes = self._sizes(kind)
        if sizes is None:
            raise UsageError(f"tensor {shorten(name)!r} has no place in a padded model", "make it without --pad")
        outputs, inputs = sizes
        shape = (outputs,) if weights.ndim == 1 else (outputs or weights.shape[0], inputs)
        padded = np.zeros(shape, weights.dtype)
        padded[tuple(slice(size) for size in weights.shape)] = weights
        return padded

    def _norm(self, weights: Array) -> Array:
        if self.new.hidden == self.now.hidden:
            return weights
        padded = np.zeros(self.new.hidden, np.float32)
        padded[: self.now.hidden] = weights.astype(np.float64) * math.sqrt(self.now.hidden / self.new.hidden)
        return padded

    def _sizes(self, kind: str) -> tuple[int, int] | None:
        """(outputs, inputs) of a module; outputs are 0 where they stay."""
        new = self.new
        match kind:
            case "embed_tokens" | "lm_head":
                return 0, new.hidden
            case "q_proj":
                return new.heads * new.head, new.hidden
            case "k_proj" | "v_proj":
                return new.kv_heads * new.head, new.hidden
            case "o_proj":
                return new.hidden, new.heads * new.head
            case "gate_proj" | "up_proj":
                return new.mlp, new.hidden
            case "down_proj":
                return new.hidden, new.mlp
        return None
