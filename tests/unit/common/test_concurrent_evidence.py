"""What ran beside each repetition travels in the signed manifest, is held to its rules, and cannot be changed afterwards."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from assets.generate import FOLDER, GOLDEN
from fake_engine import WORK, FakeEngine, fake_checkpoint
from synthetic import TEST_KEY, write_synthetic

from fpforensics.common.bundle_file import BundleFile
from fpforensics.common.config import parse_config
from fpforensics.common.engines.base import ConcurrentWork, EngineFacts, Host
from fpforensics.common.errors import EvidenceError, SignatureError
from fpforensics.common.evidence import Evidence
from fpforensics.common.inspect import summarize
from fpforensics.common.inspect_text import render_text
from fpforensics.common.keys import Keyring
from fpforensics.common.manifest import decode_statement, encode_statement
from fpforensics.common.signals import CapturePlan, Sampling
from fpforensics.common.strict import Limits
from fpforensics.prover.session import SessionPlan, run_session
from fpforensics.verifier.intake import open_bundle

KEYRING = Keyring([TEST_KEY.public])
ENTRIES = [WORK, msgspec.structs.replace(WORK, kind="cuda-stream", size=8192, dtype="bf16", overlap=0.512, busy=0.512)]


def stating(entries: list[ConcurrentWork], concurrent: bool = True) -> Callable[[Evidence], Evidence]:
    """Evidence whose one row, of two repetitions, states ``entries``."""

    def change(evidence: Evidence) -> Evidence:
        (row,) = evidence.rows
        facts = msgspec.structs.replace(row.facts, concurrent_work=entries)
        config = msgspec.structs.replace(row.config, concurrent_work=concurrent)
        return msgspec.structs.replace(evidence, rows=(msgspec.structs.replace(row, facts=facts, config=config),))

    return change


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "b.msgpack"
    write_synthetic(path, change=stating(ENTRIES))
    with open_bundle(path, KEYRING) as bundle:
        bundle.verify_all()
        assert bundle.evidence.rows[0].facts.concurrent_work == ENTRIES
    text = render_text(summarize(path))
    assert "products of 8² in fp32, in 1 thread; overlap 75%, 51%" in text


def test_an_older_bundle_is_read_and_written_as_it_was() -> None:
    with BundleFile(FOLDER / GOLDEN) as file:
        payload = file.envelope.payload
    assert b"concurrent_work" in payload  # the config's key was always there
    statement = decode_statement(payload, Limits())
    assert all(row.facts.concurrent_work == [] for row in statement.predicate.rows)
    assert encode_statement(statement) == payload


def test_facts_without_work_are_written_as_they_were() -> None:
    assert EngineFacts.__struct_fields__[-1] == "concurrent_work"
    with BundleFile(FOLDER / GOLDEN) as file:
        facts = decode_statement(file.envelope.payload, Limits()).predicate.rows[0].facts
    assert list(msgspec.to_builtins(facts)) == list(EngineFacts.__struct_fields__[:-1])


@pytest.mark.parametrize(
    ("entries", "concurrent", "said"),
    [
        ([], True, "concurrent=true, 2 repetitions and 0 measurements"),
        (ENTRIES[:1], True, "concurrent=true, 2 repetitions and 1 measurement"),
        ([*ENTRIES, WORK], True, "2 repetitions and 3 measurements"),
        (ENTRIES, False, "concurrent=false, 2 repetitions and 2 measurements"),
        ([WORK, {"overlap": 0.29, "busy": 0.1}], True, "repetition 2, concurrent work, overlap: 0.29"),
        ([WORK, {"overlap": 1.01}], True, "overlap: 1.01"),
        ([WORK, {"busy": 0.9}], True, "busy: 0.9"),
        ([WORK, {"busy": 0.1}], True, "busy: 0.1"),  # one worker covers what it is busy for, and no more
        ([{"size": 0}, WORK], True, "repetition 1, concurrent work, size: 0"),
        ([{"workers": 0}, WORK], True, "workers: 0"),
        ([{"products": 0}, WORK], True, "products: 0"),
        ([{"seconds": -1.0}, WORK], True, "seconds: -1"),
        ([{"outside_seconds": -1.0}, WORK], True, "outside_seconds: -1"),
        ([{"dtype": "b" * 65}, WORK], True, "dtype 'bbb"),
    ],
)
def test_rules(tmp_path: Path, entries: list[Any], concurrent: bool, said: str) -> None:
    """The prover's writer refuses it, as the verifier's reader does: the rules are the same."""
    made = [msgspec.structs.replace(WORK, **each) if isinstance(each, dict) else each for each in entries]
    with pytest.raises(EvidenceError) as refused:
        write_synthetic(tmp_path / "b.msgpack", change=stating(made, concurrent))
    assert said in refused.value.message
    assert ("run the session again" in refused.value.hint) == (not entries)  # what provers before this rule left
    assert not (tmp_path / "b.msgpack").exists()


def test_a_recorded_overlap_cannot_be_raised(tmp_path: Path) -> None:
    path = tmp_path / "b.msgpack"
    write_synthetic(path, change=stating([WORK, msgspec.structs.replace(WORK, overlap=0.375, busy=0.375)]))
    data = path.read_bytes()
    assert data.count(b'"overlap":0.375') == 1
    path.write_bytes(data.replace(b'"overlap":0.375', b'"overlap":0.975'))
    with pytest.raises(SignatureError), open_bundle(path, KEYRING):
        pass


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """What of a checkpoint is read without torch."""
    return fake_checkpoint(tmp_path / "tiny")


def session(model: Path, output: Path, start: Any) -> None:
    plan = SessionPlan(
        configs=(parse_config("model=tiny"), parse_config("model=tiny,concurrent=true")),
        texts=(("text", "word " * 200),),
        references=1,
        prompt_tokens=16,
        capture=CapturePlan(layers=("1", "last"), prefill_positions=2, top_k=4),
        sampling=Sampling(max_new_tokens=3),
        repetitions=2,
    )
    run_session(plan, Host(models={"tiny": str(model)}), TEST_KEY, output, start=start)


def test_a_session_signs_what_ran_beside_each_repetition(model: Path, tmp_path: Path) -> None:
    session(model, tmp_path / "b.msgpack", lambda config, host, cancelled: nullcontext(FakeEngine(config, host)))
    with open_bundle(tmp_path / "b.msgpack", KEYRING) as bundle:
        alone, beside = bundle.evidence.rows
    assert beside.config_id == "concurrent=true"
    assert beside.facts.concurrent_work == [WORK, WORK]
    assert alone.facts.concurrent_work == []


def test_starting_and_ending_the_work_is_no_part_of_the_wall_time(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = iter(range(0, 1000, 100))  # each repetition takes 100 s by this clock
    monkeypatch.setattr("fpforensics.prover.session.time.perf_counter", lambda: float(next(ticks)))
    work = msgspec.structs.replace(WORK, outside_seconds=30.0)
    engine = partial(FakeEngine, work=work)
    session(model, tmp_path / "b.msgpack", lambda config, host, cancelled: nullcontext(engine(config, host)))
    with open_bundle(tmp_path / "b.msgpack", KEYRING) as bundle:
        alone, beside = bundle.evidence.rows
    assert alone.repetitions.wall_seconds == (100.0, 100.0)
    assert beside.repetitions.wall_seconds == (70.0, 70.0)
