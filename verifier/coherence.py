"""What evidence must hold by its own word, looked at before any replay: a prover must not choose where it is looked at.

Numbers that contradict themselves are no honest mistake of rounding, so they are refused rather than measured:

1. Vectors are stored in the dtype that the row declares.
2. Positions are those of the capture plan: the last ones of the prompt, the last ones generated.
3. Log-probabilities are as many as planned, and the top of one distribution: distinct ids, and no unlisted token can be likelier than the least listed one,
   so what is listed and what may be left must add up to 1.
4. The chosen token's log-probability is the listed one, or no more than the least; in greedy generation it is the highest.
5. At a temperature no listed token comes before the chosen one by the stated seed (:mod:`fpforensics.verifier.drawn`).

Whether the numbers fit the claim is for replays to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from fpforensics.common.errors import CancelledError, EvidenceError, shorten
from fpforensics.common.evidence import Row
from fpforensics.common.signals import (
    PHASES,
    Array,
    PhaseTrace,
    Trace,
    dtype_name,
    generation_positions,
)
from fpforensics.verifier.drawn import Position, contradiction
from fpforensics.verifier.intake import VerifiedBundle

STORED: Mapping[str, str] = {"bf16": "bf16", "fp16": "f16", "fp32": "f32", "fp64": "f64"}
"""The name of the stored dtype by the config's."""
_MASS = 1e-2  # how far a distribution may be from 1: the rounding of k exponentials
_SAME = 1e-5  # nats
_BLOCK_ROWS = 512
_HINT = "the evidence contradicts itself: do not rely on it"


def require_coherent(
    bundle: VerifiedBundle, rows: Iterable[Row], cancelled: Callable[[], bool] = lambda: False
) -> None:
    """Raise :class:`EvidenceError` naming the first row, reference, phase and position that contradicts the bundle itself;
    :class:`CancelledError` once ``cancelled()`` holds.
    """
    prompts = {reference.id: reference.prompt_ids for reference in bundle.references()}
    for row in rows:
        for entry in row.traces:
            _require_trace(bundle, row, bundle.trace(row, entry.reference_id), prompts[entry.reference_id], cancelled)


def _require_trace(
    bundle: VerifiedBundle, row: Row, trace: Trace, prompt_ids: Array, cancelled: Callable[[], bool]
) -> None:
    planned = generation_positions(len(prompt_ids), len(trace.output_ids), bundle.evidence.capture)
    tokens = np.concatenate([prompt_ids, trace.output_ids])
    for phase, positions in zip(PHASES, planned, strict=True):
        held = trace.phase(phase)
        where = f"row {shorten(row.config_id)}, {shorten(trace.reference_id)}, {phase}"
        _require_dtype(row, held, where)
        if not np.array_equal(held.positions, positions):
            raise EvidenceError(
                f"{where}: positions {_span(held.positions)}, the capture plan says {_span(positions)}", _HINT
            )
        listed = min(bundle.evidence.capture.top_k, row.facts.model.vocab_size)
        if len(positions) and held.logprob_ids.shape[1] != listed:
            raise EvidenceError(
                f"{where}: {held.logprob_ids.shape[1]} log-probabilities a position, the capture plan says {listed}",
                _HINT,
            )
        for block in _blocks(held):
            if cancelled():
                raise CancelledError("the check was cancelled")
            _require_distribution(block, row.facts.model.vocab_size, where)
            sampling = bundle.evidence.sampling
            _require_chosen(block, tokens, len(prompt_ids), sampling.temperature == 0, where)
            if sampling.temperature > 0:
                _require_drawn(bundle, row, trace, block, len(prompt_ids), where)


def _blocks(held: PhaseTrace) -> Iterator[PhaseTrace]:
    """What is listed at some positions at a time: a bundle must not choose how much memory this takes."""
    for start in range(0, len(held.positions), _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        yield PhaseTrace(held.positions[rows], held.logprob_ids[rows], held.logprobs[rows], held.chosen_logprobs[rows])


def _require_dtype(row: Row, held: PhaseTrace, where: str) -> None:
    expected = STORED[row.config.dtype]
    for name, rows in held.tensors().items():
        if "/" in name and dtype_name(rows) != expected:
            raise EvidenceError(
                f"{where}: {name} is stored in {dtype_name(rows)}, the row declares dtype={row.config.dtype}", _HINT
            )


def _require_distribution(held: PhaseTrace, vocab_size: int, where: str) -> None:
    ids = np.sort(held.logprob_ids, axis=1)
    twice = np.flatnonzero((ids[:, 1:] == ids[:, :-1]).any(axis=1))
    if len(twice):
        raise EvidenceError(f"{where}, position {held.positions[twice[0]]}: a token is listed twice", _HINT)
    logprobs = held.logprobs.astype(np.float64)
    listed = np.exp(logprobs).sum(axis=1)
    most = listed + (vocab_size - logprobs.shape[1]) * np.exp(logprobs.min(axis=1))
    wrong = np.flatnonzero((listed > 1 + _MASS) | (most < 1 - _MASS))
    if len(wrong):
        row = int(wrong[0])
        raise EvidenceError(
            f"{where}, position {held.positions[row]}: the {logprobs.shape[1]} log-probabilities are not the highest of a "
            f"distribution (they add up to {listed[row]:.3g}, with all others as likely as the least to {most[row]:.3g})",
            _HINT,
        )


def _require_chosen(held: PhaseTrace, tokens: Array, prompt: int, greedy: bool, where: str) -> None:
    chosen, listed = held.chosen_logprobs.astype(np.float64), held.logprobs.astype(np.float64)
    following = tokens[held.positions + 1]
    at = held.logprob_ids == following[:, None]
    found = at.any(axis=1)
    value = np.where(found, np.where(at, listed, -np.inf).max(axis=1), listed.min(axis=1))
    wrong = np.where(found, np.abs(chosen - value) > _SAME, chosen > value + _SAME)
    if greedy:
        generated = held.positions + 1 >= prompt
        wrong |= generated & (value < listed.max(axis=1) - _SAME)
    places = np.flatnonzero(wrong)
    if len(places):
        row = int(places[0])
        raise EvidenceError(
            f"{where}, position {held.positions[row]}: token {following[row]} follows at {chosen[row]:.4g}, where the list "
            f"{'gives it' if found[row] else 'ends at'} {value[row]:.4g} and begins at {listed[row].max():.4g}"
            f"{' (greedy)' * greedy}",
            _HINT,
        )


def _require_drawn(bundle: VerifiedBundle, row: Row, trace: Trace, held: PhaseTrace, prompt: int, where: str) -> None:
    for ids, logprobs, chosen, position in zip(
        held.logprob_ids, held.logprobs, held.chosen_logprobs, held.positions, strict=True
    ):
        step = int(position) + 1 - prompt
        if step < 0:
            continue
        at = Position(ids, logprobs, int(trace.output_ids[step]), float(chosen), step)
        why = contradiction(at, bundle.evidence.sampling, trace.reference_id, row.facts.model.vocab_size)
        if why:
            raise EvidenceError(f"{where}, position {position}: token {at.token} follows, but {why}", _HINT)


def _span(positions: Array) -> str:
    if not len(positions):
        return "none"
    return f"{positions[0]} to {positions[-1]} ({len(positions)})"
