"""An engine that computes nothing: numbers from hashes of the tokens, a little different for each config, and coherent."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import ml_dtypes
import msgspec
import numpy as np
from safetensors.numpy import save_file
from tiny_models import write_tokenizer

from fpforensics.common.config import ExecutionConfig, config_id
from fpforensics.common.engines.base import (
    ConcurrentWork,
    EngineFacts,
    EngineStarter,
    Host,
    ModelFacts,
    Progress,
    ReplayMode,
)
from fpforensics.common.models import resolve_model, weights_digest
from fpforensics.common.signals import (
    Array,
    CapturePlan,
    Forcing,
    PhaseTrace,
    Reference,
    Sampling,
    Trace,
    generation_positions,
)

VOCABULARY, LAYERS, HIDDEN, KEYS = 512, 4, 64, 32
NOISE = 1e-2
WORK = ConcurrentWork(
    kind="threads",
    size=8,
    dtype="fp32",
    workers=1,
    products=3,
    seconds=0.5,
    overlap=0.75,
    busy=0.75,
    outside_seconds=0.0,
)


def fake_checkpoint(folder: Path) -> Path:
    """What of a checkpoint is read without torch: a tokenizer, sizes, and a file of weights that nobody loads."""
    write_tokenizer(folder)
    sizes = {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "num_hidden_layers": LAYERS,
        "max_position_embeddings": 4096,
    }
    (folder / "config.json").write_text(json.dumps(sizes))
    save_file({"weight": np.zeros((2, 2), np.float32)}, folder / "model.safetensors")
    return folder


class FakeEngine:
    """Behaves like an engine of a model of four blocks; ``drift`` makes each generation differ from the one before.

    Concurrent work is said to have run as ``work`` says, and changes numbers only of an engine that is ``disturbed`` by it.
    """

    def __init__(
        self,
        config: ExecutionConfig,
        host: Host,
        drift: int = 0,
        disturbed: bool = False,
        work: ConcurrentWork = WORK,
    ) -> None:
        path = resolve_model(config.model, models=host.models).path
        self.config = msgspec.structs.replace(config, weights_digest=weights_digest(path))
        beside = config.concurrent_work and disturbed
        self._label = config_id(msgspec.structs.replace(config, batch_size=1, concurrent_work=beside))
        self._beside, self._work = work, list[ConcurrentWork]()
        self._drift, self._generations = drift, 0

    def generate(
        self,
        references: Sequence[Reference],
        sampling: Sampling,
        capture: CapturePlan,
        progress: Progress | None = None,
    ) -> list[Trace]:
        self._generations += 1
        self._work += [self._beside] * self.config.concurrent_work
        traces = []
        for done, reference in enumerate(references, start=1):
            tokens = reference.prompt_ids.tolist()
            for _ in range(sampling.max_new_tokens):
                tokens.append(int(self._logits(tokens).argmax()))
            size = len(reference.prompt_ids)
            phases = generation_positions(size, sampling.max_new_tokens, capture)
            prefill, decode = (self._phase(tokens, positions, capture, None) for positions in phases)
            traces.append(Trace(reference.id, np.array(tokens[size:], np.int32), prefill, decode))
            if progress is not None:
                progress(done, len(references))
        return traces

    def teacher_force(
        self,
        forcings: Sequence[Forcing],
        capture: CapturePlan,
        mode: ReplayMode,
        progress: Progress | None = None,
    ) -> list[Trace]:
        self._generations = 1
        return [
            Trace(
                each.reference.id,
                each.output_ids,
                *(
                    self._phase(
                        [*each.reference.prompt_ids.tolist(), *each.output_ids.tolist()],
                        each.positions[phase],
                        capture,
                        each.claimed_ids[phase],
                    )
                    for phase in ("prefill", "decode")
                ),
            )
            for each in forcings
        ]

    def facts(self) -> EngineFacts:
        return EngineFacts(
            device="cpu",
            gpu="",
            attention_kernels={"prefill": ["fake"], "decode": ["fake"]},
            quantization_kernel="",
            batch_sizes=[1],
            versions={"torch": "0"},
            numerics={"threads": "1"},
            model=ModelFacts(
                name=self.config.model,
                architecture="Fake",
                weights_digest=self.config.weights_digest,
                vocab_size=VOCABULARY,
                num_layers=LAYERS,
                hidden_size=HIDDEN,
                key_width=KEYS,
            ),
            concurrent_work=list(self._work),
        )

    def close(self) -> None:
        pass

    def _logits(self, tokens: Sequence[int]) -> Array:
        return self._vector(tokens, "logits", VOCABULARY)

    def _phase(
        self, tokens: Sequence[int], positions: Array, capture: CapturePlan, claimed: Array | None
    ) -> PhaseTrace:
        rows = [tokens[: int(position) + 1] for position in positions]
        logits = np.stack([self._logits(row) for row in rows]) if rows else np.zeros((0, VOCABULARY))
        logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        ids = np.argsort(-logprobs, axis=1, kind="stable")[:, : capture.top_k] if claimed is None else claimed
        chosen = np.array([tokens[int(position) + 1] for position in positions], np.int64)
        return PhaseTrace(
            positions=np.asarray(positions, np.int32),
            logprob_ids=ids.astype(np.int32),
            logprobs=np.take_along_axis(logprobs, ids.astype(np.int64), axis=1).astype(np.float32),
            chosen_logprobs=np.take_along_axis(logprobs, chosen[:, None], axis=1)[:, 0].astype(np.float32),
            hidden_states=self._layers(rows, capture, "hidden", HIDDEN),
            key_vectors=self._layers(rows, capture, "keys", KEYS),
        )

    def _layers(self, rows: Sequence[Sequence[int]], capture: CapturePlan, kind: str, width: int) -> dict[str, Array]:
        held = [layer for layer in capture.layers if layer == "last" or int(layer) <= LAYERS]
        return {
            layer: np.array([self._vector(row, f"{kind}/{layer}", width) for row in rows])
            .reshape(len(rows), width)
            .astype(ml_dtypes.bfloat16)
            for layer in held
        }

    def _vector(self, tokens: Sequence[int], kind: str, width: int) -> Array:
        common = _normal(f"{list(tokens)}{kind}", width)
        drift = self._drift + self._generations if self._drift else 0
        return common + NOISE * _normal(f"{list(tokens)}{kind}{self._label}{drift}", width)


def starter(make: Callable[[ExecutionConfig, Host], FakeEngine]) -> EngineStarter:
    """Starts the engines that ``make`` gives."""

    @contextmanager
    def start(config: ExecutionConfig, host: Host, cancelled: Callable[[], bool]) -> Iterator[FakeEngine]:
        yield make(config, host)

    return start


fake_engine = starter(FakeEngine)
"""An engine starter without a model."""
disturbed_engine = starter(partial(FakeEngine, disturbed=True))
"""The same, whose numbers concurrent work changes."""
_STARTED = itertools.count(1)
drifting_engine = starter(
    lambda config, host: FakeEngine(config, host, 1000 * next(_STARTED) if config.attention == "eager" else 0)
)
"""The same, of which eager attention differs from one repetition to the next, and from one start to the next."""


def _normal(label: str, width: int) -> Array:
    seed = int.from_bytes(hashlib.sha256(label.encode()).digest()[:8], "little")
    return np.random.default_rng(seed).standard_normal(width)
