"""Sessions over real gRPC: what comes of one, what is said meanwhile and logged, and that nothing stays behind."""

from __future__ import annotations

import logging
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from prover_world import MODELS, PLAN, Runner, until_free
from rpc_world import NONCE, PROVER_KEY
from service_world import Leave, is_serving

from fpforensics.common.environment import describe_environment
from fpforensics.common.errors import (
    LimitError,
    NondeterminismError,
    UnavailableError,
    UsageError,
)
from fpforensics.common.keys import Keyring
from fpforensics.common.serving import RunningServer
from fpforensics.prover.client import ProverClient
from fpforensics.prover.service import SERVICE, ProverConfig, serve_prover
from fpforensics.verifier.intake import open_bundle


def test_it_says_who_it_is(client: ProverClient) -> None:
    said = client.describe()
    assert said.keyid == PROVER_KEY.keyid
    assert said.public_key_pem == PROVER_KEY.public.pem().decode()
    assert said.models == MODELS
    assert said.environment == describe_environment()


def test_a_session_ends_in_a_bundle_that_the_intake_accepts(
    client: ProverClient, runner: Runner, scratch: Path, tmp_path: Path
) -> None:
    seen: list[tuple[str, int, int]] = []
    output = tmp_path / "fetched.msgpack"
    digest = client.run_session(PLAN, output, report=lambda *progress: seen.append(progress))
    assert output.stat().st_size > 4 << 20
    with open_bundle(output, Keyring([PROVER_KEY.public]), expected_nonce=NONCE) as bundle:
        bundle.verify_all()
        assert bundle.digest == digest
        assert [row.config for row in bundle.evidence.rows] == list(PLAN.configs)
    assert seen == [("repetition 1 of 1", 1, 1)]
    assert runner.plans == [PLAN]
    assert list(scratch.iterdir()) == []
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["fetched.msgpack"]


def test_one_session_at_a_time_and_the_next_after_it(client: ProverClient, runner: Runner, tmp_path: Path) -> None:
    runner.hold = True
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.run_session, PLAN, tmp_path / "first")
        assert runner.holding.wait(60)
        with pytest.raises(LimitError, match="already under way"):
            client.run_session(PLAN, tmp_path / "second")
        runner.hold = False
        first.result(timeout=30)
    client.run_session(PLAN, tmp_path / "third")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["first", "third"]


def test_a_session_that_is_quiet_for_long_repeats_its_progress(
    config: ProverConfig, runner: Runner, tmp_path: Path
) -> None:
    runner.hold = True
    seen: list[tuple[str, int, int]] = []

    def saw(stage: str, done: int, total: int) -> None:
        seen.append((stage, done, total))
        runner.hold = len(seen) < 4

    with (
        serve_prover(replace(config, heartbeat_seconds=0.01)) as server,
        ProverClient(f"127.0.0.1:{server.port}") as client,
    ):
        client.run_session(PLAN, tmp_path / "fetched", report=saw)
    assert set(seen[:4]) <= {("repetition 1 of 1", 1, 1), ("session under way", 0, 0)}
    assert seen[3] == ("repetition 1 of 1", 1, 1)


def test_each_session_is_logged_in_one_line(
    config: ProverConfig, runner: Runner, scratch: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="fpforensics")
    texts = (("report", "a secret prompt"),)
    plan = msgspec.structs.replace(PLAN, texts=texts, instruction="a secret instruction")
    with serve_prover(config) as server, ProverClient(f"127.0.0.1:{server.port}") as client:
        digest = client.run_session(plan, tmp_path / "done")
        with pytest.raises(UsageError):
            client.run_session(msgspec.structs.replace(PLAN, repetitions=1000), tmp_path / "refused")
        runner.hold, runner.holding = True, threading.Event()

        def leave(*_: object) -> None:
            raise Leave

        with pytest.raises(Leave):
            client.run_session(PLAN, tmp_path / "left", report=leave)
        assert runner.cancelled.wait(60)
        runner.hold = False
        until_free(client, tmp_path / "after")
        runner.hold, runner.holding = True, threading.Event()
        with ThreadPoolExecutor(1) as pool:
            last = pool.submit(client.run_session, PLAN, tmp_path / "aborted")
            assert runner.holding.wait(60)
            server.stop()
            assert isinstance(last.exception(timeout=60), UnavailableError)
    lines = [line for line in caplog.messages if line.startswith("session ") and "already under way" not in line]
    done, refused, left, after, aborted = lines
    assert re.fullmatch(
        r"session peer=127\.0\.0\.1:\d+ configs=attn=eager outcome=done model=smollm2-135m references=4 new_tokens=32 "
        rf"bundle={digest} seconds=\d+\.\d",
        done,
    )
    assert 'outcome=refused error="UsageError: repetitions 1000"' in refused
    assert "outcome=cancelled" in left
    assert "outcome=done" in after
    assert "outcome=aborted" in aborted
    assert "the prover is stopping" in aborted
    assert not any("secret" in line or NONCE in line for line in lines)


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (NondeterminismError("repetition 2 differs", "find the cause"), NondeterminismError),
        (RuntimeError("CUDA exploded at /home/secret"), UnavailableError),
    ],
)
def test_a_failed_session_says_why_and_leaves_nothing(
    server: RunningServer,
    client: ProverClient,
    runner: Runner,
    scratch: Path,
    tmp_path: Path,
    raised: Exception,
    expected: type[Exception],
) -> None:
    runner.error = raised
    with pytest.raises(expected) as caught:
        client.run_session(PLAN, tmp_path / "failed")
    assert "secret" not in str(caught.value)
    assert list(scratch.iterdir()) == []
    assert not (tmp_path / "failed").exists()
    runner.error = None
    client.run_session(PLAN, tmp_path / "good")
    assert is_serving(server, SERVICE)
