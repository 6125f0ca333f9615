"""The identity of a checkpoint: one digest over its tensors as stored, however they are split into files.

Reads safetensors headers itself: torch is not needed, and nothing is unpickled. Each tensor is hashed with
SHA-256; the digest is SHA-256 over one line of JSON per tensor, ``[name, dtype, shape, sha256]``, sorted by name.
Two levels, so that tensors are hashed in parallel.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import mmap
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from fpforensics.common.cache import cache_folder, write_atomically
from fpforensics.common.errors import UsageError, shorten

# The format's own bound on a header (https://github.com/huggingface/safetensors#format).
MAX_HEADER_BYTES = 100_000_000
_LENGTH_BYTES = 8
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_INDEX_SUFFIX = ".safetensors.index.json"
_SETTLED_NS = 2_000_000_000


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: bytes ``begin`` to ``end`` of ``file``. ``dtype`` is safetensors' name, such as BF16."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int


class _FileIdentity(msgspec.Struct, frozen=True):
    """What changes when a file is written: the cached digest holds as long as these do."""

    name: str
    size: int
    mtime_ns: int
    ctime_ns: int


class _CachedDigest(msgspec.Struct, frozen=True):
    folder: str
    files: list[_FileIdentity]
    digest: str


def weights_digest(path: Path) -> str:
    """``sha256:<hex>`` over the tensors of the checkpoint in ``path``: names, dtypes, shapes and bytes.

    The result is kept in the user's cache for as long as the files stay the same (size and times).
    Raises :class:`UsageError` for a folder without safetensors, and for files that are malformed or contradict
    each other.
    """
    folder = path.resolve()
    files = weight_files(folder)
    identities = _identities(folder, files)
    cached = cache_folder() / "digests" / f"{hashlib.sha256(str(folder).encode()).hexdigest()[:32]}.json"
    with contextlib.suppress(OSError, msgspec.DecodeError):
        known = msgspec.json.decode(cached.read_bytes(), type=_CachedDigest)
        if known.folder == str(folder) and known.files == identities:
            return known.digest

    digest = _digest(_tensors(files))
    if _identities(folder, files) != identities:
        raise UsageError(f"the weights in {folder} changed while they were read", "wait until they are written")
    # A file written within the clock's last tick could change again without a new time: don't keep it yet.
    if time.time_ns() - max(identity.mtime_ns for identity in identities) > _SETTLED_NS:
        with contextlib.suppress(OSError):  # without a cache it is only slower
            write_atomically(cached, msgspec.json.encode(_CachedDigest(str(folder), identities, digest)))
    return digest


def stored_tensors(folder: Path) -> list[StoredTensor]:
    """Every tensor of the checkpoint in ``folder``, sorted by name; nothing but headers is read.

    Raises :class:`UsageError` as :func:`weights_digest` does.
    """
    return _tensors(weight_files(folder))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the checkpoint in ``folder``, sorted by name.

    Those that the index names, where there is an index; else every one. Raises :class:`UsageError` where it is
    unclear which weights a loader would take, and where there are only pickled ones.
    """
    if not folder.is_dir():
        raise UsageError(f"no checkpoint folder at {folder}", "give a folder that holds config.json and *.safetensors")
    if (folder / "adapter_config.json").exists():
        raise UsageError(f"{folder} holds an adapter, not whole weights", "merge it into its base model first")
    found = sorted(folder.glob("*.safetensors"))
    indexes = sorted(folder.glob(f"*{_INDEX_SUFFIX}"))
    if not indexes:
        return found or _refuse(folder)
    if len(indexes) > 1 or (folder / indexes[0].name.replace(_INDEX_SUFFIX, ".safetensors")).exists():
        names = ", ".join(file.name for file in indexes)
        raise UsageError(f"{folder} holds more than one set of weights ({names} beside others)", "keep one set")
    named = _indexed_files(indexes[0])
    missing = sorted(named - {file.name for file in found})
    if missing:
        raise UsageError(f"{indexes[0]} names {shorten(missing[0])!r}, which is not there", "fetch the missing shard")
    return [file for file in found if file.name in named]


def _refuse(folder: Path) -> list[Path]:
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLED)
    if pickled:
        raise UsageError(
            f"{folder} holds only {shorten(pickled[0])}; pickled checkpoints are never loaded",
            "convert it to safetensors",
        )
    raise UsageError(f"{folder} holds no *.safetensors file", "give a folder with a safetensors checkpoint")


def _indexed_files(index: Path) -> set[str]:
    class Index(msgspec.Struct):
        weight_map: dict[str, str]

    try:
        return set(msgspec.json.decode(index.read_bytes(), type=Index).weight_map.values())
    except (OSError, msgspec.DecodeError) as error:
        raise UsageError(f"{index} is not a safetensors index: {error}", "fetch it again") from error


def _identities(folder: Path, files: Sequence[Path]) -> list[_FileIdentity]:
    stats = [(file, file.stat()) for file in files]
    return [
        _FileIdentity(str(file.relative_to(folder)), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        for file, stat in stats
    ]


def _tensors(files: Sequence[Path]) -> list[StoredTensor]:
    tensors = sorted((tensor for file in files for tensor in _read_header(file)), key=lambda tensor: tensor.name)
    twice = [name for name, count in Counter(tensor.name for tensor in tensors).items() if count > 1]
    if twice:
        where = ", ".join(tensor.file.name for tensor in tensors if tensor.name == twice[0])
        raise UsageError(f"tensor {shorten(twice[0])!r} is stored more than once ({where})", "keep one set of weights")
    if not tensors:
        raise UsageError(f"{files[0].parent} holds no tensors", "give a folder with a safetensors checkpoint")
    return tensors


def _read_header(file: Path) -> Iterator[StoredTensor]:
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(_LENGTH_BYTES), "little")
        if size < _LENGTH_BYTES or length > min(MAX_HEADER_BYTES, size - _LENGTH_BYTES):
            raise UsageError(f"{file} is not safetensors, or truncated: its header would have {length} bytes", _AGAIN)
        raw = opened.read(length)
    start = _LENGTH_BYTES + length
    try:
        header = json.loads(raw, object_pairs_hook=_once_each)
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            shape, dtype = tuple(entry["shape"]), str(entry["dtype"])
            if not all(type(n) is int and n >= 0 for n in (begin, end, *shape)) or end > size - start:
                raise ValueError(f"tensor {shorten(name)!r} lies outside the file")
            if 8 * (end - begin) != math.prod(shape) * _bits(dtype):
                raise ValueError(f"tensor {shorten(name)!r} has {end - begin} bytes, not those of {dtype} {shape}")
            yield StoredTensor(name, dtype, shape, file, start + begin, start + end)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{file} has a malformed safetensors header: {error}", _AGAIN) from error


_AGAIN = "fetch the file again"


def _bits(dtype: str) -> int:
    """The width that a safetensors dtype's name ends in: BF16, F8_E4M3, I64; BOOL is stored as a byte."""
    width = re.match(r"(?:BF|F|I|U|C)(\d+)(?:_|$)", dtype)
    if width is None and dtype != "BOOL":
        raise ValueError(f"unknown dtype {shorten(dtype)!r}")
    return int(width[1]) if width else 8


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name is given twice")
    return entries


def _digest(tensors: Sequence[StoredTensor]) -> str:
    with contextlib.ExitStack() as stack:
        views: dict[Path, memoryview] = {}
        for file in {tensor.file for tensor in tensors}:
            opened = stack.enter_context(file.open("rb"))
            mapped = stack.enter_context(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))
            views[file] = stack.enter_context(memoryview(mapped))

        def hash_one(tensor: StoredTensor) -> str:
            # hashlib lets go of the interpreter lock over large buffers
            with views[tensor.file][tensor.begin : tensor.end] as stored:
                return hashlib.sha256(stored).hexdigest()

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            hashed = list(pool.map(hash_one, tensors))
    whole = hashlib.sha256()
    for tensor, digest in zip(tensors, hashed, strict=True):
        whole.update(json.dumps([tensor.name, tensor.dtype, tensor.shape, digest]).encode() + b"\n")
    return f"sha256:{whole.hexdigest()}"
