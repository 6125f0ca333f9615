"""What a verifier keeps: challenges, bundles that passed the intake, and verdicts, in one folder that one process owns.

A bundle is a file named by its digest plus a row in SQLite. The file is complete and in place before the row is
committed, so after a crash at any moment there is at worst a file without a row, which the next start removes.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

from fpforensics.common.errors import LimitError, NonceError, NotFoundError, UsageError, shorten
from fpforensics.verifier.database import disk_limits, open_database, own_folder, sync_folder

NONCE_BYTES = 32
MAX_OPEN_NONCES = 10_000
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class StoredBundle:
    """A bundle that passed the intake. ``challenged``: it answered a challenge of this store, in time."""

    digest: str
    signer: str
    nonce: str
    challenged: bool
    size: int
    path: Path


@dataclass(frozen=True)
class StoredVerdict:
    """A signed verdict: ``envelope`` holds the exact bytes, the rest repeats what they say, to find it by."""

    sequence: int
    verdict_id: str
    bundle_digest: str
    outcome: str
    envelope: bytes


@dataclass(frozen=True)
class Spool:
    """A file that is removed at the end of its block unless the store adopted it."""

    path: Path
    file: BinaryIO


class Store:
    """Safe to use from many threads. ``now`` is the clock (seconds since the epoch).

    Raises :class:`UsageError` if another process holds the folder, or another version made it.
    """

    def __init__(self, folder: Path, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._folder = folder
        self._bundles, self._spool = folder / "bundles", folder / "spool"
        try:
            for each in (folder, self._bundles, self._spool):
                each.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot make store {folder}: {error.strerror}", "choose another folder") from None
        self._owner = own_folder(folder)
        self._lock = threading.Lock()  # around every use of the one connection
        self._news = threading.Condition()
        try:
            self._db = open_database(folder / "verifier.sqlite")
            self._sweep()
            self._last = self._db.execute("SELECT coalesce(max(sequence), 0) FROM verdicts").fetchone()[0]
        except BaseException:
            os.close(self._owner)
            raise

    def close(self) -> None:
        """Close the database and let another process own the folder."""
        with self._lock:
            self._db.close()
            if self._owner >= 0:
                os.close(self._owner)
                self._owner = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def issue_nonce(self, lifetime: float) -> str:
        """A fresh challenge (hex) that is good for ``lifetime`` seconds."""
        nonce, now = secrets.token_hex(NONCE_BYTES), self._now()
        with self._write() as (db, _):
            db.execute("DELETE FROM nonces WHERE expires_at < ?", (now,))
            if db.execute("SELECT count(*) FROM nonces").fetchone()[0] >= MAX_OPEN_NONCES:
                raise LimitError(f"{MAX_OPEN_NONCES} challenges are open already", "try again later")
            db.execute("INSERT INTO nonces VALUES (?, ?)", (nonce, now + lifetime))
        return nonce

    @contextmanager
    def spool(self) -> Iterator[Spool]:
        """A private file to receive a bundle in. Raises :class:`LimitError` when the disk is full."""
        # A folder of its own, because errors call the file by its name.
        with disk_limits(), tempfile.TemporaryDirectory(dir=self._spool) as folder:
            path = Path(folder) / "bundle"
            with path.open("xb") as file:
                yield Spool(path, file)

    def adopt(self, spool: Spool, digest: str, signer: str, nonce: str, *, require_challenge: bool) -> StoredBundle:
        """Keep a spooled bundle that passed the intake. The same bundle again changes nothing.

        Raises:
            NonceError: another bundle answered this nonce; or a challenge is required, and this answers none of this
                store's, or too late.
            LimitError: the disk is full.
        """
        if not _DIGEST.fullmatch(digest):
            raise ValueError(f"not a SHA-256 digest: {digest!r}")
        with disk_limits():
            spool.file.flush()
            os.fsync(spool.file.fileno())
            size, target = spool.path.stat().st_size, self._path(digest)
            with self._write() as (db, undo):
                known = self._find(digest)
                if known is not None:
                    if require_challenge:
                        _require_challenged(db, known)
                    return known
                made = StoredBundle(digest, signer, nonce, self._answers(db, nonce), size, target)
                _require_unused(db, nonce)
                if require_challenge:
                    _require_challenged(db, made)
                undo.callback(target.unlink, missing_ok=True)
                spool.path.replace(target)
                sync_folder(self._bundles)
                row = (digest, signer, nonce, made.challenged, size, self._now())
                db.execute("INSERT INTO bundles VALUES (?, ?, ?, ?, ?, ?)", row)
                db.execute("DELETE FROM nonces WHERE nonce = ?", (nonce,))
        return made

    def bundle(self, digest: str) -> StoredBundle:
        """The bundle with this digest. Raises :class:`NotFoundError`."""
        with self._lock:
            found = self._find(digest)
        if found is None:
            raise NotFoundError(f"no bundle {shorten(digest, 64)!r} here", "submit it first")
        return found

    def append_verdict(self, seal: Callable[[int], StoredVerdict]) -> StoredVerdict:
        """Store what ``seal(sequence)`` signs under the next sequence number; numbers have no gaps."""
        with self._write() as (db, _):
            sequence = db.execute("SELECT coalesce(max(sequence), 0) + 1 FROM verdicts").fetchone()[0]
            verdict = seal(sequence)
            row = (sequence, verdict.verdict_id, verdict.bundle_digest, verdict.outcome, verdict.envelope)
            db.execute("INSERT INTO verdicts VALUES (?, ?, ?, ?, ?)", row)
        with self._news:
            self._last = max(self._last, sequence)
            self._news.notify_all()
        return verdict

    def verdict(self, verdict_id: str) -> StoredVerdict:
        """The verdict with this id. Raises :class:`NotFoundError`."""
        with self._lock:
            row = self._db.execute("SELECT * FROM verdicts WHERE verdict_id = ?", (verdict_id,)).fetchone()
        if row is None:
            raise NotFoundError(f"no verdict {shorten(verdict_id, 64)!r} here", "list them")
        return StoredVerdict(*row)

    def verdicts(self, after: int, limit: int, max_bytes: int) -> list[StoredVerdict]:
        """Verdicts after a sequence number, in order: at most ``limit``, and after the first at most ``max_bytes`` of
        them.
        """
        found: list[StoredVerdict] = []
        size = 0
        query = "SELECT * FROM verdicts WHERE sequence > ? ORDER BY sequence LIMIT ?"
        with self._lock:
            for row in self._db.execute(query, (after, limit)):
                verdict = StoredVerdict(*row)
                size += len(verdict.envelope)
                if found and size > max_bytes:
                    break
                found.append(verdict)
        return found

    def last_sequence(self) -> int:
        """The newest verdict's sequence number; 0 without verdicts."""
        with self._news:
            return int(self._last)

    def wait_beyond(self, sequence: int, stop: Callable[[], bool], seconds: float | None = None) -> bool:
        """Wait until there is a verdict after ``sequence`` (True), ``stop()`` holds (see :meth:`wake`), or ``seconds`` have
        passed (False).
        """
        with self._news:
            self._news.wait_for(lambda: self._last > sequence or stop(), seconds)
            return bool(self._last > sequence)

    def wake(self) -> None:
        """Let those who wait look at their ``stop`` again."""
        with self._news:
            self._news.notify_all()

    @contextmanager
    def _write(self) -> Iterator[tuple[sqlite3.Connection, ExitStack]]:
        """A transaction, and a stack of what to undo outside the database if it is not committed."""
        with self._lock, disk_limits(), ExitStack() as undo:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db, undo
                self._db.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):  # a full disk may have rolled back already
                    self._db.execute("ROLLBACK")
                raise
            undo.pop_all()

    def _path(self, digest: str) -> Path:
        return self._bundles / _file_name(digest)

    def _find(self, digest: str) -> StoredBundle | None:
        query = "SELECT signer, nonce, challenged, size FROM bundles WHERE digest = ?"
        row = self._db.execute(query, (digest,)).fetchone()
        if row is None:
            return None
        signer, nonce, challenged, size = row
        return StoredBundle(digest, signer, nonce, bool(challenged), size, self._path(digest))

    def _answers(self, db: sqlite3.Connection, nonce: str) -> bool:
        row = db.execute("SELECT expires_at FROM nonces WHERE nonce = ?", (nonce,)).fetchone()
        return row is not None and row[0] >= self._now()

    def _sweep(self) -> None:
        """Remove what a crash left: unfinished uploads, and bundles whose row was never committed."""
        for path in self._spool.iterdir():
            shutil.rmtree(path)
        kept = {_file_name(digest) for (digest,) in self._db.execute("SELECT digest FROM bundles")}
        for path in self._bundles.iterdir():
            if path.name not in kept:
                path.unlink()


def _file_name(digest: str) -> str:
    return f"{digest.removeprefix('sha256:')}.msgpack"


def _require_unused(db: sqlite3.Connection, nonce: str) -> None:
    if not nonce:
        return
    other = db.execute("SELECT digest FROM bundles WHERE nonce = ?", (nonce,)).fetchone()
    if other is not None:
        raise NonceError(
            f"nonce {shorten(nonce, 16)} was already answered by bundle {other[0][:23]}…",
            "ask for a fresh challenge and run a new session",
        )


def _require_challenged(db: sqlite3.Connection, bundle: StoredBundle) -> None:
    if bundle.challenged:
        return
    issued = db.execute("SELECT 1 FROM nonces WHERE nonce = ?", (bundle.nonce,)).fetchone()
    way_out = "ask this verifier for a challenge and run a session that answers it"
    if not bundle.nonce:
        raise NonceError("the bundle answers no challenge, and this verifier requires one", way_out)
    problem = "came too late" if issued else "is none of this verifier's open challenges"
    raise NonceError(f"the bundle's nonce {shorten(bundle.nonce, 16)} {problem}", way_out)
