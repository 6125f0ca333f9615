"""A prover that serves on loopback, and a client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from prover_world import Runner
from rpc_world import PROVER_KEY

from fpforensics.common.serving import RunningServer
from fpforensics.prover.client import ProverClient
from fpforensics.prover.service import ProverConfig, serve_prover


@pytest.fixture
def runner() -> Runner:
    return Runner()


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


@pytest.fixture
def config(runner: Runner, scratch: Path) -> ProverConfig:
    return ProverConfig(key=PROVER_KEY, run=runner, scratch=scratch)


@pytest.fixture
def server(config: ProverConfig) -> Iterator[RunningServer]:
    with serve_prover(config) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[ProverClient]:
    with ProverClient(f"127.0.0.1:{server.port}") as connected:
        yield connected
