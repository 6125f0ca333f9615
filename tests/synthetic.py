"""Small, valid evidence made of hashes: no engine, and the same bytes on every machine and NumPy version."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fpforensics.common.bundle import BundleWriter
from fpforensics.common.config import Attention, ExecutionConfig
from fpforensics.common.engines.base import EngineFacts, ModelFacts
from fpforensics.common.environment import Environment
from fpforensics.common.evidence import Evidence, Repetitions, Row
from fpforensics.common.keys import PrivateKey
from fpforensics.common.signals import (
    DTYPES,
    Array,
    CapturePlan,
    Phase,
    PhaseTrace,
    Reference,
    Sampling,
    Trace,
)

# Test keys, from seeds that everybody can read here: never trust them outside of tests.
TEST_KEY = PrivateKey.from_seed(hashlib.sha256(b"fpforensics test key, not a secret").digest())
OTHER_KEY = PrivateKey.from_seed(hashlib.sha256(b"another fpforensics test key, not a secret").digest())
NONCE = "00112233445566778899aabbccddeeff"
WEIGHTS = "sha256:" + hashlib.sha256(b"no weights at all").hexdigest()
ATTENTION: tuple[Attention, ...] = ("eager", "sdpa", "flex", "sdpa_math")


@dataclass(frozen=True)
class Size:
    """How much evidence to make; the smallest that shows every kind of tensor by default."""

    rows: int = 1
    references: int = 1
    prompt: int = 6
    output: int = 4
    prefill: int = 2
    layers: tuple[str, ...] = ("1",)
    prefill_layers: tuple[str, ...] | None = None  # None: the same
    hidden: int = 8
    key: int = 4
    top_k: int = 3
    vocabulary: int = 64
    depth: int = 4
    dtype: str = "bf16"
    logits: bool = False


def noise(label: str, *shape: int) -> Array:
    """Numbers in [-2, 2), by hashing: float64, exact in bfloat16 or not, always the same."""
    raw = hashlib.shake_128(label.encode()).digest(2 * int(np.prod(shape)))
    return (np.frombuffer(raw, "<u2").astype(np.float64) / 16384 - 2).reshape(shape)


def token_ids(label: str, count: int, vocabulary: int) -> Array:
    """``count`` ids below ``vocabulary``."""
    return np.floor((noise(label, count) + 2) / 4 * vocabulary).astype(np.int32)


def references(size: Size) -> list[Reference]:
    """The prompts."""
    return [
        Reference(f"ref_{index}", token_ids(f"prompt {index}", size.prompt, size.vocabulary), "made by hashing")
        for index in range(size.references)
    ]


def trace(size: Size, row: int, reference: int) -> Trace:
    """The signals of one reference in one row."""
    label = f"{row} {reference}"
    return Trace(
        f"ref_{reference}",
        token_ids(f"output {reference}", size.output, size.vocabulary),
        _phase(size, label, "prefill", np.arange(size.prompt - size.prefill, size.prompt)),
        _phase(size, label, "decode", np.arange(size.prompt, size.prompt + size.output - 1)),
    )


def row(size: Size, index: int, writer: BundleWriter) -> Row:
    """One row, its arrays added to ``writer``."""
    attention = ATTENTION[index % len(ATTENTION)]
    name = f"attn={attention}" if index < len(ATTENTION) else f"attn={attention}#{index}"
    return Row(
        config_id=name,
        config=ExecutionConfig(attention=attention, weights_digest=WEIGHTS),
        facts=EngineFacts(
            device="cpu",
            gpu="",
            attention_kernels={"prefill": ["aten::none"], "decode": ["aten::none"]},
            quantization_kernel="",
            batch_sizes=[1],
            versions={"numpy": "0"},
            numerics={"threads": "1"},
            model=ModelFacts(
                name="synthetic",
                architecture="None",
                weights_digest=WEIGHTS,
                vocab_size=size.vocabulary,
                num_layers=size.depth,
                hidden_size=size.hidden,
                key_width=size.key,
            ),
        ),
        repetitions=Repetitions(count=2, bit_identical=True, wall_seconds=(1.5, 2.5), wall_mean=2.0, wall_variance=0.5),
        traces=tuple(writer.add_trace(trace(size, index, reference)) for reference in range(size.references)),
    )


def evidence(size: Size, writer: BundleWriter, nonce: str = NONCE) -> Evidence:
    """All of it, its arrays added to ``writer``."""
    return Evidence(
        created_at="2026-01-31T12:00:00+00:00",
        session_id="synthetic",
        nonce=nonce,
        tool_version="0",
        environment=Environment(
            hostname="nowhere",
            platform="synthetic",
            python="3",
            cpu="none",
            cpu_count=1,
            cpu_flags=(),
            gpus=(),
            driver="",
            packages={"numpy": "0"},
            variables={},
        ),
        capture=CapturePlan(layers=size.layers, prefill_positions=size.prefill, top_k=size.top_k),
        sampling=Sampling(max_new_tokens=size.output),
        references=tuple(writer.add_reference(reference) for reference in references(size)),
        rows=tuple(row(size, index, writer) for index in range(size.rows)),
    )


def write_synthetic(
    path: Path,
    size: Size = Size(),
    key: PrivateKey = TEST_KEY,
    *,
    change: Callable[[Evidence], Evidence] = lambda unchanged: unchanged,
) -> str:
    """A bundle of synthetic evidence at ``path``; returns its digest."""
    with BundleWriter(path) as writer:
        return writer.finish(change(evidence(size, writer)), key)


def _phase(size: Size, label: str, phase: Phase, positions: Array) -> PhaseTrace:
    count = len(positions)
    dtype = DTYPES[size.dtype]
    prefill_layers = size.layers if size.prefill_layers is None else size.prefill_layers
    layers = prefill_layers if phase == "prefill" else size.layers
    first = token_ids(f"{label} {phase} top", count, size.vocabulary)
    return PhaseTrace(
        positions=positions.astype(np.int32),
        logprob_ids=((first[:, None] + np.arange(size.top_k)) % size.vocabulary).astype(np.int32),
        logprobs=(noise(f"{label} {phase} logprobs", count, size.top_k) - 3).astype(np.float32),
        chosen_logprobs=(noise(f"{label} {phase} chosen", count) - 3).astype(np.float32),
        hidden_states={
            layer: noise(f"{label} {phase} hidden {layer}", count, size.hidden).astype(dtype) for layer in layers
        },
        key_vectors={layer: noise(f"{label} {phase} keys {layer}", count, size.key).astype(dtype) for layer in layers},
        logits=noise(f"{label} {phase} logits", count, size.vocabulary).astype(dtype) if size.logits else None,
    )
