"""Sessions that end early: a caller leaves, a deadline passes, the server stops."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from prover_world import PLAN, Runner, until_free
from service_world import Leave, is_serving

from fpforensics.common.errors import (
    DeadlineError,
    UnavailableError,
)
from fpforensics.common.serving import RunningServer
from fpforensics.prover.client import ProverClient
from fpforensics.prover.service import SERVICE, ProverConfig, serve_prover


def test_a_caller_who_leaves_stops_the_work(
    server: RunningServer, client: ProverClient, runner: Runner, scratch: Path, tmp_path: Path
) -> None:
    runner.hold = True

    def leave(*_: object) -> None:
        raise Leave

    with pytest.raises(Leave):
        client.run_session(PLAN, tmp_path / "left", report=leave)
    assert runner.cancelled.wait(60)
    runner.hold = False
    until_free(client, tmp_path / "after")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["after"]
    assert list(scratch.iterdir()) == []
    assert is_serving(server, SERVICE)


def test_a_deadline_stops_the_work_too(client: ProverClient, runner: Runner, tmp_path: Path) -> None:
    runner.hold = True
    with pytest.raises(UnavailableError, match="deadline"):
        client.run_session(PLAN, tmp_path / "late", timeout=0.5)
    assert runner.cancelled.wait(60)


def test_a_stopping_server_cancels_its_session(server: RunningServer, runner: Runner, tmp_path: Path) -> None:
    runner.hold = True
    with ProverClient(f"127.0.0.1:{server.port}") as client, ThreadPoolExecutor(1) as pool:
        session = pool.submit(client.run_session, PLAN, tmp_path / "never")
        assert runner.holding.wait(60)
        server.stop(grace=60)  # which nobody waits for: the work is ended at once
        assert runner.cancelled.is_set()
        with pytest.raises(UnavailableError, match="the prover is stopping"):
            session.result(timeout=60)
    assert not (tmp_path / "never").exists()


def test_the_server_has_a_deadline_of_its_own(config: ProverConfig, runner: Runner, tmp_path: Path) -> None:
    runner.hold = True
    with serve_prover(replace(config, max_seconds=0.2)) as server, ProverClient(f"127.0.0.1:{server.port}") as client:
        for _ in range(2):  # the second finds the prover free
            with pytest.raises(DeadlineError, match=r"session stopped: it took more than the 0\.2 seconds"):
                client.run_session(PLAN, tmp_path / "late")
    assert runner.cancelled.is_set()
    assert len(runner.plans) == 2
    assert not (tmp_path / "late").exists()
