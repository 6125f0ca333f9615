"""Where a suite's run lives: its settings, its journal, signed bundles, replays and the files that it leaves.

Everything appears under its name whole and synced, or not at all.
"""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import msgspec

from fpforensics.common.cache import sync_folder, write_atomically
from fpforensics.common.errors import Error, UsageError, shorten
from fpforensics.common.keys import Keyring, PrivateKey, generate, load_private, load_public, public_path
from fpforensics.verifier.check import run_as
from fpforensics.verifier.suite.model import LOCAL, ReplaySettings, Suite

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG})


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a run was started with, so that it can be resumed. ``models`` are names of checkpoints, as in ``Host``."""

    suite: Suite
    models: dict[str, str] = {}


class Folder:
    """The paths of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings = path / "suite.json"
        self.journal = path / "journal.jsonl"
        self.bundles = path / "bundles"
        self.replays = path / "replays"
        self.incoming = path / ".incoming"
        self.key = path / "local.key"
        self.keys = path / "keys"
        self.lock = threading.Lock()  # of threads that check what they bring

    def create(self, settings: Settings, trusted: Keyring) -> None:
        """Make a new run's folder; ``trusted`` are the remote provers' keys. Raises :class:`UsageError` if one is there."""
        if self.settings.exists():
            raise UsageError(f"{self.path} holds a suite's run already", f"verifier suite resume {self.path}")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if any(self.path.iterdir()):
                raise UsageError(f"{self.path} is not empty", "give a new folder")
            for each in (self.bundles, self.replays, self.incoming, self.keys):
                each.mkdir()
            if any(prover.endpoint == LOCAL for prover in settings.suite.provers):
                generate(self.key)
            for key in trusted:
                write_atomically(self.keys / f"{key.keyid[:16]}.pub", key.pem())
            write_atomically(self.settings, msgspec.json.format(msgspec.json.encode(settings)))
        except OSError as error:
            raise UsageError(f"cannot write to {self.path}: {error.strerror}", "choose another folder") from error

    def load(self) -> Settings:
        """What the run was started with. Raises :class:`UsageError` if there is none."""
        try:
            settings = msgspec.json.decode(self.settings.read_bytes(), type=Settings)
        except OSError:
            raise UsageError(f"{self.path} holds no suite's run", "verifier suite run NAME -o FOLDER") from None
        except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
            raise UsageError(
                f"{self.settings} is not readable: {shorten(str(error), 160)}", "start a new run"
            ) from None
        for each in (self.bundles, self.replays, self.incoming):
            each.mkdir(exist_ok=True)
        return settings

    def tidy(self) -> None:
        """Remove what a killed run was writing. The journal is the caller's: nobody else is writing."""
        for left in self.incoming.iterdir():
            left.unlink()

    def replay_as(self, settings: Settings, replay: ReplaySettings, models: dict[str, str]) -> Settings:
        """From now on replay like this, with these checkpoints beside those that are named. Raises :class:`UsageError`
        where ``using`` means nothing, or replays are here that were made in another way.
        """
        run_as(settings.suite.baseline.config, replay.using)
        before = settings.suite.replay
        if replay != msgspec.structs.replace(before, enabled=True) and any(self.replays.glob("*.json")):
            made = f"mode={before.mode}, using={before.using!r}, device={before.device}"
            raise UsageError(
                f"{self.replays} holds replays made with {made}", "give the same, or move that folder's files away"
            )
        suite = msgspec.structs.replace(settings.suite, replay=replay)
        changed = msgspec.structs.replace(settings, suite=suite, models=settings.models | models)
        try:
            write_atomically(self.settings, msgspec.json.format(msgspec.json.encode(changed)))
        except OSError as error:
            raise UsageError(f"cannot write to {self.path}: {error.strerror}", "make it writable") from error
        return changed

    def bundle(self, session: str) -> Path:
        """A session's signed bundle."""
        return self.bundles / f"{session}.msgpack"

    def replay(self, name: str) -> Path:
        """What a verified config's replays measured."""
        return self.replays / f"{name}.json"

    def accept(self, incoming: Path, session: str) -> Path:
        """Give a checked bundle its name, synced."""
        path = self.bundle(session)
        move_synced(incoming, path)
        return path

    def private_key(self) -> PrivateKey:
        """What bundles of a local prover are signed with."""
        return load_private(self.key)

    def keyring(self) -> Keyring:
        """Whose bundles are accepted: those of the named provers, and of the local one."""
        own = public_path(self.key)
        return Keyring(map(load_public, [*sorted(self.keys.glob("*.pub")), *([own] if own.exists() else [])]))


def publish(path: Path, content: bytes) -> None:
    """Write a file that others may read, as far as the user's mask allows."""
    write_atomically(path, content)
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def move_synced(source: Path, target: Path) -> None:
    """Rename a file once its bytes are on disk."""
    descriptor = os.open(source, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    source.replace(target)
    sync_folder(target.parent)


def is_full(error: BaseException) -> bool:
    """Whether an error comes from a disk that takes no more, on this side or as a prover says it."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in FULL:
            return True
        if isinstance(seen, Error) and any(os.strerror(code) in seen.message for code in FULL):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
