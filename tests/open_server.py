"""A server that answers anyone who gets through, how to call it, and what it says of itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from fpforensics.common.access import Access, Connection, Listen
from fpforensics.common.rpc import translated
from fpforensics.common.serving import RunningServer, start_server
from fpforensics.proto import evidence_pb2 as pb
from fpforensics.proto import evidence_pb2_grpc

SERVICE = pb.DESCRIPTOR.services_by_name["Prover"].full_name


class Open(evidence_pb2_grpc.ProverServicer):
    """Answers anyone who gets through, and remembers what the call carried."""

    def __init__(self) -> None:
        self.metadata: list[dict[str, Any]] = []

    def Describe(self, request: Any, context: Any) -> pb.Description:  # noqa: N802
        self.metadata.append(dict(context.invocation_metadata()))
        return pb.Description(keyid="me")


def serve(listen: Listen, servicer: Open | None = None) -> RunningServer:
    add: Any = evidence_pb2_grpc.add_ProverServicer_to_server
    return start_server(listen, lambda server: add(servicer or Open(), server), SERVICE)


def describe(target: str, access: Access | None = None) -> str:
    with Connection(target, access) as connection, translated():
        stub: Any = evidence_pb2_grpc.ProverStub(connection.channel)  # type: ignore[no-untyped-call]
        return str(stub.Describe(pb.DescribeRequest(), timeout=60, metadata=connection.metadata).keyid)


def write_token(path: Path, token: str = "t" * 40, mode: int = 0o600) -> Path:
    path.write_text(token + "\n")
    path.chmod(mode)
    return path


def health_of(channel: grpc.Channel, service: str = "") -> int:
    stub = health_pb2_grpc.HealthStub(channel)
    return int(stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=60).status)


def listed_services(channel: grpc.Channel) -> list[str]:
    def ask() -> Iterator[reflection_pb2.ServerReflectionRequest]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")

    (answer,) = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(ask(), timeout=60)
    return [service.name for service in answer.list_services_response.service]
