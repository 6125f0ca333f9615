"""An engine in a worker process of its own: the same protocol, another address space.

Device memory is really freed when it closes, a crash costs one config, and another torch or CUDA is just
another interpreter (``Host.python``, which must have fpforensics installed).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from fpforensics.common.config import ExecutionConfig
from fpforensics.common.engines import wire
from fpforensics.common.engines.base import EngineFacts, Host, Progress, ReplayMode
from fpforensics.common.errors import CancelledError, Error, MissingDependencyError, ReplayError, shorten
from fpforensics.common.signals import CapturePlan, Forcing, Reference, Sampling, Trace

_KEPT_LINES = 50
_POLL_MILLISECONDS = 100
_CLOSE_SECONDS = 20.0  # vLLM gives its ranks two graces of about 4 seconds
_REAP_SECONDS = 5.0

Cancelled = Callable[[], bool]


def start_engine(config: ExecutionConfig, host: Host | None = None, cancelled: Cancelled | None = None) -> RemoteEngine:
    """Spawn a worker and load ``config`` in it. Use it as a context manager: leaving it ends the worker.

    ``cancelled`` is polled while anything runs; once true the worker is killed and :class:`CancelledError`
    raised. Everything that loading may raise is raised here, as by
    :func:`fpforensics.common.engines.open_engine`.
    """
    return RemoteEngine(config, host or Host(), cancelled or (lambda: False))


class RemoteEngine:
    """A running worker. ``config`` has its weights digest filled in."""

    config: ExecutionConfig

    def __init__(self, config: ExecutionConfig, host: Host, cancelled: Cancelled) -> None:
        self._cancelled = cancelled
        self._python = host.python or sys.executable
        self._channel, theirs = socket.socketpair()
        with theirs:
            self._process = _spawn(self._python, host, theirs.fileno())
        self._said: deque[str] = deque(maxlen=_KEPT_LINES)
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        try:
            loaded = self._ask(wire.Load(config, host))
        except Error:
            self.close()
            raise
        except BaseException:
            self._kill()
            raise
        assert isinstance(loaded, wire.Loaded)
        self.config = loaded.config

    @property
    def pid(self) -> int:
        """The worker's process id."""
        return self._process.pid

    def generate(
        self,
        references: Sequence[Reference],
        sampling: Sampling,
        capture: CapturePlan,
        progress: Progress | None = None,
    ) -> list[Trace]:
        """As :meth:`Engine.generate`."""
        return self._traces(wire.Generate(list(references), sampling, capture), progress)

    def teacher_force(
        self,
        forcings: Sequence[Forcing],
        capture: CapturePlan,
        mode: ReplayMode,
        progress: Progress | None = None,
    ) -> list[Trace]:
        """As :meth:`Engine.teacher_force`."""
        return self._traces(wire.TeacherForce(list(forcings), capture, mode), progress)

    def facts(self) -> EngineFacts:
        """As :meth:`Engine.facts`."""
        reply = self._ask(wire.GetFacts())
        assert isinstance(reply, wire.Facts)
        return reply.facts

    def close(self) -> None:
        """Ask the worker to end and wait for it; what has not ended in time is killed. May be called twice.

        Asked, not killed: ranks and their helpers remove their shared memory only when they end by themselves.
        """
        if self._process.returncode is not None and self._channel.fileno() < 0:
            return
        until = time.monotonic() + _CLOSE_SECONDS
        try:
            with contextlib.suppress(OSError):
                self._channel.settimeout(_CLOSE_SECONDS)
                wire.send(self._channel, wire.Close())
            self._process.wait(max(0.0, until - time.monotonic()))
            # The listener ends with the last of the group: they all write to the same pipe.
            self._listener.join(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass
        finally:
            self._kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _traces(self, request: wire.Request, progress: Progress | None) -> list[Trace]:
        reply = self._ask(request, progress)
        assert isinstance(reply, wire.Traces)
        return reply.traces

    def _ask(self, request: wire.Request, progress: Progress | None = None) -> wire.Reply:
        if self._channel.fileno() < 0:
            raise ReplayError("the engine's worker has ended", "start another engine")
        try:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                wire.send(self._channel, request)
            while True:
                self._wait()
                reply = wire.receive_reply(self._channel)
                if isinstance(reply, wire.Progressed):
                    if progress is not None:
                        progress(reply.done, reply.total)
                    continue
                break
        except BaseException:
            # Whatever is still to come belongs to no one: the worker cannot be used again.
            self._kill()
            raise
        if reply is None:
            raise self._crashed()
        if isinstance(reply, wire.Failed):
            raise reply.error()
        return reply

    def _wait(self) -> None:
        poll = select.poll()
        poll.register(self._channel.fileno(), select.POLLIN)
        while not poll.poll(_POLL_MILLISECONDS):
            if self._cancelled():
                self._kill()
                raise CancelledError("the run was cancelled")

    def _crashed(self) -> Error:
        try:
            self._process.wait(_REAP_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            self._kill()
        status, said = self._process.returncode, [line for line in self._said if line.strip()]
        if any("No module named 'fpforensics" in line or "No module named fpforensics" in line for line in said[-3:]):
            return MissingDependencyError(
                f"the interpreter {self._python}",
                "fpforensics",
                f"{self._python} -m pip install '.[hf]'",
            )
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        if status == -signal.SIGKILL:
            how += ", as the system does when memory runs out"
        last = "; ".join(shorten(line.strip(), 160) for line in said[-3:])
        return ReplayError(f"the engine's worker {how}", f"its last words: {last}" if last else "it said nothing")

    def _kill(self) -> None:
        """Kill the worker, then what is left of its process group, and reap it.

        Ranks end with the worker, and Python's tracker then removes the shared memory that it left: both get a moment.
        """
        try:
            self._process.kill()
            self._process.wait()
            self._listener.join(_REAP_SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._channel.close()
            self._listener.join(_REAP_SECONDS)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        debug = os.environ.get("FPFORENSICS_DEBUG") == "1"
        with self._process.stdout as output:
            for line in output:
                if not line.startswith("USDT:"):  # the profiler's probe announcing itself
                    self._said.append(line.rstrip("\n"))
                if debug:
                    print(f"[worker {self._process.pid}] {line}", end="", file=sys.stderr, flush=True)


def _spawn(python: str, host: Host, descriptor: int) -> subprocess.Popen[str]:
    # -P: the current folder must not shadow a module. Its own group: killing it takes its compilers along.
    command = [python, "-P", "-m", "fpforensics.common.engines.worker", "--fd", str(descriptor)]
    try:
        return subprocess.Popen(
            command,
            env={**os.environ, **host.env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(descriptor,),
            start_new_session=True,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
    except OSError as error:
        raise ReplayError(
            f"cannot start the interpreter {python!r}: {error.strerror}",
            "give --python one that has fpforensics installed",
        ) from None
