"""The stepping loop: prefill, then one token at a time, whoever names the tokens; and the single forward of a
prefill replay.

B is the batch (row 0 is measured), P the prompt's length, m the rows kept of one forward, V the vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from fpforensics.common.config import ExecutionConfig
from fpforensics.common.engines.rows import planned_blocks
from fpforensics.common.engines.transformers_batch import phase_request, with_neighbours
from fpforensics.common.engines.transformers_capture import (
    BlockTaps,
    PhaseRecorder,
    cached_keys,
    decoder_blocks,
    last_keys,
    log_probabilities,
    record_rows,
)
from fpforensics.common.engines.transformers_kernels import KernelWatch, attention_backend
from fpforensics.common.errors import ReplayError
from fpforensics.common.sampling import choose
from fpforensics.common.signals import (
    Array,
    CapturePlan,
    Forcing,
    Phase,
    Reference,
    Sampling,
    Trace,
    generation_positions,
)

Chooser = Callable[[torch.Tensor, int], torch.Tensor]
"""(log-probabilities (V,), step) -> the token id () on the device."""


class Runner:
    """A loaded model and the two ways to drive it."""

    def __init__(self, model: PreTrainedModel, config: ExecutionConfig, device: torch.device) -> None:
        self._model, self._config, self._device = model, config, device
        text = model.config.get_text_config()
        self.depth, self.vocab_size = int(text.num_hidden_layers), int(text.vocab_size)
        blocks = decoder_blocks(model, self.depth)
        if config.compile:
            for block in blocks:
                block.forward = torch.compile(block.forward, dynamic=True)
        self._taps = BlockTaps(blocks)
        self._head = _SplitHead(model.get_output_embeddings())
        self._row = torch.zeros(1, dtype=torch.int64, device=device)
        self._compiles = config.compile or config.attention == "flex"
        self._warm: set[Phase] = set()
        self.watch = KernelWatch()
        self.batch_sizes: set[int] = set()

    def generate(self, reference: Reference, sampling: Sampling, plan: CapturePlan | None) -> Trace:
        """Generate for one reference; ``plan`` None captures nothing at all (for measuring what capture
        costs).
        """

        def sampled(logprobs_V: torch.Tensor, step: int) -> torch.Tensor:  # noqa: N803
            if sampling.temperature == 0.0:
                return torch.argmax(logprobs_V)  # the first, that is the lowest id, among equals
            token = choose(logprobs_V.cpu().numpy(), sampling, reference.id, step)
            return torch.tensor(token, device=self._device)

        count = sampling.max_new_tokens
        prefill_M, decode_M = generation_positions(len(reference.prompt_ids), count, plan or CapturePlan())  # noqa: N806
        if plan is None:
            plan, prefill_M, decode_M = CapturePlan(layers=()), prefill_M[:0], decode_M[:0]  # noqa: N806
        blocks = planned_blocks(plan.layers, self.depth)
        prefill = PhaseRecorder("prefill", prefill_M, plan, blocks, self._device)
        decode = PhaseRecorder("decode", decode_M, plan, blocks, self._device)
        with self._running(blocks):
            tokens = self._step_through(reference, count, sampled, prefill, decode, blocks)
            output_ids = torch.stack(tokens).cpu().numpy().astype(np.int32)
        return Trace(reference.id, output_ids, prefill.finish(reference.id), decode.finish(reference.id))

    def force_stepwise(self, forcing: Forcing, plan: CapturePlan) -> Trace:
        """Generation's own steps, with the tokens given."""
        forced_N = torch.from_numpy(np.array(forcing.output_ids, dtype=np.int64)).to(self._device)  # noqa: N806
        blocks, prefill, decode = self._recorders(forcing, plan)
        with self._running(blocks):
            self._step_through(
                forcing.reference, len(forced_N), lambda _, step: forced_N[step], prefill, decode, blocks
            )
        return self._forced(forcing, prefill, decode)

    def force_at_once(self, forcing: Forcing, plan: CapturePlan) -> Trace:
        """One forward over prompt and output."""
        blocks, prefill, decode = self._recorders(forcing, plan)
        positions = np.concatenate([prefill.positions, decode.positions]).astype(np.int64)
        if len(positions):
            all_ids = np.concatenate([forcing.reference.prompt_ids, forcing.output_ids]).astype(np.int64)
            batch = with_neighbours(all_ids[:-1], self._config.batch_size, self.vocab_size)
            cache, rows_m = self._new_cache(), self._ids(positions)
            with self._running(blocks):
                logits_BmV = self._forward("prefill", self._ids(batch), cache, rows_m, rows_m)  # noqa: N806
                keys = cached_keys(cache, sorted(set(blocks.values())), rows_m, int(positions[0]))
                next_m = self._ids(all_ids[positions + 1])
                record_rows([prefill, decode], logits_BmV[0], next_m, self._taps.take(), keys)
        return self._forced(forcing, prefill, decode)

    def _step_through(
        self,
        reference: Reference,
        count: int,
        chooser: Chooser,
        prefill: PhaseRecorder,
        decode: PhaseRecorder,
        blocks: dict[str, int],
    ) -> list[torch.Tensor]:
        length, wanted_blocks = len(reference.prompt_ids), sorted(set(blocks.values()))
        cache = self._new_cache()
        ids_BP = self._ids(with_neighbours(reference.prompt_ids, self._config.batch_size, self.vocab_size))  # noqa: N806
        wanted = prefill.positions.astype(np.int64)
        before = wanted[wanted < length - 1]
        keep, rows_m = self._ids(np.append(before, length - 1)), self._ids(wanted)
        with self._head.last_row_alone():
            logits_BmV = self._forward("prefill", ids_BP, cache, keep, rows_m if len(wanted) else None)  # noqa: N806
        logprobs_1V = log_probabilities(logits_BmV[0, -1:])  # noqa: N806
        token = chooser(logprobs_1V[0], 0)
        tokens, unseen = [token], []
        if len(wanted):
            prefill.add(
                logits_BmV[0, : len(wanted)],
                torch.cat([log_probabilities(logits_BmV[0, :-1]), logprobs_1V])[: len(wanted)],
                torch.cat([ids_BP[0].index_select(0, keep[:-1] + 1), token[None]])[: len(wanted)],
                self._taps.take(),
                cached_keys(cache, wanted_blocks, rows_m, int(wanted[0])),
            )
        for step in range(1, count):
            position = length + step - 1
            ids_B1 = torch.cat([token[None], torch.argmax(logits_BmV[1:, -1], dim=-1)])[:, None]  # noqa: N806
            seen = decode.wants(position)
            logits_BmV = self._forward("decode", ids_B1, cache, 1, self._row if seen else None)  # noqa: N806
            logprobs_1V = log_probabilities(logits_BmV[0, -1:])  # noqa: N806
            token = chooser(logprobs_1V[0], step)
            tokens.append(token)
            if seen:
                keys = last_keys(cache, wanted_blocks)
                decode.add(logits_BmV[0, -1:], logprobs_1V, token[None], self._taps.take(), keys)
            else:
                unseen.append((position, logprobs_1V[0].gather(0, token[None])))
        _require_finite(unseen, reference.id)
        return tokens

    def _forward(
        self,
        phase: Phase,
        ids_BT: torch.Tensor,  # noqa: N803
        cache: Any,
        keep: torch.Tensor | int,
        rows: torch.Tensor | None,
    ) -> torch.Tensor:
        """Logits (B, m, V) at the rows to ``keep``; the taps keep hidden states at ``rows``."""
        self.batch_sizes.add(len(ids_BT))
        self._taps.arm(rows)
        # A first forward that compiles would drown the profile in the compiler's own operators.
        watched = phase in self._warm or not self._compiles
        with self.watch.watching(phase) if watched else contextlib.nullcontext():
            output = self._model(input_ids=ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=keep)
        self._warm.add(phase)
        logits: torch.Tensor = output.logits
        return logits

    @contextlib.contextmanager
    def _running(self, blocks: dict[str, int]) -> Iterator[None]:
        self._taps.plant(list(blocks.values()))
        try:
            with (
                torch.inference_mode(),
                _steady_compilation(self._config),
                attention_backend(self._config, self._device),
            ):
                yield
        finally:
            self._taps.remove()

    def _recorders(self, forcing: Forcing, plan: CapturePlan) -> tuple[dict[str, int], PhaseRecorder, PhaseRecorder]:
        blocks = planned_blocks(plan.layers, self.depth)
        made = [
            PhaseRecorder(phase, positions, plan, blocks, self._device, claimed)
            for phase in ("prefill", "decode")
            for positions, claimed in [phase_request(forcing, phase)]
        ]
        return blocks, made[0], made[1]

    def _forced(self, forcing: Forcing, prefill: PhaseRecorder, decode: PhaseRecorder) -> Trace:
        name, output_ids = forcing.reference.id, np.array(forcing.output_ids, dtype=np.int32)
        return Trace(name, output_ids, prefill.finish(name), decode.finish(name))

    def _new_cache(self) -> DynamicCache:
        return (_UncompiledCache if self._config.compile else DynamicCache)(config=self._model.config)

    def _ids(self, ids: Array) -> torch.Tensor:
        return torch.from_numpy(np.array(ids, dtype=np.int64)).to(self._device)


class _UncompiledCache(DynamicCache):
    """A cache whose update is not traced: its Python state would otherwise force a recompilation at every
    length.
    """

    update = torch.compiler.disable(DynamicCache.update)


class _SplitHead:
    """Lets the output layer compute the last row by itself, so that its shape never depends on what is
    captured.
    """

    def __init__(self, head: nn.Module | None) -> None:
        if head is None:
            raise ReplayError("the model has no output layer", "it must be a causal language model")
        self._alone = False
        product = head.forward

        def forward(states_BmD: torch.Tensor) -> torch.Tensor:  # noqa: N803
            if not self._alone or states_BmD.shape[1] == 1:
                return product(states_BmD)
            # A clone, so that the row lies in memory as it does when nothing else is kept.
            return torch.cat([product(states_BmD[:, :-1]), product(states_BmD[:, -1:].clone())], dim=1)

        head.forward = forward

    @contextlib.contextmanager
    def last_row_alone(self) -> Iterator[None]:
        self._alone = True
        try:
            yield
        finally:
            self._alone = False


@contextlib.contextmanager
def _steady_compilation(config: ExecutionConfig) -> Iterator[None]:
    """Compiled code must not depend on which lengths came earlier, nor fall back in silence after a few of them."""
    if not (config.compile or config.attention == "flex"):
        yield
        return
    import torch._dynamo.config as dynamo

    settings: dict[str, Any] = {
        "recompile_limit": 4096,
        "accumulated_recompile_limit": 1 << 16,
        "fail_on_recompile_limit_hit": True,
    }
    if config.compile:
        # Shape-agnostic from the first call on. Flex attention alone is left as it is: torch 2.13 generates C++
        # for it that does not compile then, and its specialized and general kernels gave the same bits.
        settings |= {"assume_static_by_default": False, "automatic_dynamic_shapes": False}
    with dynamo.patch(**settings):
        yield


def _require_finite(unseen: list[tuple[int, torch.Tensor]], reference_id: str) -> None:
    if not unseen:
        return
    finite = torch.isfinite(torch.cat([value for _, value in unseen])).cpu().numpy()
    if not finite.all():
        position = unseen[int(np.argmin(finite))][0]
        raise ReplayError(
            f"the logits are not finite at position {position} of {reference_id} (decode)",
            "the model overflows in this dtype: use dtype=bf16 or fp32",
        )
