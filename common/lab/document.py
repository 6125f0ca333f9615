"""The document as it is written: typed down to the arrays of numbers, which stay undecoded bytes.

Metadata and configurations stay bytes too, until their size is known: untyped values cost many times their text.
What the types cannot say (ids that refer to each other, layouts that must agree) is said here too.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, UnsetType

from fpforensics.common.errors import did_you_mean, shorten
from fpforensics.common.lab.run import Place, Ranked, RunSignals, Vectors
from fpforensics.common.signals import Signal
from fpforensics.common.words import counted

DEFAULT_REFERENCE = "ref_0"
MAX_CONFIGURATIONS = 1024
"""Each is compared with each."""
MAX_TOKEN_BYTES = 64 << 20
"""Of all runs' token_ids together: they are held as long as the document is, in several times their text's memory."""

TokenId = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Count = TokenId
Name = Annotated[str, msgspec.Meta(min_length=1)]


class TopDoc(msgspec.Struct):
    """The listed tokens of one position."""

    token_ids: msgspec.Raw
    log_probs: msgspec.Raw


class SignalsDoc(msgspec.Struct):
    """What one step measured: by signal, layer and position."""

    hidden_states: dict[str, dict[str, msgspec.Raw]] = {}
    key_vectors: dict[str, dict[str, msgspec.Raw]] = {}
    logprobs: dict[str, TopDoc] = {}


class StepDoc(SignalsDoc, kw_only=True):
    """A decode step."""

    step: Count
    token_id: TokenId | UnsetType = UNSET


class RepetitionsDoc(msgspec.Struct):
    """How often a run was made, where only the last one is stored."""

    count: Annotated[int, msgspec.Meta(ge=1)]
    bit_identical: bool


class RunDoc(msgspec.Struct, kw_only=True):
    """One run."""

    config_id: Name
    rep_id: Count
    ref_id: Name = DEFAULT_REFERENCE
    prompt_sha256: str = ""
    token_ids: msgspec.Raw | UnsetType = UNSET
    repetitions: RepetitionsDoc | UnsetType = UNSET
    prefill: SignalsDoc | UnsetType = UNSET
    decode_steps: list[StepDoc]


class Document(msgspec.Struct):
    """A whole experiment; unknown fields are ignored."""

    experiment_metadata: msgspec.Raw
    configurations: msgspec.Raw
    runs: list[RunDoc]


def misfit(configurations: Sequence[dict[str, Any]], runs: Sequence[RunDoc]) -> str:
    """What is wrong between configurations and runs, or nothing: ids unknown or given twice, steps out of order, too many tokens."""
    known: dict[str, int] = {}
    if len(configurations) > MAX_CONFIGURATIONS:
        return f"configurations: {len(configurations)} of them, at most {MAX_CONFIGURATIONS} are compared"
    for index, configuration in enumerate(configurations):
        name = configuration["config_id"]
        if name in known:
            return f"configurations[{index}].config_id: {shorten(name)!r} is configurations[{known[name]}] already"
        known[name] = index
    if not runs:
        return "runs: an empty list"
    if sum(memoryview(run.token_ids).nbytes for run in runs if run.token_ids is not UNSET) > MAX_TOKEN_BYTES:
        return f"runs: more than {MAX_TOKEN_BYTES} bytes of token_ids"
    seen: dict[tuple[str, str, int], int] = {}
    for index, run in enumerate(runs):
        if run.config_id not in known:
            hint = did_you_mean(run.config_id, list(known)[:8])
            return f"runs[{index}].config_id: {shorten(run.config_id)!r} is no configuration, {hint}"
        key = (run.config_id, run.ref_id, run.rep_id)
        if key in seen:
            what = f"{shorten(run.config_id)}, {shorten(run.ref_id)}, repetition {run.rep_id}"
            return f"runs[{index}]: {what} is runs[{seen[key]}] already"
        seen[key] = index
        steps = [step.step for step in run.decode_steps]
        for place, (one, next_one) in enumerate(pairwise(steps), start=1):
            if next_one <= one:
                return f"runs[{index}].decode_steps[{place}].step: {next_one} after {one}"
    return ""


def unlike(first: RunSignals, run: RunSignals, where: str, there: str) -> str:
    """How the layout of ``run`` differs from that of ``first``, or nothing."""
    names = dict.fromkeys(name for signals in (first, run) for name in _names(signals))
    for name in names:
        ours, theirs = _find(run, name), _find(first, name)
        if ours is None or theirs is None:
            return f"{where}.{name}: {'missing' if ours is None else 'given'}, unlike in {there}"
        if isinstance(ours, Vectors) and isinstance(theirs, Vectors) and ours.values.shape[1] != theirs.values.shape[1]:
            return f"{where}.{name}: {counted(ours.values.shape[1], 'value')}, {theirs.values.shape[1]} in {there}"
        # Up to where the shorter one ends: after tokens diverged, a run may stop at another step.
        steps = min(ours.places[-1][0], theirs.places[-1][0])
        here, other = ([place for place in each.places if place[0] <= steps] for each in (ours, theirs))
        if here != other:
            return f"{where}.{name}: positions {_positions(here)}, {_positions(other)} in {there}"
    return ""


def _names(signals: RunSignals) -> list[str]:
    names = [f"{signal}.{layer}" for signal, layer in signals.vectors]
    return names if signals.logprobs is None else [*names, "logprobs"]


def _find(signals: RunSignals, name: str) -> Ranked | Vectors | None:
    if name == "logprobs":
        return signals.logprobs
    signal, _, layer = name.partition(".")
    kind: Signal = "hidden_states" if signal == "hidden_states" else "key_vectors"
    return signals.vectors.get((kind, layer))


def _positions(places: list[Place]) -> str:
    shown = ", ".join(str(position) for position in dict.fromkeys(position for _, position in places))
    return f"{shown} ({len(places)} in all)"
