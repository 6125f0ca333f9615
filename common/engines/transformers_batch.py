"""What runs beside the measured sequence, and what a forcing may ask for: checked arrays of token ids, no
torch.
"""

from __future__ import annotations

import numpy as np

from fpforensics.common.errors import UsageError
from fpforensics.common.signals import PHASES, Array, CapturePlan, Forcing, Reference
from fpforensics.common.words import counted


def with_neighbours(ids: Array, batch_size: int, vocab_size: int) -> Array:
    """(B, L) int64: row 0 is ``ids`` (L,), the others are distinct rotations of it, so that no row needs
    padding.

    A sequence with too few distinct rotations (short or periodic) gets neighbours whose first token is moved
    on as well.
    """
    rows = [np.array(ids, dtype=np.int64)]
    seen = {rows[0].tobytes()}
    for number in range(1, batch_size):
        row = np.roll(rows[0], -max(1, number * len(ids) // batch_size))
        while row.tobytes() in seen:
            row = row.copy()
            row[0] = (row[0] + 1) % vocab_size
        seen.add(row.tobytes())
        rows.append(row)
    return np.stack(rows)


def check_plan(plan: CapturePlan) -> None:
    """Raise :class:`UsageError` for counts that mean nothing."""
    for name, least in (("prefill_positions", 0), ("decode_positions", 0), ("top_k", 1)):
        if (value := getattr(plan, name)) < least:
            raise UsageError(f"{name}={value}", f"at least {least}")


def check_reference(reference: Reference, vocab_size: int) -> None:
    """Raise :class:`UsageError` for an empty prompt or a token id outside the vocabulary."""
    if reference.prompt_ids.ndim != 1 or not len(reference.prompt_ids):
        raise UsageError(f"{reference.id} has no prompt tokens", "give at least one")
    _check_ids(reference.prompt_ids, vocab_size, f"the prompt of {reference.id}")


def check_forcing(forcing: Forcing, vocab_size: int) -> None:
    """Raise :class:`UsageError` for ids outside the vocabulary, or positions outside their phase or out of
    order.
    """
    reference = forcing.reference
    check_reference(reference, vocab_size)
    if forcing.output_ids.ndim != 1 or not len(forcing.output_ids):
        raise UsageError(f"{reference.id} has no output tokens to force", "give at least one")
    _check_ids(forcing.output_ids, vocab_size, f"the output of {reference.id}")
    prompt, end = len(reference.prompt_ids), len(reference.prompt_ids) + len(forcing.output_ids) - 1
    bounds = {"prefill": (0, prompt), "decode": (prompt, end)}
    for phase in PHASES:
        positions, claimed = phase_request(forcing, phase)
        low, high = bounds[phase]
        if len(positions) and (positions[0] < low or positions[-1] >= high or (np.diff(positions) <= 0).any()):
            raise UsageError(
                f"{phase} positions of {reference.id} are not increasing within {low} to {high - 1}",
                "take them from the trace that is replayed",
            )
        if claimed.ndim != 2 or len(claimed) != len(positions):
            raise UsageError(
                f"{reference.id} claims ids of shape {claimed.shape} at {counted(len(positions), f'{phase} position')}",
                "give one row of ids for each position",
            )
        _check_ids(claimed, vocab_size, f"the claimed {phase} ids of {reference.id}")


def phase_request(forcing: Forcing, phase: str) -> tuple[Array, Array]:
    """(positions (M,), claimed ids (M, K)) of a phase; empty if the forcing says nothing about it."""
    none = np.zeros(0, np.int32), np.zeros((0, 0), np.int32)
    positions = dict(forcing.positions).get(phase, none[0])  # type: ignore[call-overload]
    claimed = dict(forcing.claimed_ids).get(phase, none[1])  # type: ignore[call-overload]
    return positions, claimed


def _check_ids(ids: Array, vocab_size: int, what: str) -> None:
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if len(outside):
        raise UsageError(
            f"token id {int(outside[0])} in {what} is outside the vocabulary", f"ids are below {vocab_size}"
        )
