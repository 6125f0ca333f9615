"""Execution configs and claims: everything that decides the arithmetic, and assertions about it.

Both are written ``key=value,key=value`` on the command line and in TOML, with the same keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import msgspec

from fpforensics.common.errors import UsageError, did_you_mean, shorten

Backend = Literal["transformers", "vllm"]
ComputeDType = Literal["bf16", "fp16", "fp32", "fp64"]
Matmul = Literal["native", "fp32-rounded"]
Attention = Literal[
    "eager",
    "sdpa",
    "sdpa_math",
    "sdpa_flash",
    "sdpa_efficient",
    "sdpa_cudnn",
    "flex",
    "flash_attention_2",
    "auto",
    "vllm_flash_attn_2",
    "vllm_flash_attn_3",
    "vllm_triton",
    "vllm_flex",
    "vllm_cpu",
]
Quantization = Literal[
    "none",
    "bnb-int8",
    "bnb-nf4",
    "bnb-fp4",
    "torchao-int8",
    "torchao-int4",
    "awq",
    "gptq",
    "awq_marlin",
    "gptq_marlin",
    "compressed-int4",
    "compressed-int8",
    "compressed-fp8",
    "fp8",
]
KVCache = Literal["auto", "fp8"]

MAX_SPEC_LENGTH = 4096
DEFAULT_MODEL = "smollm2-135m"


class ExecutionConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything that decides the arithmetic of a run.

    ``weights_digest`` is ``sha256:<hex>`` over the tensors as stored on disk, and empty until an engine has loaded them.
    ``matmul="fp32-rounded"`` computes each weight product in float32 and rounds it to ``dtype``.
    ``concurrent_work`` keeps other products running on the same device, or on half of the CPU's cores, while tokens are made.
    ``emulate_tensor_parallel=N`` runs on one device, but adds up row-parallel products from N partial ones, each rounded
    to ``dtype``, as N ranks would; ``tensor_parallel`` counts real devices.

    Backend vllm: ``attention`` says which kernels (``auto``: what vLLM takes), ``batch_size`` 0 (``batch=auto``) runs all
    references of a session together as they come (continuous batching), and ``max_batched_tokens`` is the most tokens of
    one forward, longer prompts being cut into chunks (0, ``auto``: prompts are whole).
    """

    model: str = DEFAULT_MODEL
    revision: str = ""
    weights_digest: str = ""
    backend: Backend = "transformers"
    dtype: ComputeDType = "bf16"
    quantization: Quantization = "none"
    attention: Attention = "sdpa"
    tensor_parallel: int = 1
    expert_parallel: int = 1
    batch_size: int = 1
    compile: bool = False
    concurrent_work: bool = False
    matmul: Matmul = "native"
    emulate_tensor_parallel: int = 1
    kv_cache: KVCache = "auto"
    pipeline_parallel: int = 1
    max_batched_tokens: int = 0
    cuda_graphs: bool = False
    batch_invariant: bool = False


_ADDED: Mapping[str, Any] = {
    "kv_cache": "auto",
    "pipeline_parallel": 1,
    "max_batched_tokens": 0,
    "cuda_graphs": False,
    "batch_invariant": False,
}
"""Fields that came after the first bundles, with their defaults: a config without them is written as it was then."""


def as_written(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config's fields by name as manifests hold them: later ones only where they say something."""
    return {name: value for name, value in config.items() if name not in _ADDED or value != _ADDED[name]}


# Short keys as users write them, and the fields that they mean.
KEYS: Mapping[str, str] = {
    "model": "model",
    "revision": "revision",
    "weights": "weights_digest",
    "backend": "backend",
    "dtype": "dtype",
    "quant": "quantization",
    "attn": "attention",
    "tp": "tensor_parallel",
    "ep": "expert_parallel",
    "batch": "batch_size",
    "compile": "compile",
    "concurrent": "concurrent_work",
    "matmul": "matmul",
    "emulate_tp": "emulate_tensor_parallel",
    "kv": "kv_cache",
    "pp": "pipeline_parallel",
    "chunk": "max_batched_tokens",
    "graphs": "cuda_graphs",
    "invariant": "batch_invariant",
}
_SHORT: Mapping[str, str] = {field: key for key, field in KEYS.items()}
_CHOICES: Mapping[str, tuple[str, ...]] = {
    "backend": get_args(Backend),
    "dtype": get_args(ComputeDType),
    "quantization": get_args(Quantization),
    "attention": get_args(Attention),
    "matmul": get_args(Matmul),
    "kv_cache": get_args(KVCache),
}
_REFUSED: Mapping[str, str] = {
    "speculative": "a draft model changes which tokens are batched at each step, and no replay repeats its guesses",
}
"""Keys that no config takes, with the reason."""
_DEVICES = "1; more needs backend=vllm"
_FREE: Mapping[str, str] = {
    "model": "embedded model, Hugging Face id, folder, or a name given to --model-path",
    "revision": "branch, tag or commit of a Hugging Face id",
    "weights": "sha256:… over the tensors as stored",
    "tp": _DEVICES,
    "ep": _DEVICES,
    "pp": _DEVICES,
    "batch": "1 to 4096; auto (backend=vllm): all references together",
    "chunk": "auto: prompts are whole; or the most tokens of one forward (backend=vllm)",
}
_INTEGERS: Mapping[str, int] = {  # with the largest value
    "tensor_parallel": 4096,
    "expert_parallel": 4096,
    "batch_size": 4096,
    "emulate_tensor_parallel": 4096,
    "pipeline_parallel": 4096,
    "max_batched_tokens": 1 << 20,
}
_AUTOMATIC = frozenset({"batch_size", "max_batched_tokens"})  # 0 is written auto
_FLAGS = frozenset({"compile", "concurrent_work", "cuda_graphs", "batch_invariant"})
_BOOLEANS: Mapping[str, bool] = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
# Not part of what a config id names: which weights they are is the model's identity, not a way to run it.
_IDENTITY = ("weights_digest", "revision")


class Claim(msgspec.Struct, frozen=True):
    """Assertions about an execution config, e.g. ``quant=awq`` or ``attn=sdpa,tp=2``.

    ``assertions`` maps field names of :class:`ExecutionConfig` to the asserted values.
    """

    assertions: dict[str, str | int | bool]

    def holds_for(self, config: ExecutionConfig) -> bool:
        """Whether every assertion is true of ``config``. What vLLM takes by itself (``attn=auto``) may be any of its kernels."""
        return all(_holds(field, value, getattr(config, field)) for field, value in self.assertions.items())

    def applied_to(self, config: ExecutionConfig) -> ExecutionConfig:
        """``config`` with the asserted fields set: what the claim says was run."""
        return _changed(config, self.assertions)

    def __str__(self) -> str:
        return ",".join(f"{_SHORT[field]}={_show(field, value)}" for field, value in self.assertions.items())


def parse_claim(spec: str) -> Claim:
    """Read ``key=value,…``. Raises :class:`UsageError` naming the key or value and near misses."""
    assertions = _parse_assignments(spec, "claim")
    if not assertions:
        raise UsageError(f"claim {shorten(spec)!r} asserts nothing", "write for example quant=none,attn=sdpa")
    return Claim(assertions)


def parse_config(spec: str, base: ExecutionConfig | None = None) -> ExecutionConfig:
    """``base`` (the defaults if None) changed by ``key=value,…``; an empty ``spec`` is ``base`` itself.

    Where the backend changes and the attention of ``base`` is not one of the new backend's, it becomes the new backend's
    default: ``auto`` for vllm, ``sdpa`` for transformers.
    """
    return _changed(base or ExecutionConfig(), _parse_assignments(spec, "config"))


def _holds(field: str, asserted: object, value: object) -> bool:
    if field == "attention" and "auto" in (asserted, value):
        return is_vllm_attention(str(asserted)) and is_vllm_attention(str(value))
    return asserted == value


def is_vllm_attention(attention: str) -> bool:
    """Whether an attention value is one of backend vllm's."""
    return attention == "auto" or attention.startswith("vllm_")


def claim_of(config: ExecutionConfig) -> Claim:
    """The claim that a row makes by its own declaration: every field but the weights digest."""
    fields = msgspec.structs.asdict(config)
    return Claim({name: value for name, value in fields.items() if name not in _IDENTITY})


def config_id(config: ExecutionConfig, base: ExecutionConfig | None = None) -> str:
    """A short name that a person can read: what differs from ``base``, or attention and dtype if nothing does."""
    base = base or ExecutionConfig()
    implied = _changed(base, {"backend": config.backend}).attention
    differing = [
        f"{_SHORT[name]}={_show(name, value)}"
        for name, value in msgspec.structs.asdict(config).items()
        if name not in _IDENTITY and value != (implied if name == "attention" else getattr(base, name))
    ]
    return ",".join(differing) if differing else f"attn={config.attention},dtype={config.dtype}"


def choices_of(key: str) -> tuple[str, ...]:
    """The values that a short key takes, where they are a closed list; else nothing."""
    field = KEYS[key]
    return ("true", "false") if field in _FLAGS else _CHOICES.get(field, ())


def describe_keys() -> dict[str, str]:
    """What each short key takes, in words: for ``--help``."""
    return {key: ", ".join(choices_of(key)) or _FREE.get(key, "1 to 4096") for key in KEYS}


def _parse_assignments(spec: str, what: str) -> dict[str, Any]:
    if len(spec) > MAX_SPEC_LENGTH:
        raise UsageError(f"{what} of {len(spec)} characters", f"at most {MAX_SPEC_LENGTH}")
    fields: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in spec.split(","))):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise UsageError(f"{what} part {shorten(part)!r} is not key=value", f"keys: {', '.join(KEYS)}")
        field = KEYS.get(key) or (key if key in _SHORT else None)
        if key in _REFUSED:
            raise UsageError(f"{what} key {key!r} is refused: {_REFUSED[key]}", f"leave {key} out")
        if field is None:
            raise UsageError(f"unknown {what} key {shorten(key)!r}", did_you_mean(key, KEYS))
        if field in fields:
            raise UsageError(f"{what} key {key!r} is given twice", "give it once")
        fields[field] = _parse_value(field, key, value)
    return fields


def _parse_value(field: str, key: str, value: str) -> str | int | bool:
    if field in _INTEGERS:
        if field in _AUTOMATIC and value == "auto":
            return 0
        if not value.isascii() or not value.isdigit() or not 1 <= int(value[:9]) <= _INTEGERS[field]:
            raise UsageError(
                f"{key}={shorten(value)!r} is not a whole number from 1 to {_INTEGERS[field]}", f"e.g. {key}=2"
            )
        return int(value)
    if field in _FLAGS:
        if value.lower() not in _BOOLEANS:
            raise UsageError(f"{key}={shorten(value)!r} is not true or false", f"e.g. {key}=true")
        return _BOOLEANS[value.lower()]
    choices = _CHOICES.get(field)
    if choices is not None and value not in choices:
        raise UsageError(f"unknown {field} {shorten(value)!r}", did_you_mean(value, choices_of(_SHORT[field])))
    return value


def _show(field: str, value: str | int | bool) -> str:
    if field in _AUTOMATIC and value == 0:
        return "auto"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _changed(config: ExecutionConfig, fields: Mapping[str, Any]) -> ExecutionConfig:
    """``config`` with ``fields`` set, and an attention that the backend has where none is named."""
    changed: ExecutionConfig = msgspec.structs.replace(config, **fields)
    ours = changed.backend == "vllm"
    if "backend" in fields and "attention" not in fields and ours != is_vllm_attention(changed.attention):
        changed = msgspec.structs.replace(changed, attention="auto" if ours else "sdpa")
    return changed
