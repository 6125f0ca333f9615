"""Replays by config and tokens, each computed once: what a liar can compute, and what the verifier under attack will.

A replay depends on nothing but config, tokens and positions, so that one attack costs a fraction of a second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np

from attacks.shown import Shown, changed
from fpforensics.common.config import ExecutionConfig, parse_config
from fpforensics.common.engines import in_process
from fpforensics.common.engines.base import Engine, EngineFacts, Host, Progress, ReplayMode
from fpforensics.common.signals import PHASES, Array, CapturePlan, Forcing, Phase, PhaseTrace, Reference, Trace

USING = "matmul=fp32-rounded"
LAYERS = ("1", "2", "4", "12", "last")


@dataclass(frozen=True)
class Hybrid:
    """A config of which only the blocks before ``block`` (1-based) are those of unquantized weights."""

    spec: str
    block: int


class Replays:
    """Replays by config and tokens, each computed once. :meth:`start` stands in for a verifier's workers."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self._traces: dict[tuple[object, bytes, bytes], Trace] = {}
        self._facts: dict[object, EngineFacts] = {}

    def replay(self, spec: str | Hybrid, shown: Shown) -> Shown:
        """``shown`` as ``spec`` computes it, by the products that the verifier uses unless the spec says otherwise."""
        return shown.of(self.forced(_resolved(spec, shown), forcings_of(shown), CapturePlan(layers=LAYERS)))

    def remember(self, spec: str | Hybrid, *shown: Shown) -> None:
        """Compute replays of all that is shown with one load of the model."""
        whole = replace(
            shown[0],
            references=tuple(reference for each in shown for reference in each.references),
            traces=tuple(trace for each in shown for trace in each.traces),
        )
        self.replay(spec, whole)

    def likeliest(self, shown: Shown) -> Shown:
        """``shown`` listing the ids that sdpa's replay finds likeliest at each position, as an honest prover lists them."""
        self.replay("", shown)

        def one(reference: Reference, trace: Trace) -> Trace:
            held = self._traces[_resolved("", shown), reference.prompt_ids.tobytes(), trace.output_ids.tobytes()]

            def listed(phase: Phase, name: str, array: Array) -> Array:
                if name != "logprob_ids":
                    return array
                known = held.phase(phase)
                assert known.logits is not None
                rows = known.logits[np.searchsorted(known.positions, trace.phase(phase).positions)]
                return np.argsort(-rows, axis=1, kind="stable")[:, : array.shape[1]].astype(np.int32)

            return changed(trace, listed, every=True)

        return shown.of([one(*pair) for pair in zip(shown.references, shown.traces, strict=True)])

    @contextmanager
    def start(self, config: ExecutionConfig, host: Host, cancelled: Callable[[], bool]) -> Iterator[Engine]:
        """An :class:`~fpforensics.common.engines.base.EngineStarter`."""
        yield _Remembered(config, self)

    def facts(self, config: ExecutionConfig) -> EngineFacts:
        return self._facts[plain(config)]

    def forced(self, how: ExecutionConfig | Hybrid, forcings: Sequence[Forcing], capture: CapturePlan) -> list[Trace]:
        keys = [(how, f.reference.prompt_ids.tobytes(), f.output_ids.tobytes()) for f in forcings]
        new: dict[tuple[object, bytes, bytes], Forcing] = {}
        for key, forcing in zip(keys, forcings, strict=True):
            known = self._traces.get(key)
            if not _holds(known, forcing):
                new[key] = _superset(forcing, [each for each in (new.get(key), known) if each])
        if new:
            with _opened(how, self.host) as engine:
                whole = CapturePlan(layers=LAYERS, full_logits=True)
                traces = engine.teacher_force(list(new.values()), whole, "prefill")
                self._traces.update(zip(new, map(_known, traces), strict=True))
                self._facts[how] = engine.facts()
        return [_selected(self._traces[key], forcing, capture) for key, forcing in zip(keys, forcings, strict=True)]


class _Remembered:
    """An engine that looks replays up."""

    def __init__(self, config: ExecutionConfig, replays: Replays) -> None:
        self.config, self._replays = config, replays

    def teacher_force(
        self, forcings: Sequence[Forcing], capture: CapturePlan, mode: ReplayMode, progress: Progress | None = None
    ) -> list[Trace]:
        assert mode == "prefill"
        return self._replays.forced(plain(self.config), forcings, capture)

    def generate(self, *_: object) -> list[Trace]:
        raise NotImplementedError

    def facts(self) -> EngineFacts:
        return self._replays.facts(self.config)

    def close(self) -> None:
        """Nothing to free."""


def _resolved(spec: str | Hybrid, shown: Shown) -> ExecutionConfig | Hybrid:
    if isinstance(spec, Hybrid):
        return spec
    config = parse_config(spec, shown.config)
    return plain(parse_config(USING, config) if "matmul" not in spec and config.dtype in ("bf16", "fp16") else config)


def plain(config: ExecutionConfig) -> ExecutionConfig:
    """``config`` without what names its weights."""
    return msgspec.structs.replace(config, weights_digest="", revision="")


def forcings_of(shown: Shown) -> list[Forcing]:
    """What a replay of ``shown`` must feed and report."""
    return [
        Forcing(
            reference,
            trace.output_ids,
            {phase: trace.phase(phase).positions for phase in PHASES},
            {phase: trace.phase(phase).logprob_ids for phase in PHASES},
        )
        for reference, trace in zip(shown.references, shown.traces, strict=True)
    ]


def _holds(trace: Trace | None, forcing: Forcing) -> bool:
    return trace is not None and all(
        np.isin(forcing.positions[phase], trace.phase(phase).positions).all() for phase in PHASES
    )


def _superset(forcing: Forcing, known: Sequence[Forcing | Trace]) -> Forcing:
    """``forcing`` at its own positions and those known before; which ids it lists does not matter."""
    positions = dict(forcing.positions)
    for each in known:
        for phase in PHASES:
            held = each.positions[phase] if isinstance(each, Forcing) else each.phase(phase).positions
            positions[phase] = np.union1d(positions[phase], held).astype(np.int32)
    ids = {phase: np.zeros((len(each), 1), np.int32) for phase, each in positions.items()}
    return replace(forcing, positions=positions, claimed_ids=ids)


def _known(trace: Trace) -> Trace:
    """``trace`` with the log-probabilities of the whole vocabulary in place of logits."""
    import torch

    from fpforensics.common.engines.transformers_capture import log_probabilities

    def one(held: PhaseTrace) -> PhaseTrace:
        if held.logits is None:
            return held
        # bfloat16 and float16 widen to float32 without a change, as the engine itself widens them
        wide = held.logits if held.logits.itemsize == 8 else held.logits.astype(np.float32)
        return replace(held, logits=log_probabilities(torch.from_numpy(wide)).numpy())

    return replace(trace, prefill=one(trace.prefill), decode=one(trace.decode))


def _selected(trace: Trace, forcing: Forcing, capture: CapturePlan) -> Trace:
    """A known trace at the forcing's positions, ids and the plan's layers."""

    def one(phase: Phase) -> PhaseTrace:
        held, ids = trace.phase(phase), forcing.claimed_ids[phase]
        rows = np.searchsorted(held.positions, forcing.positions[phase])
        logprobs = np.zeros(ids.shape, np.float32)
        if len(rows):
            assert held.logits is not None
            logprobs = held.logits[rows[:, None], ids]
        return PhaseTrace(
            positions=held.positions[rows],
            logprob_ids=ids,
            logprobs=logprobs,
            chosen_logprobs=held.chosen_logprobs[rows],
            hidden_states={layer: a[rows] for layer, a in held.hidden_states.items() if layer in capture.layers},
            key_vectors={layer: a[rows] for layer, a in held.key_vectors.items() if layer in capture.layers},
        )

    return Trace(forcing.reference.id, trace.output_ids, one("prefill"), one("decode"))


@contextmanager
def _opened(how: ExecutionConfig | Hybrid, host: Host) -> Iterator[Engine]:
    """An engine for a config, or one whose first blocks were exchanged for unquantized ones."""
    config = how if isinstance(how, ExecutionConfig) else parse_config(f"{how.spec},{USING}")
    with in_process(config, host, lambda: False) as engine:
        if isinstance(how, Hybrid):
            with in_process(parse_config(USING), host, lambda: False) as unquantized:
                ours, theirs = _blocks(engine), _blocks(unquantized)
                for index in range(how.block - 1):
                    ours[index] = theirs[index]
        yield engine


def _blocks(engine: Any) -> Any:
    return engine._runner._model.model.layers
