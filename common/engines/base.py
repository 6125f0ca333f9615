"""The one small protocol behind which every backend lives, and the facts it reports.

Prover and verifier use the same engines: what captures on one side captures on the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Literal, Protocol

import msgspec

from fpforensics.common.config import ExecutionConfig
from fpforensics.common.signals import CapturePlan, Forcing, Reference, Sampling, Trace

ReplayMode = Literal["prefill", "decode"]
Progress = Callable[[int, int], None]
"""Called with (references done, references in all)."""


class Host(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where and how a worker process runs; never taken from a bundle.

    ``device`` is ``auto``, ``cpu`` or ``cuda``; ``python`` another interpreter (empty: ours); ``env`` extra
    environment variables; ``models`` maps model names to local folders or Hugging Face ids.
    """

    device: str = "auto"
    python: str = ""
    env: dict[str, str] = {}
    models: dict[str, str] = {}


class ModelFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the loaded checkpoint is. ``key_width`` is KV heads times head size."""

    name: str
    architecture: str
    weights_digest: str
    vocab_size: int
    num_layers: int
    hidden_size: int
    key_width: int


class ConcurrentWork(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What ran beside one generation or replay under ``concurrent=true``, and for how much of it.

    Each of ``workers`` multiplied ``size`` × ``size`` matrices of ``dtype``: on a stream of its own (``cuda-stream``) or in a
    thread (``threads``). ``seconds`` is the measured time of the generation; ``overlap`` the share of it in which some
    product was in flight, ``busy`` the same of one worker, on average; ``products`` were in flight in it. Starting and ending
    the work took ``outside_seconds``, which are part of no wall time.
    """

    kind: Literal["cuda-stream", "threads"]
    size: int
    dtype: str
    workers: int
    products: int
    seconds: float
    overlap: float
    busy: float
    outside_seconds: float


class EngineFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """What really ran, as the engine saw it; a config says what was asked for.

    ``attention_kernels`` and ``quantization_kernel`` name operators that were observed; ``batch_sizes`` are
    the batch sizes seen over the steps; ``versions`` maps library names to versions; ``gpu`` is empty on a
    CPU; ``numerics`` holds what else decides rounding (threads, instruction set, oneDNN cap, matmul path,
    TF32 flags). ``concurrent_work`` has an entry for each generation and replay; facts without any are written as they were
    before it was known.
    """

    device: str
    gpu: str
    attention_kernels: dict[str, list[str]]  # phase -> operator names
    quantization_kernel: str
    batch_sizes: list[int]
    versions: dict[str, str]
    numerics: dict[str, str]
    model: ModelFacts
    concurrent_work: list[ConcurrentWork] = []


class Engine(Protocol):
    """One execution config, loaded. Token ids in, token ids out; nothing is decoded to text and tokenized
    again.
    """

    config: ExecutionConfig

    def generate(
        self,
        references: Sequence[Reference],
        sampling: Sampling,
        capture: CapturePlan,
        progress: Progress | None = None,
    ) -> list[Trace]:
        """Generate for each reference and capture while doing so."""
        ...

    def teacher_force(
        self,
        forcings: Sequence[Forcing],
        capture: CapturePlan,
        mode: ReplayMode,
        progress: Progress | None = None,
    ) -> list[Trace]:
        """Feed the given tokens and capture at the given positions.

        ``prefill`` is one forward over prompt and output; ``decode`` repeats generation's own steps with
        forced tokens. In the returned traces ``logprob_ids`` are the claimed ids.
        """
        ...

    def facts(self) -> EngineFacts:
        """What really ran, up to now."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...


class EngineStarter(Protocol):
    """How a config becomes an engine: :func:`fpforensics.common.engines.remote.start_engine`, or what stands in for it."""

    def __call__(
        self, config: ExecutionConfig, host: Host, cancelled: Callable[[], bool]
    ) -> AbstractContextManager[Engine]:
        """Load ``config``; leaving the context frees it."""
        ...
