"""The verifier as a process: killed, out of disk, stopped, started twice."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from rpc_world import (
    write_bundle,
)
from service_world import WIDE
from verifier_world import (
    VERIFIERS,
    header,
    kept,
    raw,
    upload,
)

from fpforensics.common.access import Listen
from fpforensics.common.config import ExecutionConfig
from fpforensics.common.errors import (
    LimitError,
    UnavailableError,
    UnknownModelError,
    UsageError,
)
from fpforensics.common.rpc import chunk_file
from fpforensics.common.serving import RunningServer
from fpforensics.proto import audit_pb2 as pb
from fpforensics.verifier.auditor import AuditorClient
from fpforensics.verifier.check import CheckPlan
from fpforensics.verifier.client import VerifierClient
from fpforensics.verifier.service import VerifierConfig, serve_verifier


def test_an_auditor_needs_no_torch() -> None:
    code = (
        "import sys; import fpforensics.verifier.auditor, fpforensics.verifier.client; "
        "sys.exit(bool({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# --- crashes and full disks: a real process, really killed ---


SERVE = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from rpc_world import PROVER_KEY, VERIFIER_KEY, quick_check
from fpforensics.common.keys import Keyring
from fpforensics.verifier.service import VerifierConfig, serve_verifier
if len(sys.argv) > 3:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
config = VerifierConfig(
    key=VERIFIER_KEY, keyring=Keyring([PROVER_KEY.public]), store=Path(sys.argv[2]), check=quick_check
)
server = serve_verifier(config)
server.wait(ready=lambda: print(server.port, flush=True))
print("stopped", flush=True)
"""


@contextmanager
def verifier_process(store: Path, *file_limit: int) -> Iterator[tuple[subprocess.Popen[str], int]]:
    tests = Path(__file__).resolve().parents[3]
    command = [sys.executable, "-c", SERVE, str(tests), str(store), *map(str, file_limit)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


def test_a_verifier_killed_in_mid_submit_forgets_the_half_and_keeps_the_whole(tmp_path: Path, bundle: Path) -> None:
    write_bundle(tmp_path / "large", seed=1, width=WIDE)
    sent, killed = threading.Event(), threading.Event()

    def half() -> Iterator[pb.SubmitRequest]:
        parts = list(upload((tmp_path / "large").read_bytes()))
        yield from parts[:3]
        sent.set()
        killed.wait(60)
        yield from parts[3:]

    with verifier_process(tmp_path / "store") as (process, port):
        with VerifierClient(f"127.0.0.1:{port}") as client:
            digest = client.submit_bundle(bundle).bundle_digest
            envelope = client.check(digest, CheckPlan())
        with raw(port) as stub:
            call = stub.SubmitBundle.future(half(), timeout=60)
            assert sent.wait(60)
            assert _spooled(tmp_path / "store")  # the half is really there when the process dies
            process.send_signal(signal.SIGKILL)
            process.wait(60)
            killed.set()
            assert isinstance(call.exception(timeout=30), grpc.RpcError)
    assert len(kept(tmp_path)) == 2

    with verifier_process(tmp_path / "store") as (_, port):
        assert kept(tmp_path) == [f"{digest[7:]}.msgpack"]
        with VerifierClient(f"127.0.0.1:{port}") as client, AuditorClient(f"127.0.0.1:{port}", VERIFIERS) as auditor:
            assert [verdict.envelope for verdict in auditor.list()] == [envelope]
            client.submit_bundle(tmp_path / "large")
            client.check(digest, CheckPlan())
            assert [verdict.predicate.sequence for verdict in auditor.list()] == [1, 2]


def _spooled(store: Path) -> bool:
    return any(
        any(path.is_file() and path.stat().st_size for path in (store / "spool").rglob("*"))
        or threading.Event().wait(0.02)
        for _ in range(500)
    )


def test_a_full_disk_is_said_and_survived(tmp_path: Path, bundle: Path) -> None:
    write_bundle(tmp_path / "large", width=WIDE)
    with verifier_process(tmp_path / "store", 1 << 20) as (_, port), VerifierClient(f"127.0.0.1:{port}") as client:
        with pytest.raises(LimitError, match="disk is full"):
            client.submit_bundle(tmp_path / "large")
        assert kept(tmp_path) == []
        client.submit_bundle(bundle)
        assert len(kept(tmp_path)) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_gracefully(tmp_path: Path, number: signal.Signals) -> None:
    with verifier_process(tmp_path / "store") as (process, port):
        with AuditorClient(f"127.0.0.1:{port}", VERIFIERS) as auditor, ThreadPoolExecutor(1) as pool:
            watcher = pool.submit(list, auditor.watch(timeout=60))
            assert list(auditor.list()) == []
            process.send_signal(number)
            with pytest.raises(UnavailableError):
                watcher.result(timeout=60)
        assert process.stdout is not None
        assert process.stdout.read() == "stopped\n"
        assert process.wait(60) == 0


def test_two_verifiers_do_not_share_a_store(config: VerifierConfig, server: RunningServer) -> None:
    with pytest.raises(UsageError, match="in use"):
        serve_verifier(config)


def test_a_refused_address_lets_go_of_the_store(config: VerifierConfig) -> None:
    with pytest.raises(UsageError, match="TLS"):
        serve_verifier(replace(config, listen=Listen(address="0.0.0.0:0")))
    serve_verifier(config).stop(grace=0)


def test_rows_of_any_held_model_are_taken_and_one_foreign_row_spoils_it(client: VerifierClient, tmp_path: Path) -> None:
    write_bundle(tmp_path / "good", configs=(ExecutionConfig(), ExecutionConfig(attention="eager")))
    client.submit_bundle(tmp_path / "good")
    write_bundle(
        tmp_path / "bad", configs=(ExecutionConfig(), ExecutionConfig(attention="eager", model="evil/weights"))
    )
    with pytest.raises(UnknownModelError):
        client.submit_bundle(tmp_path / "bad")


def test_a_stream_of_the_clients_own_chunks_is_what_the_server_takes(server: RunningServer, bundle: Path) -> None:
    content = bundle.read_bytes()
    parts = [header(content), *(pb.SubmitRequest(chunk=chunk) for chunk in chunk_file(bundle))]
    with raw(server.port) as stub:
        assert stub.SubmitBundle(iter(parts), timeout=30).bundle_digest.startswith("sha256:")
