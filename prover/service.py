"""The prover over gRPC: anyone who may call it can run a session within limits, one at a time.

Nothing stays on disk: the bundle is written to a private folder, sent, and removed, however the call ends.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import grpc
import msgspec

from fpforensics.common.access import Listen
from fpforensics.common.config import DEFAULT_MODEL, ExecutionConfig, config_id
from fpforensics.common.engines.base import Host
from fpforensics.common.environment import describe_environment
from fpforensics.common.errors import UnavailableError
from fpforensics.common.journal import logged
from fpforensics.common.keys import PrivateKey
from fpforensics.common.lane import HEARTBEAT_SECONDS, WORK_SECONDS, Cancelled, Lane, Report, deadline
from fpforensics.common.rpc import chunk_file
from fpforensics.common.serving import RunningServer, start_server
from fpforensics.proto import evidence_pb2 as pb
from fpforensics.proto import evidence_pb2_grpc
from fpforensics.prover.session import SessionPlan, SessionProgress, run_session
from fpforensics.prover.wire import SessionLimits, plan_of

SERVICE = pb.DESCRIPTOR.services_by_name["Prover"].full_name


class SessionRunner(Protocol):
    """:func:`fpforensics.prover.session.run_session`, or what stands in for it."""

    def __call__(
        self,
        plan: SessionPlan,
        host: Host,
        key: PrivateKey,
        output: Path,
        progress: Callable[[SessionProgress], None] | None = None,
        cancelled: Callable[[], bool] = ...,
    ) -> str:
        """Write a signed bundle to ``output``; return its digest."""
        ...


@dataclass(frozen=True, kw_only=True)
class ProverConfig:
    """How to serve. ``models`` are the only ones that a session may name; ``scratch`` is where bundles are written
    first. A session may run for ``max_seconds``, then sending its bundle may last ``send_seconds``; what has nothing new to
    say for ``heartbeat_seconds`` repeats its progress.
    """

    key: PrivateKey
    listen: Listen = field(default_factory=Listen)
    host: Host = field(default_factory=Host)
    models: tuple[str, ...] = (DEFAULT_MODEL,)
    limits: SessionLimits = field(default_factory=SessionLimits)
    scratch: Path | None = None
    max_seconds: float = WORK_SECONDS
    send_seconds: float = 3600.0
    heartbeat_seconds: float = HEARTBEAT_SECONDS
    run: SessionRunner = run_session


def serve_prover(config: ProverConfig) -> RunningServer:
    """Start serving. Raises :class:`~fpforensics.common.errors.UsageError` if the address needs guarding or is taken."""
    servicer = ProverServicer(config)
    add: Any = evidence_pb2_grpc.add_ProverServicer_to_server
    return start_server(
        config.listen,
        lambda server: add(servicer, server),
        SERVICE,
        on_stopping=servicer.stop,
        on_stopped=servicer.close,
    )


class ProverServicer(evidence_pb2_grpc.ProverServicer):
    """The handlers; see proto/evidence.proto."""

    def __init__(self, config: ProverConfig) -> None:
        self._config = config
        self._lane = Lane("session", seconds=config.max_seconds, heartbeat=config.heartbeat_seconds)
        public = config.key.public
        self._description = pb.Description(
            public_key_pem=public.pem().decode(),
            keyid=public.keyid,
            tool_version=version("fpforensics"),
            models=config.models,
            environment=pb.Environment(**msgspec.structs.asdict(describe_environment())),
        )

    def stop(self) -> None:
        """End the session under way: its worker is killed, its caller told why."""
        self._lane.stop(UnavailableError("the prover is stopping", "run the session again when it serves"))

    def close(self) -> None:
        """Wait for the session under way to end."""
        self._lane.close()

    def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.Description:  # noqa: N802
        """Who this prover is."""
        return self._description

    def RunSession(  # noqa: N802
        self, request: pb.SessionRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.SessionEvent]:
        """Progress, then the bundle, then its end."""
        config = self._config
        asked = "; ".join(request.configs[: config.limits.configs])
        with logged("session", context, configs=asked) as entry, self._scratch() as folder:
            plan = plan_of(request, config.models, config.limits)
            entry.note(
                model=plan.configs[0].model,
                configs="; ".join(config_id(config, ExecutionConfig(model=config.model)) for config in plan.configs),
                references=plan.references,
                new_tokens=plan.sampling.max_new_tokens,
            )
            output = Path(folder) / "bundle.msgpack"

            def work(report: Report, cancelled: Cancelled) -> str:
                def progress(now: SessionProgress) -> None:
                    report(now.stage, now.done, now.total)

                return config.run(plan, config.host, config.key, output, progress, cancelled)

            digest = yield from self._lane.run(context, work, lambda now: pb.SessionEvent(progress=now))
            entry.note(bundle=digest)
            size, sha256 = 0, b""
            with deadline(context, config.send_seconds):
                for chunk in chunk_file(output):
                    size, sha256 = size + len(chunk.data), chunk.running_sha256
                    yield pb.SessionEvent(chunk=chunk)
                yield pb.SessionEvent(end=pb.BundleEnd(size=size, sha256=sha256, bundle_digest=digest))

    def _scratch(self) -> tempfile.TemporaryDirectory[str]:
        return tempfile.TemporaryDirectory(prefix="fpforensics-session-", dir=self._config.scratch)
