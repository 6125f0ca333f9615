"""What a server does whoever calls: health and reflection, its port, quiet calls, and how it stops."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from open_server import SERVICE, describe, health_of, listed_services, serve
from service_world import open_channel

from fpforensics.common import access, serving
from fpforensics.common.access import Connection, Listen
from fpforensics.common.errors import UnavailableError, UsageError
from fpforensics.common.rpc import translated
from fpforensics.common.serving import start_server
from fpforensics.proto import evidence_pb2 as pb
from fpforensics.proto import evidence_pb2_grpc


def test_health_can_be_watched() -> None:
    with (
        serve(Listen()) as server,
        open_channel(server.port) as channel,
    ):
        watching = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE), timeout=60)
        assert next(watching).status == health_pb2.HealthCheckResponse.SERVING
        watching.cancel()


def test_health_and_reflection_are_on() -> None:
    with (
        serve(Listen()) as server,
        open_channel(server.port) as channel,
    ):
        assert health_of(channel) == health_of(channel, SERVICE) == health_pb2.HealthCheckResponse.SERVING
        assert SERVICE in listed_services(channel)


def test_a_port_in_use_is_an_error_and_not_shared() -> None:
    with (
        serve(Listen()) as server,
        pytest.raises(UsageError, match=r"cannot listen on .*: address already in use") as caught,
    ):
        serve(Listen(address=f"127.0.0.1:{server.port}"))
    assert "another port" in caught.value.hint
    serve(Listen(address=f"127.0.0.1:{server.port}")).stop(grace=0)  # at once: what was closed is not in use


def test_a_port_in_use_is_one_line_on_stderr(tmp_path: Path) -> None:
    """gRPC's C core prints lines of its own, past Python."""
    command = Path(sys.executable).parent / "prover"
    subprocess.run([command, "keygen", tmp_path / "key"], check=True, capture_output=True)
    with serve(Listen()) as server:
        done = subprocess.run(
            [command, "serve", "--key", tmp_path / "key", "--listen", f"127.0.0.1:{server.port}"],
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot listen on ")
    assert done.stderr.count("\n") == 1


class Quiet(evidence_pb2_grpc.ProverServicer):
    """Says nothing until it is let go or the call is over."""

    def __init__(self) -> None:
        self.over = threading.Event()

    def RunSession(self, request: Any, context: Any) -> Iterator[pb.SessionEvent]:  # noqa: N802
        context.add_callback(self.over.set)
        assert self.over.wait(60)
        yield pb.SessionEvent(progress=pb.Progress(stage="still here"))


def listen_quietly(target: str) -> list[str]:
    with Connection(target) as connection, translated():
        stub: Any = evidence_pb2_grpc.ProverStub(connection.channel)  # type: ignore[no-untyped-call]
        return [event.progress.stage for event in stub.RunSession(pb.SessionRequest(), timeout=60)]


def test_a_quiet_call_outlives_its_clients_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two servers get the same pings. The one that allows them answers; the one that does not has cut its client off."""
    assert serving.MIN_PING_MS < access.KEEPALIVE_MS
    monkeypatch.setattr(access, "KEEPALIVE_MS", 100)
    patient, strict = Quiet(), Quiet()
    add: Any = evidence_pb2_grpc.add_ProverServicer_to_server
    with ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(serving, "MIN_PING_MS", 1)
        with start_server(Listen(), lambda it: add(patient, it), SERVICE) as server:
            answer = pool.submit(listen_quietly, f"127.0.0.1:{server.port}")
            monkeypatch.undo()
            monkeypatch.setattr(access, "KEEPALIVE_MS", 100)
            with (
                start_server(Listen(), lambda it: add(strict, it), SERVICE) as other,
                pytest.raises(UnavailableError, match=r"(?i)too many pings"),
            ):
                listen_quietly(f"127.0.0.1:{other.port}")
            assert not patient.over.wait(1.5)  # and one ping more, should it have been a little later
            patient.over.set()
            assert answer.result(timeout=60) == ["still here"]


def test_a_signal_is_heard_before_the_server_has_stopped() -> None:
    heard: list[str] = []
    with serve(Listen()) as server:
        target = f"127.0.0.1:{server.port}"
        timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM))
        timer.start()
        server.wait(stopping=lambda: heard.append(describe(target)))
    assert heard == ["me"]


WAITS = """
import signal, sys
sys.path.insert(0, sys.argv[1])
from open_server import serve
from fpforensics.common.access import Listen
server = serve(Listen())
signal.signal(signal.SIGUSR1, lambda *_: print("another", flush=True))
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
server.wait(ready=lambda: print(server.port, flush=True), stopping=lambda: print("stopping", flush=True))
"""


def test_a_signal_is_heard_if_another_thread_takes_it_and_another_signal_is_none_of_its_business() -> None:
    command = [sys.executable, "-c", WAITS, str(Path(__file__).resolve().parents[2])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            process.send_signal(signal.SIGUSR1)
            assert process.stdout.readline() == "another\n"
            process.send_signal(signal.SIGUSR1)
            assert process.stdout.readline() == "another\n"  # still serving, and not "stopping"
            assert describe(f"127.0.0.1:{port}") == "me"
            process.send_signal(signal.SIGTERM)
            assert process.stdout.readline() == "stopping\n"
            assert process.wait(60) == 0
        finally:
            process.kill()


def test_stopping_twice_does_no_harm() -> None:
    server = serve(Listen())
    server.stop(grace=0)
    server.stop(grace=0)
    server.wait()
    with pytest.raises(UnavailableError):
        describe(f"127.0.0.1:{server.port}")
