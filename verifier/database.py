"""The verifier's SQLite file: its schema, who owns it, and what a full disk looks like."""

from __future__ import annotations

import errno
import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fpforensics.common.errors import LimitError, UsageError

SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE nonces (
    nonce TEXT PRIMARY KEY,
    expires_at REAL NOT NULL
);
CREATE TABLE bundles (
    digest TEXT PRIMARY KEY,
    signer TEXT NOT NULL,
    nonce TEXT NOT NULL,
    challenged INTEGER NOT NULL CHECK (challenged IN (0, 1)),
    size INTEGER NOT NULL,
    received_at REAL NOT NULL
);
CREATE UNIQUE INDEX one_bundle_for_each_nonce ON bundles (nonce) WHERE nonce <> '';
CREATE TABLE verdicts (
    sequence INTEGER PRIMARY KEY,
    verdict_id TEXT NOT NULL UNIQUE,
    bundle_digest TEXT NOT NULL REFERENCES bundles (digest),
    outcome TEXT NOT NULL,
    envelope BLOB NOT NULL
);
"""
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def own_folder(folder: Path) -> int:
    """A descriptor that holds the folder until it is closed. Raises :class:`UsageError` if another process does."""
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise UsageError(f"store {folder} is in use by another verifier", "stop it, or choose another folder") from None
    return descriptor


def open_database(path: Path) -> sqlite3.Connection:
    """The database at ``path``, made if it is not there; usable from any thread, transactions are the caller's.

    Raises :class:`UsageError` for a file that is no database, or one of another version.
    """
    try:
        db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA foreign_keys = ON")
        found = db.execute("PRAGMA user_version").fetchone()[0]
        if found == 0:
            db.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
            found = SCHEMA_VERSION
    except sqlite3.DatabaseError as error:
        raise UsageError(
            f"store database {path} cannot be used: {error}", "restore it, or choose another folder"
        ) from None
    if found != SCHEMA_VERSION:
        db.close()
        raise UsageError(
            f"store {path} has schema version {found}, this program knows {SCHEMA_VERSION}",
            "use the version of fpforensics that made it, or choose another folder",
        )
    return db


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_limits() -> Iterator[None]:
    """A full disk leaves this block as a :class:`LimitError`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        raise LimitError("the verifier's disk is full", "free space there, then send it again") from error
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode not in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE):
            raise
        raise LimitError("the verifier's disk is full", "free space there, then send it again") from error
