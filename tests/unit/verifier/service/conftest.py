"""A verifier that serves on loopback, with clients, and a good bundle."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rpc_world import (
    VERIFIER_KEY,
    write_bundle,
)
from verifier_world import (
    TRUSTED,
    VERIFIERS,
    Checker,
    Tampering,
)

from fpforensics.common.access import Listen
from fpforensics.common.serving import RunningServer, start_server
from fpforensics.proto import audit_pb2_grpc
from fpforensics.verifier.auditor import AuditorClient
from fpforensics.verifier.client import VerifierClient
from fpforensics.verifier.service import SERVICE, VerifierConfig, serve_verifier


@pytest.fixture
def checker() -> Checker:
    return Checker()


@pytest.fixture
def config(tmp_path: Path, checker: Checker) -> VerifierConfig:
    return VerifierConfig(key=VERIFIER_KEY, keyring=TRUSTED, store=tmp_path / "store", check=checker)


@pytest.fixture
def server(config: VerifierConfig) -> Iterator[RunningServer]:
    with serve_verifier(config) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[VerifierClient]:
    with VerifierClient(f"127.0.0.1:{server.port}") as connected:
        yield connected


@pytest.fixture
def auditor(server: RunningServer) -> Iterator[AuditorClient]:
    with AuditorClient(f"127.0.0.1:{server.port}", VERIFIERS) as connected:
        yield connected


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    write_bundle(tmp_path / "bundle.msgpack")
    return tmp_path / "bundle.msgpack"


@pytest.fixture(scope="module")
def tampering() -> Iterator[tuple[Tampering, AuditorClient]]:
    servicer = Tampering()
    add: Any = audit_pb2_grpc.add_VerifierServicer_to_server
    with (
        start_server(Listen(), lambda it: add(servicer, it), SERVICE) as server,
        AuditorClient(f"127.0.0.1:{server.port}", VERIFIERS) as auditor,
    ):
        yield servicer, auditor
