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
]
Quantization = Literal["none", "bnb-int8", "bnb-nf4", "bnb-fp4", "torchao-int8", "torchao-int4", "awq", "gptq"]

MAX_SPEC_LENGTH = 4096
DEFAULT_MODEL = "smollm2-135m"


class ExecutionConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything that decides the arithmetic of a run.

    ``weights_digest`` is ``sha256:<hex>`` over the tensors as stored on disk, and empty until an engine has loaded them.
    ``matmul="fp32-rounded"`` computes each weight product in float32 and rounds it to ``dtype``.
    ``emulate_tensor_parallel=N`` runs on one device, but adds up row-parallel products from N partial ones, each rounded
    to ``dtype``, as N ranks would; ``tensor_parallel`` counts real devices.
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
}
_SHORT: Mapping[str, str] = {field: key for key, field in KEYS.items()}
_CHOICES: Mapping[str, tuple[str, ...]] = {
    "backend": get_args(Backend),
    "dtype": get_args(ComputeDType),
    "quantization": get_args(Quantization),
    "attention": get_args(Attention),
    "matmul": get_args(Matmul),
}
_NOT_YET: Mapping[str, frozenset[str]] = {"backend": frozenset({"vllm"}), "concurrent_work": frozenset({"true"})}
"""Values that evidence may hold and that no engine of this release runs: never offered."""
_ONE_DEVICE = "1; more needs the vLLM engine, which is not part of this release"
_FREE: Mapping[str, str] = {
    "model": "embedded model, Hugging Face id, folder, or a name given to --model-path",
    "revision": "branch, tag or commit of a Hugging Face id",
    "weights": "sha256:… over the tensors as stored",
    "tp": _ONE_DEVICE,
    "ep": _ONE_DEVICE,
}
_INTEGERS = frozenset({"tensor_parallel", "expert_parallel", "batch_size", "emulate_tensor_parallel"})
_FLAGS = frozenset({"compile", "concurrent_work"})
_BOOLEANS: Mapping[str, bool] = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_MAX_INTEGER = 4096
# Not part of what a config id names: which weights they are is the model's identity, not a way to run it.
_IDENTITY = ("weights_digest", "revision")


class Claim(msgspec.Struct, frozen=True):
    """Assertions about an execution config, e.g. ``quant=awq`` or ``attn=sdpa,tp=2``.

    ``assertions`` maps field names of :class:`ExecutionConfig` to the asserted values.
    """

    assertions: dict[str, str | int | bool]

    def holds_for(self, config: ExecutionConfig) -> bool:
        """Whether every assertion is true of ``config``."""
        return all(getattr(config, field) == value for field, value in self.assertions.items())

    def applied_to(self, config: ExecutionConfig) -> ExecutionConfig:
        """``config`` with the asserted fields set: what the claim says was run."""
        return msgspec.structs.replace(config, **self.assertions)

    def __str__(self) -> str:
        return ",".join(f"{_SHORT[field]}={_show(value)}" for field, value in self.assertions.items())


def parse_claim(spec: str) -> Claim:
    """Read ``key=value,…``. Raises :class:`UsageError` naming the key or value and near misses."""
    assertions = _parse_assignments(spec, "claim")
    if not assertions:
        raise UsageError(f"claim {shorten(spec)!r} asserts nothing", "write for example quant=none,attn=sdpa")
    return Claim(assertions)


def parse_config(spec: str, base: ExecutionConfig | None = None) -> ExecutionConfig:
    """``base`` (the defaults if None) changed by ``key=value,…``; an empty ``spec`` is ``base`` itself."""
    return msgspec.structs.replace(base or ExecutionConfig(), **_parse_assignments(spec, "config"))


def claim_of(config: ExecutionConfig) -> Claim:
    """The claim that a row makes by its own declaration: every field but the weights digest."""
    fields = msgspec.structs.asdict(config)
    return Claim({name: value for name, value in fields.items() if name not in _IDENTITY})


def config_id(config: ExecutionConfig, base: ExecutionConfig | None = None) -> str:
    """A short name that a person can read: what differs from ``base``, or attention and dtype if nothing does."""
    base = base or ExecutionConfig()
    differing = [
        f"{_SHORT[name]}={_show(value)}"
        for name, value in msgspec.structs.asdict(config).items()
        if name not in _IDENTITY and value != getattr(base, name)
    ]
    return ",".join(differing) if differing else f"attn={config.attention},dtype={config.dtype}"


def choices_of(key: str) -> tuple[str, ...]:
    """The values that a short key takes, where they are a closed list; else nothing."""
    field = KEYS[key]
    values = ("true", "false") if field in _FLAGS else _CHOICES.get(field, ())
    return tuple(value for value in values if value not in _NOT_YET.get(field, ()))


def describe_keys() -> dict[str, str]:
    """What each short key takes, in words: for ``--help``."""
    numbers = f"1 to {_MAX_INTEGER}"
    return {key: ", ".join(choices_of(key)) or _FREE.get(key, numbers) for key in KEYS}


def _parse_assignments(spec: str, what: str) -> dict[str, Any]:
    if len(spec) > MAX_SPEC_LENGTH:
        raise UsageError(f"{what} of {len(spec)} characters", f"at most {MAX_SPEC_LENGTH}")
    fields: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in spec.split(","))):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise UsageError(f"{what} part {shorten(part)!r} is not key=value", f"keys: {', '.join(KEYS)}")
        field = KEYS.get(key) or (key if key in _SHORT else None)
        if field is None:
            raise UsageError(f"unknown {what} key {shorten(key)!r}", did_you_mean(key, KEYS))
        if field in fields:
            raise UsageError(f"{what} key {key!r} is given twice", "give it once")
        fields[field] = _parse_value(field, key, value)
    return fields


def _parse_value(field: str, key: str, value: str) -> str | int | bool:
    if field in _INTEGERS:
        if not value.isascii() or not value.isdigit() or not 1 <= int(value[:9]) <= _MAX_INTEGER:
            raise UsageError(
                f"{key}={shorten(value)!r} is not a whole number from 1 to {_MAX_INTEGER}", f"e.g. {key}=2"
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


def _show(value: str | int | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
