"""Session plans on the wire: what a remote party may ask of a prover, and how a client asks it.

A remote party names models that the prover offers and sends its own texts; it can name no file and no download.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from fpforensics.common.config import (
    MAX_SPEC_LENGTH,
    ExecutionConfig,
    claim_of,
    parse_config,
)
from fpforensics.common.errors import UsageError, did_you_mean, shorten
from fpforensics.common.rpc import require_short
from fpforensics.common.signals import LAST, CapturePlan, Sampling
from fpforensics.proto import evidence_pb2 as pb
from fpforensics.prover.session import SessionPlan

NONCE_BYTES = (16, 64)
_NAME = re.compile(r"[\w.\- ]{1,64}")
_LAYER = re.compile(rf"[1-9][0-9]{{0,3}}|{LAST}")


@dataclass(frozen=True, kw_only=True)
class SessionLimits:
    """What one remote session may ask for."""

    configs: int = 32
    texts: int = 256
    text_bytes: int = 1 << 20  # of all texts together
    instruction: int = 4096
    references: int = 256
    prompt_tokens: int = 32_768
    new_tokens: int = 8192
    repetitions: int = 20
    layers: int = 256
    top_k: int = 1024


def plan_of(request: pb.SessionRequest, models: Collection[str], limits: SessionLimits) -> SessionPlan:
    """The plan that a request asks for. Raises :class:`UsageError` naming what this prover does not take."""
    defaults = SessionPlan(configs=())
    nonce = request.nonce
    if nonce and not NONCE_BYTES[0] <= len(nonce) <= NONCE_BYTES[1]:
        raise UsageError(f"nonce of {len(nonce)} bytes", f"{NONCE_BYTES[0]} to {NONCE_BYTES[1]}, or none")
    instruction = request.instruction if request.HasField("instruction") else defaults.instruction
    return SessionPlan(
        configs=_configs(request.configs, models, limits),
        texts=_texts(request.texts, limits),
        references=_number(request, "references", defaults.references, 1, limits.references),
        prompt_tokens=_number(request, "prompt_tokens", defaults.prompt_tokens, 1, limits.prompt_tokens),
        instruction=require_short("instruction", instruction, limits.instruction),
        capture=_capture(request.capture, limits),
        sampling=_sampling(request.sampling, limits),
        repetitions=_number(request, "repetitions", defaults.repetitions, 1, limits.repetitions),
        allow_nondeterminism=request.allow_nondeterminism,
        nonce=nonce.hex(),
        layers_named=request.capture.layers_named,
    )


def request_of(plan: SessionPlan) -> pb.SessionRequest:
    """The request that asks for ``plan``. Raises :class:`UsageError` if it names files: send their texts."""
    if not plan.texts and plan.documents != ("builtin",):
        raise UsageError("a remote prover opens no files", "send the documents' texts, or use the built-in corpus")
    try:
        nonce = bytes.fromhex(plan.nonce)
    except ValueError:
        raise UsageError(f"nonce {shorten(plan.nonce)!r} is not hex", "use the verifier's challenge as it is") from None
    capture, sampling = plan.capture, plan.sampling
    return pb.SessionRequest(
        nonce=nonce,
        configs=[_spec(config) for config in plan.configs],
        texts=[pb.Document(name=name, text=text) for name, text in plan.texts],
        references=plan.references,
        prompt_tokens=plan.prompt_tokens,
        instruction=plan.instruction,
        sampling=pb.Sampling(
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
        ),
        capture=pb.Capture(
            layers=capture.layers,
            prefill_positions=capture.prefill_positions,
            decode_positions=capture.decode_positions,
            top_k=capture.top_k,
            full_logits=capture.full_logits,
            layers_named=plan.layers_named,
        ),
        repetitions=plan.repetitions,
        allow_nondeterminism=plan.allow_nondeterminism,
    )


def _configs(specs: Sequence[str], models: Collection[str], limits: SessionLimits) -> tuple[ExecutionConfig, ...]:
    if not 1 <= len(specs) <= limits.configs:
        raise UsageError(f"a session over {len(specs)} configs", f"give 1 to {limits.configs}")
    configs = tuple(parse_config(require_short("config", spec, MAX_SPEC_LENGTH)) for spec in specs)
    for config in configs:
        if config.model not in models:
            raise UsageError(
                f"this prover does not offer model {shorten(config.model)!r}",
                did_you_mean(config.model, models),
            )
        if config.revision:
            raise UsageError(
                f"revision {shorten(config.revision)!r} in a remote session",
                "the prover's operator chooses it",
            )
    return configs


def _texts(documents: Sequence[pb.Document], limits: SessionLimits) -> tuple[tuple[str, str], ...]:
    if len(documents) > limits.texts:
        raise UsageError(f"{len(documents)} texts", f"at most {limits.texts}")
    size = 0
    for document in documents:
        if not _NAME.fullmatch(document.name):
            raise UsageError(
                f"text name {shorten(document.name)!r}",
                "1 to 64 letters, digits, spaces, dots, dashes, underscores",
            )
        if not document.text.strip():
            raise UsageError(f"text {document.name!r} is empty", "send its words")
        size += len(document.text.encode())
    if size > limits.text_bytes:
        raise UsageError(f"texts of {size} bytes", f"at most {limits.text_bytes} together")
    return tuple((document.name, document.text) for document in documents)


def _sampling(asked: pb.Sampling, limits: SessionLimits) -> Sampling:
    defaults = Sampling()
    temperature = asked.temperature if asked.HasField("temperature") else defaults.temperature
    top_p = asked.top_p if asked.HasField("top_p") else defaults.top_p
    if not (math.isfinite(temperature) and 0 <= temperature <= 100):
        raise UsageError(f"temperature {temperature}", "from 0 (greedy) to 100")
    if not 0 < top_p <= 1:
        raise UsageError(f"top_p {top_p}", "more than 0, at most 1")
    return Sampling(
        max_new_tokens=_number(asked, "max_new_tokens", defaults.max_new_tokens, 1, limits.new_tokens),
        temperature=temperature,
        top_p=top_p,
        seed=_number(asked, "seed", defaults.seed, 0, 2**63 - 1),
    )


def _capture(asked: pb.Capture, limits: SessionLimits) -> CapturePlan:
    defaults = CapturePlan()
    layers = tuple(asked.layers) or defaults.layers
    if len(layers) > limits.layers or len(set(layers)) < len(layers):
        raise UsageError(f"{len(layers)} layers to capture", f"at most {limits.layers}, each once")
    for layer in layers:
        if not _LAYER.fullmatch(layer):
            raise UsageError(f"layer {shorten(layer)!r}", f"a block number from 1, or {LAST!r}")
    return CapturePlan(
        layers=layers,
        prefill_positions=_number(asked, "prefill_positions", defaults.prefill_positions, 0, limits.prompt_tokens),
        decode_positions=_number(asked, "decode_positions", defaults.decode_positions, 0, limits.new_tokens),
        top_k=_number(asked, "top_k", defaults.top_k, 1, limits.top_k),
        full_logits=asked.full_logits if asked.HasField("full_logits") else defaults.full_logits,
    )


def _number(
    message: pb.SessionRequest | pb.Sampling | pb.Capture, field: str, default: int, low: int, high: int
) -> int:
    value = int(getattr(message, field)) if message.HasField(field) else default
    if not low <= value <= high:
        raise UsageError(f"{field.replace('_', ' ')} {value}", f"from {low} to {high}")
    return value


def _spec(config: ExecutionConfig) -> str:
    return str(claim_of(config)) + (f",weights={config.weights_digest}" if config.weights_digest else "")
