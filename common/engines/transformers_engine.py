"""The Transformers engine: generation and teacher forcing through one stepping loop, with capture.

Prefill is one forward over the prompt with a KV cache; then one token at a time. ``generate`` and
``teacher_force(mode="decode")`` differ only in who names the next token, so on the same kernels they agree
bit for bit.

- Always exactly ``max_new_tokens`` tokens: an end-of-sequence token does not stop generation. Token N is
  never fed.
- The row of logits that decides a token is always a product of its own (one row per sequence), so what is
  captured changes no token. Captured prompt rows before it share one product: replaying other positions may
  change their bits.
- With ``batch_size`` B, row 0 is measured. Its B - 1 neighbours are rotations of the measured sequence, of
  the same length and distinct; they continue greedily by themselves.
- ``teacher_force(mode="prefill")`` is one forward over prompt and output: output rows there went through
  prefill kernels.
- Layers beyond the model's depth and blocks without a key cache are left out of a trace.
- ``compile`` compiles decoder blocks one by one, hooks outside: a block's output is then always rounded to
  the compute dtype, captured or not, so capture changes neither fusion nor rounding. The KV cache's update is
  not compiled.
- ``concurrent_work`` runs beside generations and replays alike, in this process (:mod:`concurrent_work`).
- ``torchao-int4`` is weight-only int4, asymmetric, in groups of the largest of 128, 64, 32, 16 that divides
  all widths.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import msgspec

from fpforensics.common.config import ExecutionConfig
from fpforensics.common.engines.base import EngineFacts, Host, ModelFacts, Progress, ReplayMode
from fpforensics.common.engines.concurrent_work import Accompaniment, load_on
from fpforensics.common.engines.transformers_batch import check_forcing, check_plan, check_reference
from fpforensics.common.engines.transformers_load import (
    check_config,
    choose_device,
    load_model,
    prepare_imports,
)
from fpforensics.common.environment import installed_versions
from fpforensics.common.errors import ReplayError, UnknownModelError
from fpforensics.common.models import resolve_model, weights_digest
from fpforensics.common.sampling import check_sampling
from fpforensics.common.signals import CapturePlan, Forcing, Reference, Sampling, Trace

if TYPE_CHECKING:
    from fpforensics.common.engines.transformers_loop import Runner


class TransformersEngine:
    """One execution config, loaded in this process. ``config`` has its weights digest filled in."""

    config: ExecutionConfig

    def __init__(self, config: ExecutionConfig, host: Host | None = None) -> None:
        host = host or Host()
        check_config(config)
        checkpoint = resolve_model(config.model, config.revision, host.models)
        digest = weights_digest(checkpoint.path)
        if config.weights_digest not in ("", digest):
            raise UnknownModelError(
                f"the weights of model {config.model!r} here are {digest}, not {config.weights_digest}",
                "map the name to a folder with those weights",
            )
        prepare_imports()
        from fpforensics.common.engines import transformers_facts as facts
        from fpforensics.common.engines.transformers_kernels import explained
        from fpforensics.common.engines.transformers_loop import Runner

        self.config = msgspec.structs.replace(config, weights_digest=digest)
        self._device = choose_device(host.device, config)
        with explained(config, self._device):
            model = load_model(config, checkpoint.path, self._device)
            self._numerics = facts.numerics(model, config)
            self._model_facts: ModelFacts = facts.model_facts(model, config.model, digest)
            self._quantization = facts.quantized_modules(model, config)
            if config.emulate_tensor_parallel > 1:
                from fpforensics.common.engines.transformers_tensor_parallel import split_products

                split_products(model, config.emulate_tensor_parallel)
            if config.matmul == "fp32-rounded":
                from fpforensics.common.engines.transformers_load import compute_dtype
                from fpforensics.common.engines.transformers_matmul import round_products

                round_products(model, compute_dtype(config))
            self._runner: Runner | None = Runner(model, self.config, self._device)
        self._beside = Accompaniment(load_on(str(self._device))) if config.concurrent_work else None

    def generate(
        self,
        references: Sequence[Reference],
        sampling: Sampling,
        capture: CapturePlan,
        progress: Progress | None = None,
    ) -> list[Trace]:
        """As :meth:`Engine.generate`. Raises :class:`UsageError` and :class:`ReplayError`."""
        runner = self._running()
        check_sampling(sampling)
        check_plan(capture)
        for reference in references:
            check_reference(reference, runner.vocab_size)
        traces: list[Trace] = []
        with self._accompanied():
            for reference in references:
                traces.append(runner.generate(reference, sampling, capture))
                if progress is not None:
                    progress(len(traces), len(references))
        return traces

    def teacher_force(
        self,
        forcings: Sequence[Forcing],
        capture: CapturePlan,
        mode: ReplayMode,
        progress: Progress | None = None,
    ) -> list[Trace]:
        """As :meth:`Engine.teacher_force`. Of ``capture`` the layers and ``full_logits`` count; the forcings
        say the rest.
        """
        runner = self._running()
        check_plan(capture)
        for forcing in forcings:
            check_forcing(forcing, runner.vocab_size)
        force = runner.force_stepwise if mode == "decode" else runner.force_at_once
        traces: list[Trace] = []
        with self._accompanied():
            for forcing in forcings:
                traces.append(force(forcing, capture))
                if progress is not None:
                    progress(len(traces), len(forcings))
        return traces

    def facts(self) -> EngineFacts:
        """What really ran, up to now: kernels and batch sizes are empty before the first forward."""
        from fpforensics.common.engines import transformers_facts as facts

        runner = self._running()
        return EngineFacts(
            device=self._device.type,
            gpu=facts.gpu_name(self._device),
            attention_kernels=runner.watch.attention(self.config),
            quantization_kernel="; ".join(filter(None, [self._quantization, runner.watch.quantized_products()])),
            batch_sizes=sorted(runner.batch_sizes),
            versions=installed_versions(),
            numerics={**self._numerics, "matmul_operators": ", ".join(runner.watch.products())},
            model=self._model_facts,
            concurrent_work=list(self._beside.done) if self._beside else [],
        )

    def close(self) -> None:
        """Free the model. Device memory held by this process's allocator is given back too."""
        if self._runner is None:
            return
        self._runner = self._beside = None
        gc.collect()
        import torch

        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _accompanied(self) -> AbstractContextManager[None]:
        return self._beside.running() if self._beside else nullcontext()

    def _running(self) -> Runner:
        if self._runner is None:
            raise ReplayError("the engine is closed", "open another one")
        return self._runner
