"""What a prover signs, and how one set of numbers is made out of others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np

from fpforensics.common.config import ExecutionConfig
from fpforensics.common.engines.base import EngineFacts
from fpforensics.common.evidence import Evidence
from fpforensics.common.sampling import gumbel_noise_of
from fpforensics.common.signals import PHASES, Array, CapturePlan, Phase, PhaseTrace, Reference, Sampling, Trace
from fpforensics.verifier.score import EARLY

VOCABULARY = 49152
EARLY_LAYERS = ("1", "2", "4")
Change = Callable[[Phase, str, Array], Array]


@dataclass(frozen=True)
class Shown:
    """What a prover signs: one row. ``evidence`` lends environment, sampling and facts."""

    references: tuple[Reference, ...]
    traces: tuple[Trace, ...]
    config: ExecutionConfig
    evidence: Evidence
    facts: EngineFacts
    capture: CapturePlan
    sampling: Sampling
    nonce: str = ""
    noise: float = 0.0
    """How far apart it says that its repetitions lay, in every tensor; 0: equal in every bit."""

    def of(self, traces: Sequence[Trace]) -> Shown:
        """The same prompts and tokens with other numbers."""
        return replace(self, traces=tuple(traces))

    def only(self, *numbers: int) -> Shown:
        """Some of its references, each as often as it is named, under ids of their own."""
        chosen = [(self.references[number], self.traces[number]) for number in numbers]
        return replace(
            self,
            references=tuple(replace(reference, id=f"ref_{i}") for i, (reference, _) in enumerate(chosen)),
            traces=tuple(replace(trace, reference_id=f"ref_{i}") for i, (_, trace) in enumerate(chosen)),
        )


def combined(combine: Callable[..., Array], first: Shown, *others: Shown) -> Shown:
    """``combine`` of every measured tensor of all, in float64, rounded to the dtype that ``first`` holds it in."""

    def one(trace: Trace, *rest: Trace) -> Trace:
        def change(phase: Phase, name: str, array: Array) -> Array:
            wide = [each.phase(phase).tensors()[name].astype(np.float64) for each in rest]
            found = combine(array.astype(np.float64), *wide)
            return np.minimum(found, 0).astype(array.dtype) if "logprobs" in name else found.astype(array.dtype)

        return changed(trace, change)

    return first.of([one(*traces) for traces in zip(first.traces, *(each.traces for each in others), strict=True)])


def moved(start: Shown, end: Shown, share: float) -> Shown:
    """``start`` moved by a ``share`` of the way to ``end``."""
    return combined(lambda a, b: a + share * (b - a), start, end)


def spliced(first: Shown, second: Shown, takes: Callable[[Phase, str], bool]) -> Shown:
    """``first``, with the tensors of ``second`` where ``takes`` says so."""

    def one(ours: Trace, theirs: Trace) -> Trace:
        return changed(ours, lambda phase, name, a: theirs.phase(phase).tensors()[name] if takes(phase, name) else a)

    return first.of([one(ours, theirs) for ours, theirs in zip(first.traces, second.traces, strict=True)])


def at_positions(shown: Shown, choose: Callable[[int, Phase, Array], Sequence[int]]) -> Shown:
    """``shown`` at the rows (indices) that ``choose(number of the reference, phase, positions)`` names."""

    def one(number: int, trace: Trace) -> Trace:
        rows = {phase: list(choose(number, phase, trace.phase(phase).positions)) for phase in PHASES}
        return changed(trace, lambda phase, _name, array: np.ascontiguousarray(array[rows[phase]]), every=True)

    return shown.of([one(number, trace) for number, trace in enumerate(shown.traces)])


def with_layers(shown: Shown, layers: tuple[str, ...]) -> Shown:
    """``shown`` as if only ``layers`` had been captured."""

    def held(phase: PhaseTrace) -> PhaseTrace:
        named = phase.tensors().items()
        return PhaseTrace.from_tensors({n: a for n, a in named if "/" not in n or n.partition("/")[2] in layers})

    traces = [replace(trace, prefill=held(trace.prefill), decode=held(trace.decode)) for trace in shown.traces]
    return replace(shown.of(traces), capture=msgspec.structs.replace(shown.capture, layers=layers))


def coherent(shown: Shown) -> Shown:
    """What a careful liar does last: its log-probabilities are those of one distribution, in which each generated token is likeliest,
    or drawn by the seed that it states.
    """

    def one(reference: Reference, trace: Trace) -> Trace:
        tokens = np.concatenate([reference.prompt_ids, trace.output_ids])
        phases = {phase: _following(trace.phase(phase), tokens, reference, shown.sampling) for phase in PHASES}
        return replace(trace, **phases)

    return shown.of([one(*pair) for pair in zip(shown.references, shown.traces, strict=True)])


def _following(held: PhaseTrace, tokens: Array, reference: Reference, sampling: Sampling) -> PhaseTrace:
    ids, logprobs = held.logprob_ids.copy(), held.logprobs.astype(np.float64)
    chosen = held.chosen_logprobs.copy()
    for row, position in enumerate(held.positions):
        token, step = tokens[position + 1], position + 1 - len(reference.prompt_ids)
        if step >= 0:
            if token not in ids[row]:
                ids[row, np.argmin(logprobs[row])] = token
            own, best = np.argmax(ids[row] == token), np.argmax(logprobs[row])
            if sampling.temperature == 0:
                logprobs[row, [own, best]] = logprobs[row, [best, own]]
            else:
                noise = sampling.temperature * gumbel_noise_of(sampling.seed, reference.id, int(step), ids[row])
                least = np.delete(logprobs[row] + noise, own).max() - noise[own] + 1e-3
                logprobs[row, own] = max(logprobs[row, own], least)
        listed = np.exp(logprobs[row]).sum()
        most = listed + (VOCABULARY - len(ids[row])) * np.exp(logprobs[row].min())
        logprobs[row] -= max(np.log(listed), 0) + min(np.log(most), 0)
        at = ids[row] == token
        chosen[row] = logprobs[row, at][0] if at.any() else min(chosen[row], logprobs[row].min())
    return replace(held, logprob_ids=ids, logprobs=logprobs.astype(np.float32), chosen_logprobs=chosen)


def early_distances(shown: Shown, other: Shown) -> Array:
    """(references, early cells, positions of both phases): how far apart the two are."""

    def one(ours: Trace, theirs: Trace, name: str) -> Array:
        gaps = [
            ours.phase(phase).tensors()[name].astype(np.float64)
            - theirs.phase(phase).tensors()[name].astype(np.float64)
            for phase in PHASES
        ]
        return np.linalg.norm(np.concatenate(gaps), axis=1)

    names = [f"{key.signal}/{key.layer}" for key in EARLY]
    pairs = list(zip(shown.traces, other.traces, strict=True))
    return np.array([[one(ours, theirs, name) for name in names] for ours, theirs in pairs])


def changed(trace: Trace, change: Change, *, every: bool = False) -> Trace:
    """``trace`` with ``change(phase, name, array)`` of what is measured; of positions and ids too if ``every``."""

    def one(phase: Phase) -> PhaseTrace:
        named: Mapping[str, Array] = trace.phase(phase).tensors()
        kept = () if every else ("positions", "logprob_ids")
        return PhaseTrace.from_tensors(
            {name: array if name in kept else change(phase, name, array) for name, array in named.items()}
        )

    return replace(trace, prefill=one("prefill"), decode=one("decode"))
