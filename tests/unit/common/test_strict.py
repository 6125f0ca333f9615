from __future__ import annotations

import json
import tracemalloc

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fpforensics.common.errors import EvidenceError
from fpforensics.common.strict import Limits, check_nesting, decode_json, parse_json

LIMITS = Limits(nesting=8)
PRINTABLE = st.text(st.characters(categories=["L", "N", "P", "S"]), max_size=20)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | PRINTABLE,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(PRINTABLE, inner, max_size=4),
    max_leaves=10,
)


class Inner(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    numbers: tuple[int, ...]


class Outer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    inner: Inner
    weight: float = 0.0


def depth(value: object) -> int:
    if isinstance(value, dict):
        return 1 + max(map(depth, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(depth, value), default=0)
    return 0


@settings(deadline=None)
@given(VALUES, st.sampled_from([(",", ":"), (" ,\n", " : ")]), st.booleans())
def test_strict_json_reads_what_json_writes(value: object, separators: tuple[str, str], ascii_only: bool) -> None:
    data = json.dumps(value, separators=separators, ensure_ascii=ascii_only).encode()
    assert parse_json(data, "test", Limits()) == value


@settings(deadline=None)
@given(VALUES)
def test_the_scan_finds_the_depth_that_the_parser_would(value: object) -> None:
    data = json.dumps(value).encode()
    check_nesting(data, "test", Limits(nesting=depth(value)))
    if depth(value):
        with pytest.raises(EvidenceError, match="nests deeper"):
            check_nesting(data, "test", Limits(nesting=depth(value) - 1))


@settings(deadline=None)
@given(st.binary(max_size=100) | st.text(alphabet='{}[]",:\\ntrue0123.eE-', max_size=60).map(str.encode))
@example(b'"\\')
@example(b'["\\u')
@example(b"\xef\xbb\xbf{}")
@example(b"1" * 50)
def test_garbage_is_an_evidence_error_or_a_value(data: bytes) -> None:
    try:
        parse_json(data, "test", LIMITS)
    except EvidenceError as error:
        assert error.diagnostics().isprintable()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a":1,"a":2}', "the key 'a' twice"),
        ('{"a":{"b":1,"c":2,"b":1}}', "the key 'b' twice"),
        ('{"a":1,"\\u0061":2}', "the key 'a' twice"),
        ("[NaN]", "the number NaN"),
        ("[Infinity]", "the number Infinity"),
        ("[-Infinity]", "the number -Infinity"),
        ("[1e999]", "1e999, which is infinite"),
        ("[" + "9" * 5000 + "]", "an integer of 5000 digits"),
        ("[1,]", "is not JSON"),
        ("{} {}", "is not JSON"),
        ('["\\u001b[31m"]', r"unprintable characters at \$\[0\]"),
        ('{"a":{"\\u202e":1}}', r"unprintable characters at \$\.a"),
        ('["\\ud800"]', "unprintable"),
        ('{"a":["' + "x" * 2000 + '"]}', r"2000 characters at \$\.a\[0\]"),
        ("[" * 9 + "]" * 9, "deeper than 8"),
    ],
)
def test_refused(text: str, message: str) -> None:
    with pytest.raises(EvidenceError, match=message) as caught:
        parse_json(text.encode(), "manifest", LIMITS)
    assert caught.value.diagnostics().isprintable()
    assert len(caught.value.diagnostics()) < 400


def test_types_are_strict_and_errors_carry_the_path() -> None:
    assert decode_json(b'{"inner":{"numbers":[1,2]},"weight":3}', Outer, "test", LIMITS) == Outer(Inner((1, 2)), 3.0)
    for data, path in (
        (b'{"inner":{"numbers":[1,"2"]}}', r"\$\.inner\.numbers\[1\]"),
        (b'{"inner":{"numbers":[1.0]}}', r"\$\.inner\.numbers\[0\]"),
        (b'{"inner":{"numbers":[true]}}', r"\$\.inner\.numbers\[0\]"),
        (b'{"inner":{"numbers":[],"more":1}}', r"`more` at `\$\.inner`"),
        (b'{"inner":{}}', r"\$\.inner"),
    ):
        with pytest.raises(EvidenceError, match=path):
            decode_json(data, Outer, "test", LIMITS)


def test_too_many_bytes_are_not_looked_at() -> None:
    with pytest.raises(EvidenceError, match="of 11 bytes"):
        parse_json(b"[" * 11, "test", Limits(manifest_bytes=10))


@pytest.mark.parametrize("unit", [b"[", b'"\\"', b'"",', b"\\", b'{"a":'])
def test_the_scan_takes_little_memory_whatever_it_reads(unit: bytes) -> None:
    data = unit * ((4 << 20) // len(unit))
    tracemalloc.start()
    try:
        with pytest.raises(EvidenceError):
            parse_json(data, "test", LIMITS)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 40 << 20
