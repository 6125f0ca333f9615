"""What long work shows on stderr: a bar on a terminal, else a plain line now and then. Quick work shows nothing.

Both have a thread of their own, so that they speak up in time even when the work has nothing to report. The environment
variable ``FPFORENSICS_PROGRESS_SECONDS`` changes how many seconds lie between two lines.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import click

from fpforensics.common.errors import shorten

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

Report = Callable[[str, int, int], None]
"""Called with (what is happening, done, total); a total of 0 is unknown."""

AFTER_SECONDS = 2.0
EVERY_SECONDS = 15.0
EVERY_VARIABLE = "FPFORENSICS_PROGRESS_SECONDS"
_FIRST = "starting"
_MAX_STAGE = 160  # and printable: it may come from another machine


@contextmanager
def bar(console: Console, after: float | None = None) -> Iterator[Report]:
    """A bar once ``after`` seconds (None: two) have passed, gone at the end of the block."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    shown = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
    lock = threading.Lock()
    latest: tuple[str, int, int] = (_FIRST, 0, 0)
    task: TaskID | None = None
    over = False

    def show() -> None:
        nonlocal task
        with lock:
            if not over:
                stage, done, total = latest
                task = shown.add_task(stage, total=total or None, completed=done)
                shown.start()

    def report(stage: str, done: int, total: int) -> None:
        nonlocal latest
        with lock:
            latest = shorten(stage, _MAX_STAGE), done, total
            if task is not None:
                shown.update(task, description=latest[0], completed=done, total=total or None)

    timer = threading.Timer(AFTER_SECONDS if after is None else after, show)
    timer.daemon = True
    timer.start()
    try:
        yield report
    finally:
        timer.cancel()
        with lock:
            over = True
            if task is not None:
                shown.stop()


@contextmanager
def lines(
    write: Callable[[str], object] | None = None, after: float | None = None, every: float | None = None
) -> Iterator[Report]:
    """A line to ``write`` (None: stderr) when the stage has changed: the first after ``after`` seconds (None: two), then at
    most one every ``every`` seconds (None: fifteen), each with the newest stage.
    """
    write = write or _to_stderr(sys.stderr)
    after = AFTER_SECONDS if after is None else after
    every = _every() if every is None else every
    changed = threading.Condition()
    started = time.monotonic()
    latest: tuple[str, int, int] = (_FIRST, 0, 0)
    said, over = "", False

    def news() -> bool:
        return over or latest[0] != said

    def report(stage: str, done: int, total: int) -> None:
        nonlocal latest
        with changed:
            latest = shorten(stage, _MAX_STAGE), done, total
            changed.notify_all()

    def speak() -> None:
        nonlocal said
        due = started + after
        while True:
            with changed:
                changed.wait_for(news)
                changed.wait_for(lambda: over, max(0.0, due - time.monotonic()))
                if over:
                    return
                stage, done, total = latest
            if stage == said:
                continue
            count = f" ({done} of {total})" if total else ""
            write(f"[{time.monotonic() - started:4.0f} s] {stage}{count}")
            said, due = stage, time.monotonic() + (every if stage != _FIRST else 0.0)

    speaker = threading.Thread(target=speak, daemon=True)
    speaker.start()
    try:
        yield report
    finally:
        with changed:
            over = True
            changed.notify_all()
        speaker.join()


def _every() -> float:
    try:
        return float(os.environ.get(EVERY_VARIABLE, EVERY_SECONDS))
    except ValueError:
        return EVERY_SECONDS


def _to_stderr(stream: object) -> Callable[[str], None]:
    """Write lines to what is stderr now; one that was closed meanwhile ends no work."""

    def write(line: str) -> None:
        with suppress(OSError, ValueError):
            click.echo(line, file=stream)  # type: ignore[arg-type]

    return write
