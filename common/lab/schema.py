"""The JSON Schema of the uniform experiment JSON, and what it says about a document that could not be read.

Reading is typed and fast and knows only *that* something is wrong. This is the slow path that says *where*:
``runs[3].decode_steps[0].logprobs.pos_-1.token_ids[2]: …``.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from importlib import resources
from typing import Any

import jsonschema

from fpforensics.common.errors import shorten

Path = Sequence[str | int]
_PLAIN = re.compile(r"[\w-]+")
# Larger documents are not read a second time as Python values, which take many times their text's memory.
EXPLAINED_BYTES = 8 << 20
_AT_BYTE = re.compile(r"\(byte (\d+)\)")
_CONSTANT = re.compile(rb"-?(?:NaN|Infinity)")
# A whole string, plain numbers and the commas after them, what gives structure, a string that never ends.
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\d.eE+\-\s,]{1,65536}+|[\[\]{}:]|"', re.DOTALL)
# Some seconds' work.
_MAX_TOKENS = 5_000_000
_MAX_SEARCHED = 256 << 20
_MAX_KEY = 300
_TOO_LARGE = "a number too large for float64"


@cache
def experiment_schema() -> dict[str, Any]:
    """The shipped schema (JSON Schema, draft 2020-12)."""
    text = resources.files(__package__).joinpath("experiment.schema.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def first_problem(value: Any, part: str = "", at: Path = ()) -> str:
    """What is wrong first with a parsed document, or with one of its ``part``s (``metadata``, ``configurations``, ``run``).

    ``path: problem`` in words, or nothing when it fits. ``at`` is where the part lies in the document.
    """
    error = next(_validator(part).iter_errors(value), None)
    if error is None:
        return ""
    return f"{show_path((*at, *error.absolute_path))}: {shorten(_in_words(error), 160)}"


def explain(error: Exception, text: Any, part: str = "", at: Path = ()) -> str:
    """Why a document, or its ``part`` at ``at``, could not be decoded: ``path: problem``.

    ``text`` is its bytes (or a map of them), ``error`` what the decoder raised.
    """
    message = str(error)
    if isinstance(error, RecursionError):
        return f"{show_path(at)}: it nests too deeply"
    if isinstance(error, MemoryError):
        return f"{show_path(at)}: too much for this machine's memory"
    if isinstance(error, UnicodeDecodeError):
        return f"{show_path(at)}: not UTF-8"
    byte = _AT_BYTE.search(message)
    if byte or "truncated" in message:
        return _explain_syntax(message, text, int(byte[1]) if byte else len(text), at)
    found = ""
    if len(text) <= EXPLAINED_BYTES:
        with suppress(ValueError, RecursionError):  # a number of thousands of digits, say
            value = json.loads(bytes(text))
            infinite = next(_infinite(value, ()), None)
            found = (
                first_problem(value, part, at) if infinite is None else f"{show_path((*at, *infinite))}: {_TOO_LARGE}"
            )
    if found:
        return found
    problem, _, inner = message.partition(" - at `$")
    where = f"{show_path(at) if at else ''}{inner.rstrip('`')}".removeprefix(".")
    return f"{where or 'the document'}: {shorten(problem.replace('`', ''), 100)}"


def repeated_name(text: bytes, at: Path = ()) -> str:
    """Where an object names something twice, of which every decoder keeps the last: ``path: problem``, or nothing.

    ``text`` is JSON that was decoded already.
    """
    twice: list[_Repeating] = []

    def collect(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) == len(items):
            return found
        twice.append(_Repeating(items))
        return twice[-1]

    with suppress(ValueError, RecursionError):
        value = json.loads(text, object_pairs_hook=collect, parse_int=float)  # int() refuses thousands of digits
        for path, each in _repeating(value, tuple(at)) if twice else ():
            return f"{show_path(path)}: {shorten(each.name)!r} is given twice"
    return f"{show_path(at)}: {shorten(twice[0].name)!r} is given twice" if twice else ""


def show_path(path: Path) -> str:
    """``runs[3].prefill.hidden_states.layer_28``, or ``the document`` for its root."""
    shown = ""
    for step in path:
        if isinstance(step, int):
            shown += f"[{step}]"
        else:
            name = shorten(step) if _PLAIN.fullmatch(step) else f"[{shorten(step)!r}]"
            shown += f".{name}" if shown and not name.startswith("[") else name
    return shorten(shown, 200) or "the document"


def _explain_syntax(message: str, text: Any, byte: int, at: Path) -> str:
    stack = _open_at(text, byte)
    where = show_path((*at, *(step for step in stack or () if step is not None)))
    for start in (byte - 1, byte):  # the sign comes before it
        if start >= 0 and (constant := _CONSTANT.match(text, start)):
            return f"{where}: {constant[0].decode()} is not a number"
    if "truncated" not in message:
        return f"{where}: not JSON: {message.removeprefix('JSON is malformed: ')}"
    if stack == [] and re.search(rb"\S", text):
        return f"{where}: not JSON: half a surrogate pair"
    return f"{where}: not JSON: it ends too early"


def _open_at(text: Any, byte: int) -> list[str | int | None] | None:
    """What ``byte`` lies in: of each list the index, of each object the key, None before its first and for a string.

    None as a whole when it takes too long to find.
    """
    if byte > _MAX_SEARCHED:
        return None
    stack: list[str | int | None] = []
    key = slice(0, 0)
    for count, match in enumerate(_TOKEN.finditer(text, 0, byte)):
        start, end = match.span()
        first = text[start : start + 1]  # a token may be as long as the text: never copied whole
        if count == _MAX_TOKENS:
            return None
        if first == b"[":
            stack.append(0)
        elif first == b"{":
            stack.append(None)
        elif first in (b"]", b"}"):
            if stack:
                stack.pop()
        elif first == b":":
            if stack:
                stack[-1] = _name(text[key])
        elif first == b'"':
            if end == start + 1:
                stack.append(None)
                break
            key = slice(start, min(end, start + _MAX_KEY))
        elif stack and isinstance(stack[-1], int):
            stack[-1] += text[start:end].count(b",")
    return stack


def _name(token: bytes) -> str:
    try:
        return str(json.loads(token))
    except ValueError:
        return token[1:].removesuffix(b'"').decode(errors="replace")


class _Repeating(dict[str, Any]):
    """An object, and a name that it gives more than once."""

    def __init__(self, items: list[tuple[str, Any]]) -> None:
        super().__init__(items)
        self.name = Counter(name for name, _ in items).most_common(1)[0][0]


def _repeating(value: Any, path: tuple[str | int, ...]) -> Iterator[tuple[Path, _Repeating]]:
    """The objects that name something twice, each with its path."""
    if isinstance(value, _Repeating):
        yield path, value
    if isinstance(value, dict):
        for name, each in value.items():
            yield from _repeating(each, (*path, name))
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from _repeating(each, (*path, index))


def _infinite(value: Any, path: tuple[str | int, ...]) -> Iterator[Path]:
    """The paths of numbers that JSON may hold and float64 may not."""
    if isinstance(value, float) and not math.isfinite(value):
        yield path
    elif isinstance(value, dict):
        for name, each in value.items():
            yield from _infinite(each, (*path, name))
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from _infinite(each, (*path, index))


@cache
def _validator(part: str) -> Any:
    schema = experiment_schema()
    if part:
        schema = {"$ref": f"#/$defs/{part}", "$defs": schema["$defs"], "$schema": schema["$schema"]}
    return jsonschema.Draft202012Validator(schema)


def _in_words(error: Any) -> str:
    """The library's message without the whole value that it quotes."""
    value = error.instance
    if error.validator == "type":
        expected = error.validator_value
        expected = " or ".join(expected) if isinstance(expected, list) else expected
        return f"{_kind(value)} where {expected} is expected"
    if error.validator == "minItems":
        return "an empty list"
    if error.validator == "additionalProperties":
        patterns = list(error.schema.get("patternProperties", {}))
        wrong = next(name for name in value if not any(re.search(each, name) for each in patterns))
        return (
            f"unexpected name {shorten(wrong)!r}, names look like {'layer_12' if 'layer' in patterns[0] else 'pos_-1'}"
        )
    return str(error.message)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "a boolean", type(None): "null"}
    return names.get(type(value)) or f"{shorten(repr(value), 40)}"
