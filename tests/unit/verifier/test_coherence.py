"""Evidence that contradicts itself is refused before any replay; real evidence does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from fpforensics.common.errors import EvidenceError
from fpforensics.common.evidence import Row
from fpforensics.common.keys import Keyring
from fpforensics.common.signals import PhaseTrace, Trace
from fpforensics.verifier.coherence import require_coherent
from fpforensics.verifier.intake import VerifiedBundle, open_bundle

H100 = Path(__file__).parents[2] / "assets" / "h100"
Change = Callable[[PhaseTrace], PhaseTrace]


class Shown:
    """A real bundle, one phase of whose first trace was changed."""

    def __init__(self, bundle: VerifiedBundle, change: Change, phase: str = "decode") -> None:
        self.evidence, self._bundle, self._change, self._phase = bundle.evidence, bundle, change, phase

    def references(self) -> object:
        return self._bundle.references()

    def trace(self, row: Row, reference_id: str) -> Trace:
        trace = self._bundle.trace(row, reference_id)
        return replace(trace, **{self._phase: self._change(getattr(trace, self._phase))})


@pytest.mark.parametrize(("name", "key"), [("sdpa-eager", "prover"), ("lineup", "lineup")])
def test_what_an_h100_recorded_is_coherent(name: str, key: str) -> None:
    with open_bundle(H100 / f"{name}.msgpack", Keyring.from_paths([H100 / f"{key}.key.pub"])) as bundle:
        require_coherent(bundle, bundle.evidence.rows)


def wider(held: PhaseTrace) -> PhaseTrace:
    return replace(held, hidden_states={layer: rows.astype(np.float32) for layer, rows in held.hidden_states.items()})


def shorter(held: PhaseTrace) -> PhaseTrace:
    return PhaseTrace.from_tensors({name: rows[:-1] for name, rows in held.tensors().items()})


def elsewhere(held: PhaseTrace) -> PhaseTrace:
    return replace(held, positions=held.positions - 1)


def twice(held: PhaseTrace) -> PhaseTrace:
    ids = held.logprob_ids.copy()
    ids[0, 1] = ids[0, 0]
    return replace(held, logprob_ids=ids)


def unlikely(held: PhaseTrace) -> PhaseTrace:
    return replace(held, logprobs=held.logprobs - 12, chosen_logprobs=held.chosen_logprobs - 12)


def certain(held: PhaseTrace) -> PhaseTrace:
    return replace(held, logprobs=np.zeros_like(held.logprobs))


def surer(held: PhaseTrace) -> PhaseTrace:
    return replace(held, chosen_logprobs=np.zeros_like(held.chosen_logprobs))


def second(held: PhaseTrace) -> PhaseTrace:
    """Another token is said to be the likeliest one: the ids of the first two are exchanged."""
    ids = held.logprob_ids.copy()
    ids[:, [0, 1]] = ids[:, [1, 0]]
    return replace(held, logprob_ids=ids, chosen_logprobs=held.logprobs[:, 1].copy())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (wider, "hidden_states/1 is stored in f32, the row declares dtype=bf16"),
        (shorter, "the capture plan says"),
        (elsewhere, "the capture plan says"),
        (twice, "a token is listed twice"),
        (unlikely, "are not the highest of a distribution"),
        (certain, "are not the highest of a distribution"),
        (surer, "follows at 0, where the list"),
        (second, r"\(greedy\)"),
    ],
)
def test_what_contradicts_itself_is_refused(change: Change, said: str) -> None:
    with open_bundle(H100 / "sdpa-eager.msgpack", Keyring.from_paths([H100 / "prover.key.pub"])) as bundle:
        shown = Shown(bundle, change)
        with pytest.raises(EvidenceError, match=said) as refused:
            require_coherent(shown, bundle.evidence.rows)  # type: ignore[arg-type]
    assert refused.value.message.startswith("row attn=sdpa,dtype=bf16, ref_0, decode")


def test_sampling_may_choose_another_than_the_likeliest_where_the_seed_draws_it() -> None:
    with open_bundle(H100 / "sdpa-eager.msgpack", Keyring.from_paths([H100 / "prover.key.pub"])) as bundle:
        shown = Shown(bundle, lambda held: held)
        sampling = msgspec.structs.replace(bundle.evidence.sampling, temperature=1.0)
        shown.evidence = msgspec.structs.replace(bundle.evidence, sampling=sampling)
        with pytest.raises(EvidenceError, match=r"follows, but seed 0 draws token \d+ before it at temperature 1$"):
            require_coherent(shown, bundle.evidence.rows)  # type: ignore[arg-type]
