"""The text of an experiment file: unpacked, mapped, and of a size that can be read.

A file is mapped, not read, so that its own pages are all that its length costs, and the system can drop those; gzip is
unpacked to a temporary file first. What is no JSON in UTF-8 but looks like something else is called by its name.
"""

from __future__ import annotations

import gzip
import mmap
import tempfile
import zlib
from pathlib import Path
from typing import IO

import numpy as np

from fpforensics.common.errors import EvidenceError, UsageError, shorten

MAX_UNPACKED_BYTES = 64 << 30
MAX_NAMES = 5_000_000
"""Strings, most of them names: a file of nothing but the shortest takes up to 30 times its own size in memory, 400 bytes each."""
_CHUNK = 1 << 20
_BYTE_ORDER_MARKS = {b"\xef\xbb\xbf": "UTF-8 with a byte order mark", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def open_text(path: Path) -> IO[bytes]:
    """The file, or its unpacked contents. Raises :class:`UsageError` where there is none, :class:`EvidenceError` for damaged gzip."""
    shown, hint = shorten(str(path), 200), "name an experiment's .json or .json.gz"
    if path.is_dir():
        raise UsageError(
            f"{shown} is a folder", f"name the files in it: {shown.rstrip('/')}/*.json, with --summary for many"
        )
    if not path.is_file():
        raise UsageError(f"{shown} is no regular file" if path.exists() else f"no file {shown}", hint)
    try:
        file = path.open("rb")
    except OSError as error:
        raise UsageError(f"cannot read {shown}: {error.strerror}", hint) from None
    if file.read(2) != b"\x1f\x8b":
        return file
    file.close()
    return _unpacked(path)


def map_text(name: str, file: IO[bytes]) -> mmap.mmap:
    """The whole text, which is at least one byte."""
    file.seek(0, 2)
    if file.tell() == 0:
        raise EvidenceError(f"{name} is empty: 0 bytes", "is the download complete?")
    file.flush()
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def require_readable(name: str, text: mmap.mmap) -> None:
    """Raise for what would fail with a riddle, or take far more memory than its size: before anything is parsed."""
    for mark, encoding in _BYTE_ORDER_MARKS.items():
        if text[: len(mark)] == mark:
            raise EvidenceError(f"{name} is {encoding}", "save it as UTF-8 without a byte order mark")
    if text[:1] == b"\x83" and _is_bundle(text[:64]):
        raise UsageError(
            f"{name} is a bundle, not an experiment", f"write one from it: verifier export {name} --key … -o FILE.json"
        )
    quotes, whole = 0, np.frombuffer(text, np.uint8)
    for start in range(0, len(whole), _CHUNK):
        quotes += int(np.count_nonzero(whole[start : start + _CHUNK] == ord('"')))
        if quotes > 2 * MAX_NAMES:
            raise EvidenceError(f"the document: more than {MAX_NAMES} names", f"split {name}")


def same_text(one: mmap.mmap, other: mmap.mmap) -> bool:
    """Whether two texts are equal, a part at a time."""
    return len(one) == len(other) and all(
        one[start : start + _CHUNK] == other[start : start + _CHUNK] for start in range(0, len(one), _CHUNK)
    )


def _is_bundle(head: bytes) -> bool:
    from fpforensics.common.frame import FORMAT

    return FORMAT.partition("/")[0].encode() in head


def _unpacked(path: Path) -> IO[bytes]:
    target = tempfile.TemporaryFile(prefix="fpforensics-")  # noqa: SIM115
    try:
        with gzip.open(path) as packed:
            while chunk := packed.read(_CHUNK):
                if target.tell() + len(chunk) > MAX_UNPACKED_BYTES:
                    raise EvidenceError(
                        f"{path.name} unpacks to over {MAX_UNPACKED_BYTES} bytes", "split the experiment"
                    )
                target.write(chunk)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        target.close()
        raise EvidenceError(f"{path.name} is damaged: {error}", "is the download complete?") from None
    except BaseException:
        target.close()
        raise
    return target
