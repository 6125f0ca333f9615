"""Start and stop a gRPC server: health, reflection, the token gate, limits, and a graceful end on SIGTERM or SIGINT."""

from __future__ import annotations

import errno
import hmac
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from fpforensics.common.access import (
    MAX_REQUEST_BYTES,
    MAX_RESPONSE_BYTES,
    Listen,
    read_token,
    require_guard,
    server_credentials,
    split_address,
)
from fpforensics.common.errors import UsageError, shorten
from fpforensics.common.rpc import ErrorBoundary

MAX_RPCS = 64
GRACE_SECONDS = 5.0
MIN_PING_MS = 10_000
"""The shortest time between a client's pings on a quiet call; who pings more often is cut off (see ``KEEPALIVE_MS``)."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_STOP = b"\0"
_ENDS = {_STOP, *(bytes([number]) for number in _SIGNALS)}
_OWN = "give an address of this machine"
_PORT_REFUSED = {
    errno.EADDRINUSE: "stop what listens there, or choose another port",
    errno.EACCES: "choose a port from 1024",
}


class RunningServer:
    """A server that answers already. ``port`` is the one it really has."""

    def __init__(
        self,
        server: Any,
        port: int,
        workers: ThreadPoolExecutor,
        health_service: Any,
        on_stopping: Callable[[], None],
        on_stopped: Callable[[], None],
    ) -> None:
        self.port = port
        self._server, self._workers, self._health = server, workers, health_service
        self._on_stopping, self._on_stopped = on_stopping, on_stopped
        self._lock = threading.Lock()
        self._stopped = False
        # A pipe, because a signal must wake the waiting thread even if it comes just before that thread falls asleep.
        self._asleep, self._waker = os.pipe()
        os.set_blocking(self._waker, False)

    def wait(
        self,
        grace: float = GRACE_SECONDS,
        *,
        ready: Callable[[], None] = lambda: None,
        stopping: Callable[[], None] = lambda: None,
    ) -> None:
        """Serve until SIGTERM, SIGINT or :meth:`stop`, then call ``stopping`` and stop. ``ready`` is called as soon as
        signals are heard. A second signal does what it did before.
        """
        with _signals_wake(self._waker):
            ready()
            while os.read(self._asleep, 1) not in _ENDS:
                pass  # another signal, which others handle
        stopping()
        self.stop(grace)

    def stop(self, grace: float = GRACE_SECONDS) -> None:
        """Take no more calls, give those under way ``grace`` seconds, cancel the rest, free everything."""
        with self._lock:
            if self._stopped:
                return
            self._health.enter_graceful_shutdown()
            self._on_stopping()
            self._server.stop(grace).wait()
            self._workers.shutdown(wait=True)
            self._on_stopped()
            self._stopped = True
            os.write(self._waker, _STOP)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(grace=0)


def start_server(
    listen: Listen,
    register: Callable[[Any], None],
    service: str,
    *,
    on_stopping: Callable[[], None] = lambda: None,
    on_stopped: Callable[[], None] = lambda: None,
) -> RunningServer:
    """Start a server with health and reflection beside the service that ``register`` adds.

    ``on_stopping`` is called when it takes no more calls, ``on_stopped`` after the last handler has ended. Raises
    :class:`UsageError` if the address is open to others without TLS and authentication, or cannot be bound.
    """
    require_guard(listen)
    health_service = health.HealthServicer()
    interceptors: list[Any] = [ErrorBoundary()]
    if listen.token_file is not None:
        interceptors.insert(0, _TokenGate(read_token(listen.token_file), health_service))
    credentials = server_credentials(listen)
    _require_free(listen.address)
    workers = ThreadPoolExecutor(MAX_RPCS, thread_name_prefix="rpc")
    server = grpc.server(workers, interceptors=interceptors, options=_options(), maximum_concurrent_rpcs=MAX_RPCS)
    register(server)
    health_pb2_grpc.add_HealthServicer_to_server(health_service, server)
    reflection.enable_server_reflection((service, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    try:
        if credentials is None:
            port = server.add_insecure_port(listen.address)
        else:
            port = server.add_secure_port(listen.address, credentials)
    except RuntimeError:
        port = 0
    if port == 0:
        way_out = "choose another address" if credentials is None else "is a TLS file damaged, or are they no pair?"
        raise UsageError(f"cannot listen on {shorten(listen.address)}", way_out)
    server.start()
    for name in ("", service):
        health_service.set(name, health_pb2.HealthCheckResponse.SERVING)
    return RunningServer(server, port, workers, health_service, on_stopping, on_stopped)


def _options() -> tuple[tuple[str, int], ...]:
    return (
        ("grpc.so_reuseport", 0),  # a port in use is an error, not a port to share
        ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
        ("grpc.max_send_message_length", MAX_RESPONSE_BYTES),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        # GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, whose value has no "recv"; an unknown key is ignored.
        ("grpc.http2.min_ping_interval_without_data_ms", MIN_PING_MS),
    )


def _require_free(address: str) -> None:
    """Raise :class:`UsageError` if ``address`` cannot be bound, before gRPC tries and prints what it found."""
    host, port = split_address(address)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError:
        raise UsageError(f"cannot listen on {shorten(address)}: no such host", _OWN) from None
    refusals: list[int] = []
    for family, kind, protocol, _, where in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC: closed connections do not count
                probe.bind(where)
        except OSError as error:
            refusals.append(error.errno or 0)
    # localhost is two addresses: one that this machine lacks does no harm, one that is taken would be shared.
    if errno.EADDRINUSE in refusals or len(refusals) == len(found):
        number = errno.EADDRINUSE if errno.EADDRINUSE in refusals else refusals[0]
        said = os.strerror(number).lower()
        raise UsageError(f"cannot listen on {shorten(address)}: {said}", _PORT_REFUSED.get(number, _OWN))


class _TokenGate(grpc.ServerInterceptor):
    """Refuses every call without the token; only health checks are answered, and then for the whole server.

    Neither waits for a request to arrive: who has no token must not hold a thread by sending nothing.
    """

    def __init__(self, token: str, health_service: Any) -> None:
        self._expected = f"Bearer {token}".encode()
        self._health = health_service

    def intercept_service(self, continuation: Callable[..., Any], details: Any) -> Any:
        """Answer UNAUTHENTICATED in the handler's place unless the call carries the token."""
        given = dict(details.invocation_metadata).get("authorization", "")
        raw = given if isinstance(given, bytes) else given.encode("utf-8", "replace")
        if hmac.compare_digest(raw, self._expected):
            return continuation(details)
        if details.method == f"/{health.SERVICE_NAME}/Check":
            encode = health_pb2.HealthCheckResponse.SerializeToString
            return grpc.stream_unary_rpc_method_handler(self._check_health, response_serializer=encode)
        return grpc.stream_unary_rpc_method_handler(_refuse)

    def _check_health(self, _requests: Any, context: grpc.ServicerContext) -> Any:
        return self._health.Check(health_pb2.HealthCheckRequest(), context)


def _refuse(_requests: Any, context: grpc.ServicerContext) -> None:
    context.abort(grpc.StatusCode.UNAUTHENTICATED, "no valid token")


@contextmanager
def _signals_wake(waker: int) -> Iterator[None]:
    """Every signal that Python handles writes its number to ``waker`` inside this block, SIGTERM and SIGINT do no more
    than that, where this thread may say so (the main thread).
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.set_wakeup_fd(waker)
    handlers = {number: signal.signal(number, _only_wake) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before)


def _only_wake(_number: int, _frame: FrameType | None) -> None:
    """What is to be done is done by whoever reads the pipe."""
