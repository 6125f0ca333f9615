"""The exact lane: on the prover's own machine the test is equality, and another kind of device cannot pass it honestly."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
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
from fpforensics.common.engines.base import Engine, EngineFacts, EngineStarter, Host
from fpforensics.common.engines.remote import start_engine
from fpforensics.common.evidence import Evidence
from fpforensics.common.keys import Keyring, PrivateKey
from fpforensics.common.signals import CapturePlan, Phase, Sampling, Trace
from fpforensics.prover.session import SessionPlan, run_session
from fpforensics.verifier.check import CheckPlan, CheckResult, check_bundle
from fpforensics.verifier.intake import open_bundle
from fpforensics.verifier.report import caveats

KEY = PrivateKey.from_seed(b"a test's key, nobody's secret :)")
Forge = Callable[[Evidence], Evidence]
Place = tuple[int, Phase]


@pytest.fixture(scope="module")
def host(tiny_llama: Path, tiny_llama_other: Path) -> Host:
    models = {"tiny": str(tiny_llama), "other": str(tiny_llama_other)}
    return Host(device="cpu", models=models, env={"OMP_NUM_THREADS": "1"})


def session(path: Path, host: Host, *specs: str, start: EngineStarter = in_process) -> Path:
    """An honest session of these configs."""
    plan = SessionPlan(
        configs=tuple(parse_config(spec, ExecutionConfig(model="tiny")) for spec in specs),
        references=2,
        prompt_tokens=48,
        capture=CapturePlan(layers=("1", "2", "4"), prefill_positions=4, top_k=4),
        sampling=Sampling(max_new_tokens=4),
        repetitions=2,
    )
    run_session(plan, host, KEY, path, start=start)
    return path


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory, host: Host) -> Path:
    return session(tmp_path_factory.mktemp("exact") / "honest.msgpack", host, "")


@pytest.fixture(scope="module")
def two_rows(tmp_path_factory: pytest.TempPathFactory, host: Host) -> Path:
    return session(tmp_path_factory.mktemp("exact") / "two.msgpack", host, "attn=sdpa", "attn=eager")


def forged(
    honest: Path,
    path: Path,
    trace_of: Callable[[Trace], Trace] = lambda t: t,
    forge: Forge = lambda e: e,
    number: int = 0,
) -> Path:
    """The honest bundle with other numbers in one of its rows or another statement about them, signed again."""
    with open_bundle(honest, Keyring([KEY.public])) as bundle, BundleWriter(path) as writer:
        entries = tuple(writer.add_reference(reference) for reference in bundle.references())
        rows = []
        for index, row in enumerate(bundle.evidence.rows):
            traces = [bundle.trace(row, entry.id) for entry in entries]
            changed = [trace_of(trace) for trace in traces] if index == number else traces
            rows.append(msgspec.structs.replace(row, traces=tuple(map(writer.add_trace, changed))))
        writer.finish(forge(msgspec.structs.replace(bundle.evidence, references=entries, rows=tuple(rows))), KEY)
    return path


def one_bit(
    trace: Trace, index: int = 5, references: Collection[str] = ("ref_1",), at: int = 1, phase: Phase = "decode"
) -> Trace:
    """The last bit of one number of one hidden state, of position ``at`` of its phase."""
    if trace.reference_id not in references:
        return trace
    held = trace.phase(phase)
    rows = held.hidden_states["2"].copy()
    rows.view(np.uint16)[at, index] ^= 1
    changed = replace(held, hidden_states={**held.hidden_states, "2": rows})
    return replace(trace, prefill=changed) if phase == "prefill" else replace(trace, decode=changed)


def on_a_gpu(evidence: Evidence) -> Evidence:
    (row,) = evidence.rows
    facts = msgspec.structs.replace(row.facts, device="cuda", gpu="NVIDIA H100 80GB HBM3")
    return msgspec.structs.replace(evidence, rows=(msgspec.structs.replace(row, facts=facts),))


def on_another_cpu(evidence: Evidence) -> Evidence:
    return msgspec.structs.replace(evidence, environment=msgspec.structs.replace(evidence.environment, cpu="Other CPU"))


def on_more_threads(evidence: Evidence) -> Evidence:
    (row,) = evidence.rows
    facts = msgspec.structs.replace(row.facts, numerics=row.facts.numerics | {"threads": "99"})
    return msgspec.structs.replace(evidence, rows=(msgspec.structs.replace(row, facts=facts),))


LINEUP = CheckPlan(claim="quant=none", lineup=("quant=bnb-nf4",))
PLAIN = CheckPlan(lineup=("quant=bnb-nf4",))
BOTH = ["ref_0", "ref_1"]


def check(path: Path, host: Host, start: EngineStarter = in_process, plan: CheckPlan = LINEUP) -> CheckResult:
    with open_bundle(path, Keyring([KEY.public])) as bundle:
        return check_bundle(bundle, plan, host, start=start)


class Slipping:
    """An engine whose replays come out right but for one bit: of replay N in the references ``slips[N]``, another bit each time."""

    def __init__(self, engine: Engine, slips: Mapping[int, Collection[str]], place: Place) -> None:
        self.config, self.replays, self._engine, self._slips, self._place = engine.config, 0, engine, slips, place

    def facts(self) -> EngineFacts:
        return self._engine.facts()

    def teacher_force(self, *arguments: Any) -> list[Trace]:
        self.replays += 1
        traces, slips = self._engine.teacher_force(*arguments), self._slips.get(self.replays, ())
        at, phase = self._place
        return [one_bit(trace, 10 + self.replays, slips, at, phase) for trace in traces]


class Slips:
    """Starts engines of which the first in bf16 without quantization ``slips``, and those like it after it as ``others`` says, all
    of them in one ``place`` and started by ``start``; the rest are as they are."""

    def __init__(
        self,
        slips: Mapping[int, Collection[str]],
        others: Mapping[int, Collection[str]] | None = None,
        place: Place = (1, "decode"),
        start: EngineStarter = in_process,
    ) -> None:
        self.slips, self.others, self.place, self.start = slips, others or {}, place, start
        self.started = list[Slipping]()

    @contextmanager
    def __call__(self, config: ExecutionConfig, host: Host, cancelled: Callable[[], bool]) -> Iterator[Any]:
        slips = (config.dtype, config.quantization) == ("bf16", "none")
        with (self.start if slips else in_process)(config, host, cancelled) as engine:
            if not slips:
                yield engine
            else:
                self.started.append(Slipping(engine, self.others if self.started else self.slips, self.place))
                yield self.started[-1]

    @property
    def replays(self) -> list[int]:
        return [engine.replays for engine in self.started]


def test_equal_evidence_is_consistent(honest: Path, host: Host) -> None:
    result = check(honest, host)
    assert result.verdict == "CONSISTENT"
    assert result.rows[0].reasons[0].startswith("bit-identical to ")
    assert result.rows[0].equality
    said = " ".join(caveats(result))
    assert "Where bits decided, no threshold took part" in said
    assert "no error rate is known" not in said


def test_one_bit_is_one_too_many_and_the_first_difference_is_named(honest: Path, host: Host, tmp_path: Path) -> None:
    result = check(forged(honest, tmp_path / "bit.msgpack", trace_of=one_bit), host)
    assert result.verdict == "INCONSISTENT"
    assert "this verifier's own hardware, software and kernels" in result.rows[0].reasons[0]
    with open_bundle(honest, Keyring([KEY.public])) as bundle:
        position = bundle.trace(bundle.evidence.rows[0], "ref_1").decode.positions[1]
    assert f"at ref_1, decode, position {position}, hidden_states/2: |Δ| = " in result.rows[0].reasons[1]


@pytest.mark.parametrize(
    ("slips", "replays"),
    [({}, 1), ({1: ["ref_1"]}, 2), ({1: ["ref_0"], 2: ["ref_1"]}, 2)],
    ids=["none", "the first", "each in another reference"],
)
def test_a_replay_that_misses_is_made_again_before_anybody_is_accused(
    honest: Path, host: Host, slips: dict[int, list[str]], replays: int
) -> None:
    start = Slips(slips)
    result = check(honest, host, start)
    assert result.verdict == "CONSISTENT"
    assert result.rows[0].equality
    assert start.replays == [replays]
    said = [reason for reason in result.rows[0].reasons if reason.startswith("two replays of ")]
    assert len(said) == replays - 1  # that the first missed is no secret
    assert all(" here first differ at ref_" in reason for reason in said)


def test_where_two_replays_differ_bits_refute_nothing(honest: Path, host: Host) -> None:
    start = Slips({1: ["ref_1"], 2: ["ref_1"]})
    result = check(honest, host, start)
    assert result.verdict != "INCONSISTENT", result.rows[0].reasons
    assert not result.rows[0].equality
    (said,) = [reason for reason in result.rows[0].reasons if "equality" in reason]
    assert said.startswith(
        "equality would decide, but for two replays here, which first differ at ref_1, decode, position "
    )
    assert start.replays == [2]


@pytest.mark.parametrize(
    "slips", [{}, {1: ["ref_0"], 2: ["ref_0"]}, {2: ["ref_0"]}], ids=["neither", "both", "the second"]
)
def test_one_bit_is_refuted_where_two_replays_agree_on_it(
    honest: Path, host: Host, tmp_path: Path, slips: dict[int, list[str]]
) -> None:
    """However unsteady another reference is."""
    start = Slips(slips)
    result = check(forged(honest, tmp_path / "bit.msgpack", trace_of=one_bit), host, start)
    assert result.verdict == "INCONSISTENT"
    assert start.replays == [2]


def test_a_change_before_the_first_slip_is_refuted(honest: Path, host: Host, tmp_path: Path) -> None:
    path = forged(honest, tmp_path / "early.msgpack", trace_of=lambda trace: one_bit(trace, at=0))
    start = Slips({1: ["ref_1"], 2: ["ref_1"]})
    assert check(path, host, start).verdict == "INCONSISTENT"


def test_each_row_is_settled_by_its_own_replays(two_rows: Path, host: Host) -> None:
    """Each engine replays both rows: the first slips at its own, the second at its own, and each is made again once."""
    start = Slips({1: ["ref_1"]}, {2: ["ref_0"]})
    result = check(two_rows, host, start, PLAIN)
    assert [row.verdict for row in result.rows] == ["CONSISTENT", "CONSISTENT"], result.rows
    assert all(row.equality for row in result.rows)
    assert start.replays == [3, 3]
    for row, reference in zip(result.rows, ("ref_1", "ref_0"), strict=True):
        (said,) = [reason for reason in row.reasons if reason.startswith("two replays of ")]
        assert f" here first differ at {reference}, decode" in said


@pytest.mark.parametrize("number", [0, 1])
def test_a_row_that_lies_is_refuted_beside_one_whose_replays_differ(
    two_rows: Path, host: Host, tmp_path: Path, number: int
) -> None:
    path = forged(two_rows, tmp_path / "bit.msgpack", trace_of=one_bit, number=number)
    unsteady: list[dict[int, list[str]]] = [{1: ["ref_1"], 2: ["ref_1"]}, {2: ["ref_1"], 3: ["ref_1"]}]
    start = Slips({}, unsteady[1]) if number == 0 else Slips(unsteady[0])
    rows = check(path, host, start, PLAIN).rows
    liar, other = rows[number], rows[1 - number]
    assert liar.verdict == "INCONSISTENT"
    assert "at ref_1, decode, position " in liar.reasons[1]
    assert not any("two replays" in reason for reason in liar.reasons)
    assert other.verdict != "INCONSISTENT", other.reasons
    assert any(
        reason.startswith("equality would decide, but for two replays here, which first differ at ref_1, decode")
        for reason in other.reasons
    )
    assert start.replays == [3, 3]


def test_a_worker_replays_again(host: Host, tmp_path: Path) -> None:
    """In a process of its own: one worker replays twice, and says in between what ran."""
    path = session(tmp_path / "worker.msgpack", host, "", start=start_engine)
    start = Slips({1: ["ref_1"]}, start=start_engine)
    result = check(path, host, start)
    assert (result.verdict, start.replays) == ("CONSISTENT", [2])
    assert result.rows[0].equality
    assert any(" here first differ at ref_1, decode" in reason for reason in result.rows[0].reasons)


@pytest.mark.parametrize(
    ("slips", "replays"),
    [({1: BOTH, 2: BOTH}, [2, 2]), ({}, [2, 1])],
    ids=["the claimed config is unsteady", "it is steady"],
)
def test_a_rival_is_replayed_again_where_the_claimed_config_is_unsteady(
    host: Host, tmp_path: Path, slips: dict[int, list[str]], replays: list[int]
) -> None:
    """The evidence is of another model, whose first replay misses: only a second one finds its bits."""
    path = session(tmp_path / "other.msgpack", host, "model=other")
    start = Slips(slips, {1: ["ref_0"]}, place=(0, "prefill"))
    result = check(path, host, start, CheckPlan(claim="model=tiny", lineup=("model=other",)))
    assert start.replays == replays
    assert result.verdict == "INCONSISTENT"
    said = result.rows[0].reasons[0]
    if slips:
        assert said.startswith("bit-identical to ") and said.endswith(", contradicting the claim")
    else:
        assert "this verifier's own hardware, software and kernels" in said


def test_another_machine_is_replayed_once(honest: Path, host: Host, tmp_path: Path) -> None:
    path = forged(honest, tmp_path / "other.msgpack", trace_of=one_bit, forge=on_another_cpu)
    start = Slips({})
    assert not check(path, host, start).rows[0].equality
    assert start.replays == [1]


def test_another_machine_is_not_held_to_equality(honest: Path, host: Host, tmp_path: Path) -> None:
    path = forged(honest, tmp_path / "other.msgpack", trace_of=one_bit, forge=on_another_cpu)
    result = check(path, host)
    assert result.verdict != "INCONSISTENT", result.rows[0].reasons
    assert "hardware, software and kernels" not in str(result.rows[0].reasons)
    assert "equality would decide" not in str(result.rows[0].reasons)
    assert not result.rows[0].equality


def test_what_alone_keeps_equality_from_deciding_is_named(honest: Path, host: Host, tmp_path: Path) -> None:
    result = check(forged(honest, tmp_path / "threads.msgpack", trace_of=one_bit, forge=on_more_threads), host)
    assert result.verdict != "INCONSISTENT", result.rows[0].reasons
    (said,) = [reason for reason in result.rows[0].reasons if "equality" in reason]
    assert said.startswith("equality would decide, but for threads: 99 there, ")


def test_a_gpu_that_rounds_like_this_cpu_is_too_good(honest: Path, host: Host, tmp_path: Path) -> None:
    result = check(forged(honest, tmp_path / "gpu.msgpack", forge=on_a_gpu), host)
    assert result.verdict == "INCONSISTENT"
    assert "the bundle states NVIDIA H100 80GB HBM3: too good" in result.rows[0].reasons[0]
