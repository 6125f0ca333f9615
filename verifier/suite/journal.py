"""What a suite's run has done: one JSON object on each line, synced before the next job begins.

A killed run leaves at most one torn last line, which is cut off when the journal is opened again.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import msgspec

from fpforensics.common.engines.base import ConcurrentWork
from fpforensics.common.errors import EvidenceError, LimitError, UsageError, shorten

Event = Literal["started", "finished", "skipped", "blocked", "failed", "stopped"]
DONE: tuple[Event, ...] = ("finished", "skipped", "stopped")
ENDED: tuple[Event, ...] = (*DONE, "blocked", "failed")
"""How a job may have ended; those that are not done are looked at again when the run is resumed."""


class Entry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line. ``job`` is a job's, a session's or a replay's id; ``at`` is seconds since 1970; ``identical`` is about
    repetitions, as are ``wall_seconds`` and ``concurrent_work``.

    ``loads`` is how many workers this machine started for it, and ``load_seconds`` how long they all took to load.
    """

    event: Event
    job: str
    at: float = 0.0
    nonce: str = ""
    digest: str = ""
    seconds: float = 0.0
    wall_seconds: tuple[float, ...] = ()
    identical: bool = True
    concurrent_work: tuple[ConcurrentWork, ...] = ()
    loads: int = 0
    load_seconds: float = 0.0
    reason: str = ""


class Journal:
    """An open journal, held by one process at a time; its threads may share it."""

    def __init__(self, path: Path, write: Callable[[int, bytes], int] = os.write) -> None:
        self._path = path
        self._write = write
        self._lock = threading.Lock()
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UsageError(f"cannot open {path}: {error.strerror}", "give a folder that you can write to") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._file)
            raise LimitError(f"{path.parent} is in use by another run", "wait for it, or stop it") from None
        try:
            self._entries, self._end = _read(path)
            os.ftruncate(self._file, self._end)
        except BaseException:
            os.close(self._file)
            raise

    def add(self, entry: Entry) -> None:
        """Append and sync. A line that could not be written whole is taken back, and the error raised."""
        line = memoryview(msgspec.json.encode(entry) + b"\n")
        with self._lock:
            self._append(line)
            self._entries.append(entry)

    def _append(self, line: memoryview) -> None:
        os.lseek(self._file, self._end, os.SEEK_SET)
        written = 0
        try:
            while written < len(line):
                written += self._write(self._file, bytes(line[written:]))
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, self._end)
            raise
        self._end += len(line)

    def latest(self, *events: Event) -> Mapping[str, Entry]:
        """Each job's last entry, of these events only if any are named."""
        with self._lock:
            entries = list(self._entries)
        return {entry.job: entry for entry in entries if not events or entry.event in events}

    def close(self) -> None:
        """Let another process have it."""
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_journal(path: Path) -> list[Entry]:
    """Every whole line, without taking the journal."""
    return _read(path)[0] if path.exists() else []


def _read(path: Path) -> tuple[list[Entry], int]:
    """The whole lines, and where they end."""
    raw = path.read_bytes()
    end = raw.rfind(b"\n") + 1
    entries = []
    for number, line in enumerate(raw[:end].splitlines(), start=1):
        try:
            entries.append(msgspec.json.decode(line, type=Entry))
        except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
            raise EvidenceError(
                f"{path}: line {number} is no entry: {shorten(str(error))}",
                "it was changed: run the suite in a new folder",
            ) from None
    return entries, end
