"""The worker's main: one execution config in a process of its own, driven over a socket that it inherited.

``python -m fpforensics.common.engines.worker --fd N``. It ends when it is asked to, and is killed with its whole process group
when the parent closes the socket or dies.
Standard output and standard error are for people; nothing is read from them.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import traceback

from fpforensics.common.engines import open_engine, wire
from fpforensics.common.engines.base import Engine
from fpforensics.common.errors import Error, ReplayError, UsageError

# Progress bars and advice of libraries: a worker has no terminal. Set before anything imports them.
_QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}


def main(arguments: list[str]) -> int:
    """Serve requests on the inherited socket until one says that it was the last."""
    if len(arguments) != 2 or arguments[0] != "--fd" or not arguments[1].isdigit():
        print("this is the engine's worker: it is started by fpforensics, not by hand", file=sys.stderr)
        return 2
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    channel = socket.socket(fileno=int(arguments[1]))
    threading.Thread(target=_end_with_parent, args=(channel.fileno(),), daemon=True).start()
    engine: Engine | None = None
    try:
        while (request := wire.receive_request(channel)) is not None:
            if isinstance(request, wire.Close):
                break
            try:
                if isinstance(request, wire.Load):
                    engine = open_engine(request.config, request.host)
                reply = _answer(request, engine, channel)
            except Error as error:
                reply = wire.Failed.of(error)
            except Exception as error:
                traceback.print_exc()
                reply = wire.Failed("ReplayError", f"the engine failed: {type(error).__name__}: {error}", "")
            wire.send(channel, reply)
    except OSError:
        return 1  # the parent is gone in the middle of an answer
    finally:
        if engine is not None:
            with contextlib.suppress(Exception):
                engine.close()
    return 0


def _answer(request: wire.Request, engine: Engine | None, channel: socket.socket) -> wire.Reply:
    if engine is None:
        raise UsageError("the worker was asked to run before it was told what to load", "load a config first")

    def progress(done: int, total: int) -> None:
        wire.send(channel, wire.Progressed(done, total))

    match request:
        case wire.Load():
            return wire.Loaded(engine.config)
        case wire.Generate(references, sampling, capture):
            return wire.Traces(engine.generate(references, sampling, capture, progress))
        case wire.TeacherForce(forcings, capture, mode):
            return wire.Traces(engine.teacher_force(forcings, capture, mode, progress))
        case wire.GetFacts():
            return wire.Facts(engine.facts())
    raise ReplayError(f"unknown request {type(request).__name__}")


def _end_with_parent(descriptor: int) -> None:
    """Wait for the parent's end of the socket to close, then take the whole process group along (compilers,
    helpers).
    """
    poll = select.poll()
    poll.register(descriptor, 0)  # a hang-up is always reported
    poll.poll()
    if os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # libraries would take seconds to fall apart; what they share is given back by now
