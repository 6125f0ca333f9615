"""What tests of both services share: work that can be held, chunks of an upload, plain channels, and health."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fpforensics.common.serving import RunningServer
from fpforensics.proto import evidence_pb2 as pb

WIDE = 400_000  # hidden states of several MiB: several chunks


class Leave(Exception):  # noqa: N818
    """The caller has had enough."""


class Held:
    """Stands where a model would run: can be told to fail or to hold."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.hold = False
        self.holding = threading.Event()
        self.cancelled = threading.Event()

    def is_cancelled(self, cancelled: Callable[[], bool]) -> bool:
        """Hold for as long as told; whether the caller left meanwhile."""
        self.holding.set()
        while self.hold:
            if cancelled():
                self.cancelled.set()
                return True
            threading.Event().wait(0.01)  # a model's next step
        return False


def open_channel(port: int) -> grpc.Channel:
    """To a server on loopback, past any proxy."""
    return grpc.insecure_channel(f"127.0.0.1:{port}", [("grpc.enable_http_proxy", 0)])


def is_serving(server: RunningServer, service: str) -> bool:
    with open_channel(server.port) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service), timeout=60)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def chunks_of(*pieces: bytes) -> Iterator[pb.Chunk]:
    """Chunks that hold these, each with the digest of all up to its end."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
        yield pb.Chunk(data=piece, running_sha256=digest.digest())
