"""Untrusted bytes become typed values here, or an error: bounds first, then one strict parse.

``msgspec`` alone does not do it: it keeps the last of duplicate keys, so that two readers could see two
manifests.
"""

from __future__ import annotations

import json
import math
import re
from functools import cache
from typing import Any, TypeVar

import msgspec
import numpy as np

from fpforensics.common.errors import EvidenceError, shorten

T = TypeVar("T")

_NOT_STRUCTURE = bytes(set(range(256)) - set(b'"[]{}'))
_STEPS = bytes(1 if byte in b"[{" else 255 if byte in b"]}" else 0 for byte in range(256))  # as int8: +1, -1
_SCAN_CHUNK = 1 << 20
_MAX_INTEGER_DIGITS = 20  # 2^64 has 20


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bounds on untrusted evidence, all checked before anything of that size is allocated.

    Sizes are bytes. ``string`` bounds every string in a manifest, ``elements`` those of one tensor, ``width``
    every dimension of a model (vocabulary, hidden size, keys), ``layers`` its depth.
    """

    file_bytes: int = 64 << 30
    manifest_bytes: int = 64 << 20
    nesting: int = 32
    string: int = 1024
    references: int = 4096
    rows: int = 256
    tensors: int = 1_000_000
    elements: int = 1 << 32
    prompt_tokens: int = 1 << 20
    output_tokens: int = 1 << 20
    width: int = 1 << 24
    layers: int = 4096
    repetitions: int = 10_000


def decode_json(data: bytes, kind: type[T], what: str, limits: Limits) -> T:
    """``data`` as a ``kind``: :func:`parse_json`, then :func:`convert`."""
    return convert(parse_json(data, what, limits), kind, what)


def parse_json(data: bytes, what: str, limits: Limits) -> Any:
    """``data`` as plain values; ``what`` names it in errors.

    Refuses: more than ``limits.manifest_bytes``, nesting beyond ``limits.nesting`` (found by a linear scan,
    before parsing), anything but UTF-8, duplicate keys, NaN and infinity (``1e999`` too), integers of more
    than 20 digits, strings that are longer than ``limits.string`` or not printable (control characters, ANSI
    escapes, text-direction overrides, lone surrogates). Always an :class:`EvidenceError` that says where.
    """
    if len(data) > limits.manifest_bytes:
        raise EvidenceError(f"{what} of {len(data)} bytes", f"at most {limits.manifest_bytes} are read")
    check_nesting(data, what, limits)
    try:
        text = data.decode("utf-8")
        value = _DECODER.decode(text)
    except UnicodeDecodeError as error:
        raise EvidenceError(f"{what} is not UTF-8 at byte {error.start}", "ask for it again") from None
    except json.JSONDecodeError as error:
        raise EvidenceError(f"{what} is not JSON: {error.msg} at character {error.pos}", "ask for it again") from None
    except _RefusedError as error:
        raise EvidenceError(f"{what} holds {error}", "only strict JSON is evidence") from None
    # Without escapes the text shows whether every string is good; only a doubtful one is worth the walk.
    if "\\" in text or not text.isprintable() or _long_string(limits.string).search(text):
        _check_strings(value, what, limits)
    return value


def convert(value: Any, kind: type[T], what: str) -> T:
    """Plain values as a ``kind``; unknown or missing fields and wrong types raise, with the path."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        problem, _, where = str(error).partition(" - at ")  # the problem may quote a long value
        problem = shorten(problem, 100) + (f" at {shorten(where, 100)}" if where else "")
        raise EvidenceError(f"{what} is malformed: {problem}", "was it made by another version?") from None


def check_nesting(data: bytes, what: str, limits: Limits) -> None:
    """Refuse JSON that nests deeper than ``limits.nesting``; linear in time and memory, never recursive."""
    # Without escaped characters each quote opens or closes a string. A backslash outside a string would
    # mislead the scan, but only behind the point where the parser stops at it.
    structure = data.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _NOT_STRUCTURE)
    depth, inside = 0, 0
    for start in range(0, len(structure), _SCAN_CHUNK):
        chunk = structure[start : start + _SCAN_CHUNK]
        quotes = inside + np.cumsum(np.frombuffer(chunk, np.uint8) == ord('"'), dtype=np.int64)
        steps = np.frombuffer(chunk.translate(_STEPS), np.int8) * (quotes % 2 == 0)
        depths = depth + np.cumsum(steps, dtype=np.int64)
        if int(depths.max()) > limits.nesting:
            raise EvidenceError(f"{what} nests deeper than {limits.nesting} levels", "no evidence needs more")
        depth, inside = int(depths[-1]), int(quotes[-1])


class _RefusedError(ValueError):
    """Raised inside the parser's hooks."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _RefusedError(f"the key {shorten(key)!r} twice")
            seen.add(key)
    return found


def _constant(name: str) -> Any:
    raise _RefusedError(f"the number {name}")


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise _RefusedError(f"the number {shorten(digits)}, which is infinite")
    return value


def _integer(digits: str) -> int:
    if len(digits) > _MAX_INTEGER_DIGITS:
        raise _RefusedError(f"an integer of {len(digits)} digits")
    return int(digits)


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_float=_float, parse_int=_integer)


_Path = tuple[Any, "str | int"] | None  # (path of the parent, key): written out only for an error


@cache
def _long_string(limit: int) -> re.Pattern[str]:
    return re.compile(f'"[^"]{{{limit + 1}}}')


def _check_strings(root: Any, what: str, limits: Limits) -> None:
    pending: list[tuple[_Path, Any]] = [(None, root)]
    while pending:
        path, value = pending.pop()
        if isinstance(value, dict):
            for key, inner in value.items():
                _check_string(key, path, what, limits)
                pending.append(((path, key), inner))
        elif isinstance(value, list):
            pending.extend(((path, index), inner) for index, inner in enumerate(value))
        elif isinstance(value, str):
            _check_string(value, path, what, limits)


def _check_string(text: str, path: _Path, what: str, limits: Limits) -> None:
    if len(text) <= limits.string and text.isprintable():
        return
    where = shorten(_show(path), 120)
    if len(text) > limits.string:
        raise EvidenceError(
            f"{what} holds {len(text)} characters at {where}: {shorten(text)!r}", f"at most {limits.string}"
        )
    raise EvidenceError(f"{what} holds unprintable characters at {where}: {shorten(text)!r}", "use plain text")


def _show(path: _Path) -> str:
    parts: list[str] = []
    while path is not None:
        path, key = path
        parts.append(f"[{key}]" if isinstance(key, int) else f".{key}")
    return "$" + "".join(reversed(parts))
