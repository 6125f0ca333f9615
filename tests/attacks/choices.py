"""Lies in what is shown: which layers, positions, ids, prompts and tokens the verifier gets to see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import msgspec
import numpy as np

from attacks.attack import NOT_CONSISTENT, Attack, How, as_it_is
from attacks.material import Material
from attacks.numbers import AS_EAGER, UNTOLD, in_decode, in_references, noise_scaled, rounded, taking, under_eagers_name
from attacks.shown import (
    EARLY_LAYERS,
    VOCABULARY,
    Shown,
    at_positions,
    changed,
    combined,
    early_distances,
    spliced,
    with_layers,
)
from fpforensics.common.signals import Array, Phase


def without_early_layers(first: How = as_it_is) -> How:
    return lambda material, other: with_layers(first(material, other), ("12", "last"))


def early_layers_only(material: Material, other: Shown) -> Shown:
    return with_layers(other, EARLY_LAYERS)


def without_layers(material: Material, other: Shown) -> Shown:
    return with_layers(other, ())


def as_float32(material: Material, other: Shown) -> Shown:
    """Numbers that bfloat16 cannot hold, under its name."""
    return other.of([changed(trace, lambda _phase, _name, array: array.astype(np.float32)) for trace in other.traces])


def with_plan(shown: Shown, prefill: int, decode: int) -> Shown:
    """The last positions only, as the bundle's own capture plan then says."""
    plan = msgspec.structs.replace(shown.capture, prefill_positions=prefill, decode_positions=decode)
    last = {"prefill": prefill, "decode": decode}
    return replace(at_positions(shown, lambda _, phase, positions: range(len(positions))[-last[phase] :]), capture=plan)


def lying_in_decode(shown: int) -> How:
    """Another config in decode, of which only the last ``shown`` positions are to be seen."""

    def how(material: Material, other: Shown) -> Shown:
        lie = taking(in_decode)(material, other)
        return at_positions(
            lie, lambda _, phase, positions: range(len(positions))[-shown if phase == "decode" else 0 :]
        )

    return how


def one_decode_position_planned(material: Material, other: Shown) -> Shown:
    return with_plan(taking(in_decode)(material, other), len(other.traces[0].prefill.positions), 1)


def no_decode_position(material: Material, other: Shown) -> Shown:
    return at_positions(other, lambda _, phase, positions: range(0 if phase == "decode" else len(positions)))


def hardly_shown(*numbers: int) -> How:
    """Some references at their last prompt position only."""

    def choose(number: int, phase: Phase, positions: Array) -> Sequence[int]:
        if number not in numbers:
            return range(len(positions))
        return [len(positions) - 1] if phase == "prefill" else []

    return lambda material, other: at_positions(in_references(*numbers)(material, other), choose)


def two_positions_each(material: Material, other: Shown) -> Shown:
    return with_plan(other, 1, 1)


def repeated(times: int) -> How:
    """The same few positions of the same few prompts, under many names."""
    return lambda material, other: two_positions_each(material, other).only(*list(range(len(other.traces))) * times)


def picked(count: int) -> How:
    """Eager's name, and the ``count`` positions of each prompt at which the numbers happen to lie nearest to eager's replay."""

    def how(material: Material, other: Shown) -> Shown:
        sdpa, eager = material.replay(""), material.replay("attn=eager")
        floors = early_distances(eager, material.replay("dtype=fp32"))
        to_sdpa, to_eager = ((early_distances(other, each) / floors).mean(axis=1) for each in (sdpa, eager))
        best = np.argsort(to_eager / to_sdpa, axis=1)[:, :count]  # (references, count)

        def choose(number: int, phase: Phase, positions: Array) -> Sequence[int]:
            first = 0 if phase == "prefill" else len(other.traces[number].prefill.positions)
            return [row for row in range(len(positions)) if first + row in best[number]]

        return at_positions(under_eagers_name(material, other), choose)

    return how


def logprobs_at_ids_of_choice(material: Material, other: Shown) -> Shown:
    """Vectors of ``other``, log-probabilities of eight-bit weights at twenty ids drawn by lot, where little is at stake."""
    rng = np.random.default_rng(0)

    def drawn(_: Phase, name: str, array: Array) -> Array:
        if name != "logprob_ids":
            return np.zeros_like(array) if name == "logprobs" else array
        return np.array([rng.choice(VOCABULARY, array.shape[1], replace=False) for _ in array], np.int32)

    asked = other.of([changed(trace, drawn, every=True) for trace in other.traces])
    return spliced(asked, material.replay("quant=torchao-int8", asked), lambda _, name: name == "logprobs")


def tokens_of_another_request(material: Material, other: Shown) -> Shown:
    """For one request, what the claimed config computes when it is fed tokens that it did not choose, with an H100's noise."""
    mixed = material.with_foreign_tokens()
    return combined(
        lambda fed, evidence, own: fed + (evidence - own), material.replay("", mixed), other, material.replay("", other)
    )


def sampled_tokens_of_another_request(material: Material, other: Shown) -> Shown:
    """The same, from a session at temperature 1, in which any token could have come."""
    warm = msgspec.structs.replace(other.sampling, temperature=1.0)
    return replace(tokens_of_another_request(material, other), sampling=warm)


def at_every_other_position(material: Material, other: Shown) -> Shown:
    return at_positions(other, lambda _, phase, positions: range(phase == "decode", len(positions), 2))


CHOICES = (
    Attack(
        name="float32 under bfloat16's name",
        how=as_float32,
        other="sdpa",
        honest_how=as_it_is,
        caught=("REFUSED",),
    ),
    Attack(name="eight bits without early layers", how=without_early_layers(), other="int8", control=("INCONCLUSIVE",)),
    Attack(
        name="eager without early layers",
        how=without_early_layers(),
        other="eager",
        caught=NOT_CONSISTENT,
        control=("INCONCLUSIVE",),
    ),
    Attack(
        name="shrunk eight bits without early layers",
        how=without_early_layers(noise_scaled(0.5)),
        other="int8",
        caught=NOT_CONSISTENT,
        honest_how=without_early_layers(),
        control=("INCONCLUSIVE",),
        claim="quant=none",
        lineup=("quant=bnb-nf4",),
    ),
    Attack(
        name="the anchor without early layers",
        how=without_early_layers(rounded),
        other="anchor",
        caught=NOT_CONSISTENT,
        honest_how=without_early_layers(),
        control=("INCONCLUSIVE",),
        claim="quant=none",
        lineup=("quant=bnb-nf4",),
    ),
    Attack(name="eight bits without layers", how=without_layers, other="int8", control=("INCONCLUSIVE",)),
    Attack(
        name="eight bits from block 21 on, early layers only",
        how=early_layers_only,
        other="hybrid",
        beyond="of the late layers only log-probabilities are left: 1.9 floors, where honest ones have up to 1.8",
    ),
    Attack(
        name="eight bits in decode, one position shown",
        how=lying_in_decode(1),
        other="int8",
        honest_how=as_it_is,
        caught=("REFUSED",),
    ),
    Attack(
        name="eight bits in decode, one position planned",
        how=one_decode_position_planned,
        other="int8",
        caught=NOT_CONSISTENT,
    ),
    Attack(
        name="eager in decode, one position planned",
        how=one_decode_position_planned,
        other="eager",
        beyond="a handful of positions does not tell near kernels apart",
    ),
    Attack(
        name="no decode position shown",
        how=no_decode_position,
        other="sdpa",
        honest_how=as_it_is,
        caught=("REFUSED",),
    ),
    Attack(
        name="eight bits for one request hardly shown",
        how=hardly_shown(0),
        other="int8",
        honest_how=as_it_is,
        caught=("REFUSED",),
    ),
    Attack(
        name="honest numbers at positions of choice",
        how=at_every_other_position,
        other="sdpa",
        honest_how=as_it_is,
        caught=("REFUSED",),
    ),
    Attack(
        name="sdpa under eager's name at picked positions",
        how=picked(4),
        other="sdpa",
        honest_how=under_eagers_name,
        honest="eager",
        caught=("REFUSED",),
        control=UNTOLD,
        claim=AS_EAGER,
        lineup=("attn=sdpa",),
    ),
    Attack(
        name="six positions under eighteen names",
        how=repeated(6),
        other="sdpa",
        honest_how=two_positions_each,
        caught=NOT_CONSISTENT,
        control=("INCONCLUSIVE",),
        claim="dtype=bf16",
        lineup=("dtype=fp32",),
    ),
    Attack(
        name="eight bits' logprobs at ids of choice",
        how=logprobs_at_ids_of_choice,
        other="sdpa",
        honest_how=as_it_is,
        caught=NOT_CONSISTENT,
    ),
    Attack(
        name="the tokens of another request",
        how=tokens_of_another_request,
        other="sdpa",
        honest_how=as_it_is,
        caught=("REFUSED",),
        lineup=("attn=eager",),
        careless=True,
    ),
    Attack(
        name="the tokens of another request, made the likeliest",
        how=tokens_of_another_request,
        other="sdpa",
        honest_how=as_it_is,
        caught=NOT_CONSISTENT,
        lineup=("attn=eager",),
    ),
    Attack(
        name="the tokens of another request, sampled it says",
        how=sampled_tokens_of_another_request,
        other="sdpa",
        honest_how=as_it_is,
        caught=("REFUSED",),
        lineup=("attn=eager",),
        careless=True,
    ),
    Attack(
        name="the tokens of another request, made what the seed draws",
        how=sampled_tokens_of_another_request,
        other="sdpa",
        honest_how=as_it_is,
        caught=NOT_CONSISTENT,
        lineup=("attn=eager",),
    ),
)
