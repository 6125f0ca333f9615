"""A world where rounding is drawn and not computed: bundles and engines of made-up platforms, hundreds of prompts a second.

A vector is what exact arithmetic gives, plus what the config rounds away on every platform, plus what the platform does.
The anchor (float32) gives the exact one. So honest evidence lies some 0.5 noise floors from its replay, another config's
beyond 1, as recorded evidence does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import msgspec
import numpy as np

from fpforensics.common.bundle import BundleWriter
from fpforensics.common.config import ExecutionConfig, config_id
from fpforensics.common.engines.base import EngineFacts, Host, ModelFacts
from fpforensics.common.environment import describe_environment
from fpforensics.common.evidence import Evidence, Repetitions, Row
from fpforensics.common.keys import PrivateKey
from fpforensics.common.models import vocab_size, weights_digest
from fpforensics.common.signals import Array, CapturePlan, Forcing, PhaseTrace, Reference, Sampling, Trace

LAYERS = ("1", "2", "4")
WIDTH, TOP, PROMPT = 16, 4, 20
CAPTURE = CapturePlan(layers=LAYERS, prefill_positions=16, top_k=TOP)


def references(count: int, start: int = 0) -> list[Reference]:
    """Prompts number ``start`` and on, no two alike."""
    drawn = [_rng("prompt", start + index).integers(0, 500, PROMPT).astype(np.int32) for index in range(count)]
    return [Reference(f"ref_{index}", ids, "drawn") for index, ids in enumerate(drawn)]


def trace(reference: Reference, config: ExecutionConfig, platform: str, output: int = 1, model: str = "") -> Trace:
    """What ``config`` gives on ``platform``; another ``model`` gives other vectors altogether."""
    tokens = hashlib.sha256(reference.prompt_ids.tobytes()).hexdigest()
    prompt = tokens + model
    return Trace(
        reference.id,
        _rng(tokens, "output").integers(0, 500, output).astype(np.int32),
        _phase(prompt, config, platform, np.arange(PROMPT - 16, PROMPT)),
        _phase(prompt, config, platform, np.arange(PROMPT, PROMPT + output - 1)),
    )


def write_bundle(
    path: Path,
    key: PrivateKey,
    checkpoint: Path,
    prompts: Sequence[Reference],
    *rows: tuple[ExecutionConfig, ExecutionConfig],
    platform: str = "elsewhere",
    output: int = 1,
    model: str = "",
) -> Path:
    """Evidence of ``rows``, each (what it declares, what ran), from ``platform``."""
    with BundleWriter(path) as writer:
        evidence = Evidence(
            created_at="2026-01-31T12:00:00+00:00",
            session_id="drawn",
            nonce="",
            tool_version="0",
            environment=msgspec.structs.replace(describe_environment(), cpu=platform, gpus=()),
            capture=CAPTURE,
            sampling=Sampling(max_new_tokens=output),
            references=tuple(writer.add_reference(each) for each in prompts),
            rows=tuple(
                Row(
                    config_id=config_id(declared, ExecutionConfig(model=declared.model)),
                    config=msgspec.structs.replace(declared, weights_digest=weights_digest(checkpoint)),
                    facts=facts(declared, checkpoint, "AVX2"),
                    repetitions=Repetitions(
                        count=1, bit_identical=True, wall_seconds=(1.0,), wall_mean=1.0, wall_variance=0.0
                    ),
                    traces=tuple(writer.add_trace(trace(each, ran, platform, output, model)) for each in prompts),
                )
                for declared, ran in rows
            ),
        )
        writer.finish(evidence, key)
    return path


def facts(config: ExecutionConfig, checkpoint: Path, capability: str, threads: int = 2) -> EngineFacts:
    """What an engine on a CPU with these instructions states."""
    return EngineFacts(
        device="cpu",
        gpu="",
        attention_kernels={},
        quantization_kernel="",
        batch_sizes=[1],
        versions={"torch": "2.13.0"},
        numerics={"threads": str(threads), "cpu_capability": capability},
        model=ModelFacts(
            name=config.model,
            architecture="Drawn",
            weights_digest=weights_digest(checkpoint),
            vocab_size=vocab_size(checkpoint),
            num_layers=4,
            hidden_size=WIDTH,
            key_width=WIDTH,
        ),
    )


class DrawnEngine:
    """Replays on the platform ``here``."""

    def __init__(self, config: ExecutionConfig, checkpoint: Path) -> None:
        self.config = config
        self.checkpoint = checkpoint

    def teacher_force(
        self,
        forcings: Sequence[Forcing],
        capture: CapturePlan,
        mode: str,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Trace]:
        """The claimed tokens and ids, this platform's numbers."""
        return [
            trace(each.reference, msgspec.structs.replace(self.config, weights_digest=""), "here", len(each.output_ids))
            for each in forcings
        ]

    def facts(self) -> EngineFacts:
        return facts(self.config, self.checkpoint, "AVX512")


def starter(checkpoint: Path) -> Callable[..., object]:
    """Stands where worker processes would be started."""

    @contextmanager
    def start(config: ExecutionConfig, host: Host, cancelled: Callable[[], bool]) -> Iterator[DrawnEngine]:
        yield DrawnEngine(config, checkpoint)

    return start


def _phase(prompt: str, config: ExecutionConfig, platform: str, positions: Array) -> PhaseTrace:
    def vectors(label: str) -> Array:
        if not len(positions):
            return np.empty((0, WIDTH), np.float32)
        return _vectors(prompt, label, config, platform)[positions].astype(np.float32)

    return PhaseTrace(
        positions=positions.astype(np.int32),
        logprob_ids=np.tile(np.arange(TOP, dtype=np.int32), (len(positions), 1)),
        logprobs=vectors("logprobs")[:, :TOP] - 20,
        chosen_logprobs=np.full(len(positions), -1.0, np.float32),
        hidden_states={layer: vectors(f"hidden {layer}") for layer in LAYERS},
        key_vectors={layer: vectors(f"keys {layer}") for layer in LAYERS},
    )


def _vectors(prompt: str, label: str, config: ExecutionConfig, platform: str) -> Array:
    """(every position, WIDTH)."""
    exact = _drawn(prompt, label)
    if config.dtype == "fp32":
        return exact
    ran = (prompt, label, config.attention, config.quantization)
    return exact + 0.009 * _drawn(*ran) + 0.003 * _drawn(*ran, platform)


@lru_cache(maxsize=20_000)
def _drawn(*label: object) -> Array:
    return _rng(*label).standard_normal((PROMPT + 8, WIDTH), np.float32)


def _rng(*label: object) -> np.random.Generator:
    digest = hashlib.blake2b("/".join(map(str, label)).encode(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))
