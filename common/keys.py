"""Ed25519 keys: made, kept private, read back, and gathered in the keyring that a verifier trusts.

Key files are PEM (PKCS#8 and SubjectPublicKeyInfo), so that OpenSSL reads them too. A key's id is the hex
SHA-256 of its 32 raw public bytes; the id only says which key to try, the keyring alone says which keys
count.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fpforensics.common.errors import SignatureError, UsageError

SUFFIX = ".pub"
_NO_OVERWRITING = "keys are never overwritten: use what is there, or choose another name"
_MAX_PEM_BYTES = 16 * 1024
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


class PublicKey:
    """A key that signatures are checked with. Equal by value, usable in sets."""

    def __init__(self, key: Ed25519PublicKey) -> None:
        self._key = key
        self.raw: bytes = key.public_bytes_raw()
        self.keyid: str = hashlib.sha256(self.raw).hexdigest()

    def verify(self, signature: bytes, message: bytes) -> None:
        """Raise :class:`SignatureError` unless this key signed exactly ``message``."""
        try:
            self._key.verify(signature, message)
        except InvalidSignature:
            raise SignatureError(f"key {self.keyid[:16]}… did not sign these bytes") from None

    def pem(self) -> bytes:
        """SubjectPublicKeyInfo, PEM."""
        return self._key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PublicKey) and other.raw == self.raw

    def __hash__(self) -> int:
        return hash(self.raw)

    def __repr__(self) -> str:
        return f"PublicKey({self.keyid})"


class PrivateKey:
    """A key that signs. Its secret is in no ``repr`` and cannot be pickled."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public = PublicKey(key.public_key())

    @property
    def keyid(self) -> str:
        """The id of the public half."""
        return self.public.keyid

    def sign(self, message: bytes) -> bytes:
        """The 64-byte Ed25519 signature of ``message``."""
        return self._key.sign(message)

    def pem(self) -> bytes:
        """PKCS#8, PEM, not encrypted: for a file that only its owner can read."""
        return self._key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    @classmethod
    def from_seed(cls, seed: bytes) -> PrivateKey:
        """The key of 32 secret bytes."""
        return cls(Ed25519PrivateKey.from_private_bytes(seed))

    @classmethod
    def fresh(cls) -> PrivateKey:
        """A new random key that lives only in memory."""
        return cls(Ed25519PrivateKey.generate())

    def __reduce__(self) -> str:
        raise TypeError("private keys are never pickled")

    def __repr__(self) -> str:
        return f"PrivateKey(of {self.keyid})"


class Keyring:
    """The public keys that a verifier trusts. Immutable."""

    def __init__(self, keys: Iterable[PublicKey] = ()) -> None:
        self._keys = {key.keyid: key for key in keys}

    @classmethod
    def from_paths(cls, paths: Iterable[Path]) -> Keyring:
        """The keys in ``paths``: public key files, or folders of ``*.pub`` (not searched deeper)."""
        keys: list[PublicKey] = []
        for path in paths:
            if not path.is_dir():
                keys.append(load_public(path))
                continue
            files = sorted(path.glob(f"*{SUFFIX}"))
            if not files:
                raise UsageError(f"no *{SUFFIX} in keyring folder {path}", "copy the prover's .pub file there")
            keys.extend(load_public(file) for file in files)
        return cls(keys)

    def get(self, keyid: str) -> PublicKey | None:
        """The key with this id, or None."""
        return self._keys.get(keyid)

    def all(self) -> tuple[PublicKey, ...]:
        """Every key."""
        return tuple(self._keys.values())

    def __iter__(self) -> Iterator[PublicKey]:
        return iter(self._keys.values())

    def __len__(self) -> int:
        return len(self._keys)

    def __repr__(self) -> str:
        return f"Keyring({', '.join(f'{keyid[:16]}…' for keyid in self._keys)})"


def public_path(path: Path) -> Path:
    """Where the public half of the private key file ``path`` lies: beside it, ``.pub`` appended."""
    return path.with_name(path.name + SUFFIX)


def generate(path: Path) -> PublicKey:
    """Make a key pair: the private key at ``path`` (mode 0600), the public one at ``path``.pub.

    Nothing is overwritten: raises :class:`UsageError` if either file exists or the folder cannot be written, and for a name that
    only a public key should have.
    """
    if not path.name or path.suffix == SUFFIX:
        raise UsageError(
            f"{str(path)!r} is no name for a private key", f"name a file without {SUFFIX}, e.g. verifier.key"
        )
    key = PrivateKey.fresh()
    there = [each for each in (path, public_path(path)) if each.exists()]
    if there:  # before either is made, not after
        verb = "exist" if len(there) > 1 else "exists"
        raise UsageError(f"{' and '.join(map(str, there))} {verb} already", _NO_OVERWRITING)
    _create(path, key.pem(), 0o600)
    try:
        _create(public_path(path), key.public.pem(), 0o644)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return key.public


def load_private(path: Path) -> PrivateKey:
    """The private key in ``path``. Refuses a file that anyone but its owner can read or write."""
    data, mode = _read(path, "private key", f"make one: prover keygen {path}")
    if b"PUBLIC KEY" in data:
        private = path.with_suffix("") if path.suffix == SUFFIX else None
        raise UsageError(
            f"{path} is a public key, the private one is needed",
            f"give {private}" if private else "give the file that keygen wrote beside it",
        )
    if os.name == "posix" and mode & _OTHERS:
        raise UsageError(
            f"private key {path} is open to others (mode {stat.S_IMODE(mode):04o})", f"run: chmod 600 {path}"
        )
    try:
        key = serialization.load_pem_private_key(data, password=None)
    except TypeError:
        raise UsageError(f"private key {path} is encrypted", "give an unencrypted key with mode 0600") from None
    except (ValueError, UnsupportedAlgorithm):
        raise UsageError(f"{path} holds no PEM private key", "make one: prover keygen FILE") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise UsageError(f"private key {path} is not Ed25519", "make one: prover keygen FILE")
    return PrivateKey(key)


def load_public(path: Path) -> PublicKey:
    """The public key in ``path``."""
    data, _ = _read(path, "public key", "prover keygen FILE writes FILE.pub")
    if b"PRIVATE KEY" in data:
        raise UsageError(f"{path} is a private key, a public one is needed", f"give {public_path(path)}")
    try:
        key = serialization.load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm):
        raise UsageError(f"{path} holds no PEM public key", "prover keygen FILE writes FILE.pub") from None
    if not isinstance(key, Ed25519PublicKey):
        raise UsageError(f"public key {path} is not Ed25519", "prover keygen FILE writes FILE.pub")
    return PublicKey(key)


def _create(path: Path, data: bytes, mode: int) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    except FileExistsError:
        raise UsageError(f"{path} exists already", _NO_OVERWRITING) from None
    except OSError as error:
        raise UsageError(
            f"cannot write key {path}: {error.strerror}", "choose a folder that you can write to"
        ) from None
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _read(path: Path, what: str, hint: str) -> tuple[bytes, int]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise UsageError(f"{what} {path} does not exist", hint) from None
    except OSError as error:
        raise UsageError(f"cannot read {what} {path}: {error.strerror}", hint) from None
    try:
        # The mode is that of the opened file, not of whatever the path names a moment later.
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise UsageError(f"{what} {path} is not a file", hint)
        data = os.read(descriptor, _MAX_PEM_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(data) > _MAX_PEM_BYTES:
        raise UsageError(f"{what} {path} is larger than {_MAX_PEM_BYTES} bytes", hint)
    return data, mode
