"""Lies in the numbers: what is shown is not what the claimed config computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from attacks.attack import NOT_CONSISTENT, Attack, How, Outcome, as_it_is
from attacks.material import Material
from attacks.shown import EARLY_LAYERS, Shown, changed, combined, moved, spliced
from fpforensics.common.signals import Array, Phase, Trace

AS_EAGER = "attn=eager,quant=none"
UNTOLD: tuple[Outcome, ...] = ("CONSISTENT", "INCONCLUSIVE")
"""The anchor, which attends as sdpa does, contradicts a claim of eager, and takes more positions than these to be rejected."""


def under_eagers_name(material: Material, other: Shown) -> Shown:
    return replace(other, config=material.eager.config)


def noise_scaled(factor: float) -> How:
    """The distance to the float32 anchor shrunk or stretched: less of the lie, or noise to imitate another config's."""

    def how(material: Material, other: Shown) -> Shown:
        return combined(lambda e, anchor: anchor + factor * (e - anchor), other, material.replay("dtype=fp32"))

    return how


def toward_the_replay(share: float) -> How:
    """Moved toward what the verifier itself will compute for the claimed config: a liar that did compute it."""
    return lambda material, other: moved(other, material.replay(""), share)


def averaged(share: float) -> How:
    """Honest evidence with a ``share`` of another config's."""
    return lambda material, other: moved(material.sdpa, other, share)


def rounded(material: Material, other: Shown) -> Shown:
    """In the dtype that the claimed config leaves."""
    return combined(lambda _, numbers: numbers, material.sdpa, other)


def with_noise(size: float) -> How:
    """Rounded, and as noisy as the claimed config's replay times ``size``, but with noise of its own."""

    def how(material: Material, other: Shown) -> Shown:
        rng = np.random.default_rng(0)

        def noisy(_: Array, anchor: Array, replayed: Array) -> Array:
            deviation = np.sqrt(np.mean((replayed - anchor) ** 2)) if anchor.size else 0.0
            return anchor + size * deviation * rng.standard_normal(anchor.shape)

        return combined(noisy, material.sdpa, other, material.replay(""))

    return how


def but_for_one_tensor(material: Material, other: Shown) -> Shown:
    """Not equal to the replay, but only because one late tensor is an H100's."""
    return spliced(other, material.sdpa, lambda phase, name: (phase, name) == ("decode", "hidden_states/last"))


def said_to_be_noise(material: Material, other: Shown) -> Shown:
    """With the statement that its own repetitions lie further apart than any two configs."""
    return replace(other, noise=1e6)


def taking(takes: Callable[[Phase, str], bool]) -> How:
    """Honest evidence that takes some tensors from another config."""
    return lambda material, other: spliced(material.sdpa, other, takes)


def early(_: Phase, name: str) -> bool:
    return name.partition("/")[2] in EARLY_LAYERS


def late(phase: Phase, name: str) -> bool:
    return not early(phase, name)


def logprobs(_: Phase, name: str) -> bool:
    return "logprobs" in name


def vectors(phase: Phase, name: str) -> bool:
    return not logprobs(phase, name)


def hidden(_: Phase, name: str) -> bool:
    return name.startswith("hidden_states")


def in_decode(phase: Phase, _: str) -> bool:
    return phase == "decode"


def in_prefill(phase: Phase, _: str) -> bool:
    return phase == "prefill"


def false_chosen_logprobs(material: Material, other: Shown) -> Shown:
    """Every generated token was certain, it says."""
    traces = [
        changed(trace, lambda _, name, array: 0 * array if name == "chosen_logprobs" else array)
        for trace in other.traces
    ]
    return other.of(traces)


def in_references(*numbers: int) -> How:
    """Another config for some requests."""

    def how(material: Material, other: Shown) -> Shown:
        pairs = zip(material.sdpa.traces, other.traces, strict=True)
        return material.sdpa.of([lie if i in numbers else honest for i, (honest, lie) in enumerate(pairs)])

    return how


def in_decode_of(number: int) -> How:
    """Another config when one request's tokens are generated."""
    return lambda material, other: in_references(number)(material, taking(in_decode)(material, other))


def at_one_position(place: int, *, every_other: bool = False) -> How:
    """Another config at one of the fifteen shown positions of each reference, or at all but one."""

    def one(honest: Trace, lie: Trace) -> Trace:
        def change(phase: Phase, name: str, array: Array) -> Array:
            first = 0 if phase == "prefill" else len(honest.prefill.positions)
            rows = (first + np.arange(len(array)) == place) != every_other
            return np.where(rows.reshape(-1, *[1] * (array.ndim - 1)), lie.phase(phase).tensors()[name], array)

        return changed(honest, change)

    return lambda material, other: material.sdpa.of(
        [one(honest, lie) for honest, lie in zip(material.sdpa.traces, other.traces, strict=True)]
    )


UNSCALED = noise_scaled(1)
COMPUTED = "it takes the claimed config's own numbers at every position: whoever has them need not lie"
DROWNED = "behind the first blocks every kernel looks alike"
POOLED = "a position is never looked at alone: the honest ones make up for it"
FEW = "a handful of positions does not tell near kernels apart"

NUMBERS = (
    Attack(name="eight-bit weights", how=as_it_is, other="int8"),
    Attack(name="four-bit weights", how=as_it_is, other="nf4"),
    Attack(name="eager under sdpa's name", how=as_it_is, other="eager"),
    Attack(
        name="sdpa under eager's name",
        how=under_eagers_name,
        other="sdpa",
        honest="eager",
        control=UNTOLD,
        claim=AS_EAGER,
        lineup=("attn=sdpa",),
    ),
    *(
        Attack(name=f"noise times {factor:g}", how=noise_scaled(factor), other="sdpa", honest_how=UNSCALED)
        for factor in (0.25, 0.5, 2, 4)
    ),
    *(
        Attack(name=f"eight-bit noise times {factor:g}", how=noise_scaled(factor), other="int8", honest_how=as_it_is)
        for factor in (0.25, 0.5)
    ),
    Attack(name="eager, a quarter of the way to sdpa", how=toward_the_replay(0.25), other="eager", honest_how=as_it_is),
    Attack(
        name="eager, three quarters of the way to sdpa",
        how=toward_the_replay(0.75),
        other="eager",
        caught=NOT_CONSISTENT,
        honest_how=as_it_is,
    ),
    Attack(name="eight bits, half way to sdpa", how=toward_the_replay(0.5), other="int8", honest_how=as_it_is),
    Attack(
        name="eight bits, three quarters of the way to sdpa",
        how=toward_the_replay(0.75),
        other="int8",
        beyond=COMPUTED,
        honest_how=as_it_is,
    ),
    Attack(name="the anchor, rounded", how=rounded, other="anchor"),
    Attack(name="the anchor, unrounded", how=as_it_is, other="anchor", caught=("REFUSED",)),
    Attack(name="the anchor with a tenth of the noise", how=with_noise(0.1), other="anchor", honest_how=as_it_is),
    Attack(name="the anchor with all of the noise", how=with_noise(1), other="anchor", honest_how=as_it_is),
    Attack(name="the verifier's own replay", how=as_it_is, other="replay", careless=True),
    Attack(name="the replay, log-probabilities made to fit", how=as_it_is, other="replay", caught=NOT_CONSISTENT),
    Attack(name="the replay but for one tensor", how=but_for_one_tensor, other="replay", caught=NOT_CONSISTENT),
    Attack(
        name="three quarters of the way to the replay",
        how=toward_the_replay(0.75),
        other="sdpa",
        caught=NOT_CONSISTENT,
        honest_how=as_it_is,
    ),
    Attack(
        name="a quarter of the way to the replay",
        how=toward_the_replay(0.25),
        other="sdpa",
        beyond=COMPUTED,
        honest_how=as_it_is,
    ),
    Attack(name="sdpa and eager averaged", how=averaged(0.5), other="eager", caught=NOT_CONSISTENT),
    Attack(name="sdpa and eight bits averaged", how=averaged(0.5), other="int8"),
    Attack(name="sdpa with a tenth of eight bits", how=averaged(0.1), other="int8", beyond=COMPUTED),
    Attack(name="four bits behind honest early layers", how=taking(late), other="nf4"),
    Attack(name="eager behind honest early layers", how=taking(late), other="eager", beyond=DROWNED),
    Attack(
        name="eight bits from block 21 on",
        how=as_it_is,
        other="hybrid",
        caught=NOT_CONSISTENT,
        missed="late layers have limits of their own, but one for all cells: 2.0 of 2.2 floors, where honest vectors have 1.4",
    ),
    Attack(name="honest layers behind eight bits", how=taking(early), other="int8"),
    Attack(name="honest layers behind eager", how=taking(early), other="eager"),
    Attack(name="eight bits with sdpa's logprobs", how=taking(vectors), other="int8"),
    Attack(name="eager with sdpa's logprobs", how=taking(vectors), other="eager"),
    Attack(name="eager's hidden states beside sdpa's keys", how=taking(hidden), other="eager", caught=NOT_CONSISTENT),
    Attack(name="four bits' logprobs", how=taking(logprobs), other="nf4"),
    Attack(name="eager's logprobs", how=taking(logprobs), other="eager", beyond=DROWNED),
    Attack(
        name="false logprobs of the generated tokens",
        how=false_chosen_logprobs,
        other="sdpa",
        honest_how=as_it_is,
        caught=("REFUSED",),
        careless=True,
    ),
    Attack(name="eight bits in decode", how=taking(in_decode), other="int8"),
    Attack(name="eight bits in prefill", how=taking(in_prefill), other="int8"),
    Attack(name="eager in prefill", how=taking(in_prefill), other="eager"),
    Attack(name="eager in decode", how=taking(in_decode), other="eager", caught=NOT_CONSISTENT),
    Attack(name="eager in decode of one request of three", how=in_decode_of(0), other="eager", beyond=FEW),
    Attack(
        name="eight bits in decode of one request of three", how=in_decode_of(0), other="int8", caught=NOT_CONSISTENT
    ),
    Attack(name="eight-bit weights, said to be noise", how=said_to_be_noise, other="int8"),
    Attack(name="four-bit weights, said to be noise", how=said_to_be_noise, other="nf4"),
    Attack(name="eager under sdpa's name, said to be noise", how=said_to_be_noise, other="eager"),
    Attack(name="eight bits for one request of three", how=in_references(0), other="int8"),
    Attack(name="eager for two requests of three", how=in_references(0, 1), other="eager"),
    Attack(
        name="eager for one request of three",
        how=in_references(0),
        other="eager",
        caught=NOT_CONSISTENT,
    ),
    Attack(name="four bits at one position of fifteen", how=at_one_position(5), other="nf4"),
    Attack(
        name="eight bits at one position of fifteen",
        how=at_one_position(5),
        other="int8",
        caught=NOT_CONSISTENT,
        missed=POOLED,
    ),
    Attack(name="eight bits at all positions but one", how=at_one_position(5, every_other=True), other="int8"),
    Attack(name="eager at all positions but one", how=at_one_position(5, every_other=True), other="eager"),
)
