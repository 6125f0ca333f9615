"""A prover whose repetitions differ: its own noise refutes nothing by itself, vouches for nothing, and hides no other config."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from fpforensics.common.bundle import BundleWriter
from fpforensics.common.config import ExecutionConfig, parse_config
from fpforensics.common.engines import in_process
from fpforensics.common.engines.base import Engine, EngineFacts, Host
from fpforensics.common.errors import NondeterminismError
from fpforensics.common.keys import Keyring, PrivateKey
from fpforensics.common.signals import Array, CapturePlan, PhaseTrace, Sampling, Trace
from fpforensics.prover.session import SessionPlan, run_session
from fpforensics.verifier.check import CheckPlan, check_bundle
from fpforensics.verifier.decision import RowVerdict
from fpforensics.verifier.intake import open_bundle

KEY = PrivateKey.from_seed(b"a test's key, nobody's secret :)")
SIZE = 0.02
"""Of a row's length: just above what bf16's rounding explains in this model's early layers (0.04 is twice that, and refuted)."""


class Noisy:
    """An engine whose sums come in another order each time, as with atomics. ``says`` is what it says it runs."""

    def __init__(self, engine: Engine, says: Engine) -> None:
        self.config, self._engine, self._says = says.config, engine, says
        self._rng = np.random.default_rng(7)

    def facts(self) -> EngineFacts:
        return self._says.facts()

    def generate(self, *arguments: Any) -> list[Trace]:
        if self._says is not self._engine:
            self._says.generate(*arguments)
        return [self._shaken(trace) for trace in self._engine.generate(*arguments)]

    def _shaken(self, trace: Trace) -> Trace:
        return replace(trace, prefill=self._phase(trace.prefill), decode=self._phase(trace.decode))

    def _phase(self, phase: PhaseTrace) -> PhaseTrace:
        return replace(
            phase,
            hidden_states={layer: self._rows(rows) for layer, rows in phase.hidden_states.items()},
            key_vectors={layer: self._rows(rows) for layer, rows in phase.key_vectors.items()},
        )

    def _rows(self, rows: Array) -> Array:
        wide = rows.astype(np.float64)
        lengths = np.linalg.norm(wide, axis=1, keepdims=True)
        noise = self._rng.standard_normal(wide.shape) * lengths / np.sqrt(wide.shape[1])
        return (wide + SIZE * noise).astype(rows.dtype)


@pytest.fixture(scope="module")
def host(tiny_llama: Path) -> Host:
    return Host(device="cpu", models={"tiny": str(tiny_llama)})


def session(path: Path, host: Host, ran: str = "", *, allow: bool = True) -> Path:
    """A session under bf16 that really runs ``ran``, with noise."""
    config = parse_config("", ExecutionConfig(model="tiny"))

    @contextmanager
    def start(_config: ExecutionConfig, host: Host, cancelled: Callable[[], bool]) -> Iterator[Any]:
        with (
            in_process(config, host, cancelled) as says,
            in_process(parse_config(ran, config), host, cancelled) as real,
        ):
            yield Noisy(real if ran else says, says)

    plan = SessionPlan(
        configs=(config,),
        references=3,
        prompt_tokens=48,
        capture=CapturePlan(layers=("1", "2", "4"), prefill_positions=8, top_k=8),
        sampling=Sampling(max_new_tokens=8),
        repetitions=3,
        allow_nondeterminism=allow,
    )
    run_session(plan, host, KEY, path, start=start)
    return path


@pytest.fixture(scope="module")
def honest(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return session(tmp_path_factory.mktemp("honest") / "bundle", host)


def check(path: Path, host: Host) -> RowVerdict:
    plan = CheckPlan(claim="quant=none", lineup=("quant=bnb-nf4",))
    with open_bundle(path, Keyring([KEY.public])) as bundle:
        (row,) = check_bundle(bundle, plan, host, start=in_process).rows
        return row


def test_the_gate_finds_it(host: Host, tmp_path: Path) -> None:
    with pytest.raises(NondeterminismError, match="repetition 2 differs from the first at ref_0, prefill"):
        session(tmp_path / "never", host, allow=False)
    assert not (tmp_path / "never").exists()


def test_own_noise_alone_refutes_nothing(honest: Path, host: Host) -> None:
    row = check(honest, host)
    assert row.verdict == "INCONCLUSIVE", row.reasons
    assert "the prover's own repetitions differed from ref_0, prefill, position" in row.reasons[0]
    assert "noise floors, at " in row.reasons[0] and row.reasons[0].endswith("(believed up to 2): not held to equality")
    assert "further than honest evidence is" in row.reasons[2]  # without it, this would have been the verdict


def test_without_the_statement_it_would_be_refuted(honest: Path, host: Host, tmp_path: Path) -> None:
    """The control: the same numbers, said to repeat in every bit."""
    with open_bundle(honest, Keyring([KEY.public])) as bundle, BundleWriter(tmp_path / "bundle") as writer:
        entries = tuple(writer.add_reference(reference) for reference in bundle.references())
        (row,) = bundle.evidence.rows
        traces = tuple(writer.add_trace(bundle.trace(row, entry.id)) for entry in entries)
        said = msgspec.structs.replace(row.repetitions, bit_identical=True)
        row = msgspec.structs.replace(row, traces=traces, repetitions=said)
        writer.finish(msgspec.structs.replace(bundle.evidence, references=entries, rows=(row,)), KEY)
    assert check(tmp_path / "bundle", host).verdict == "INCONSISTENT"


def test_own_noise_hides_no_other_config(host: Host, tmp_path: Path) -> None:
    row = check(session(tmp_path / "bundle", host, "quant=bnb-nf4"), host)
    assert row.verdict == "INCONSISTENT"
    assert "quant=bnb-nf4, which contradicts the claim, fits better" in row.reasons[1]
    assert "the prover's own repetitions differed" in row.reasons[-1]
