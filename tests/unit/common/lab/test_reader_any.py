"""Any value anywhere is read or refused, and what is read fits the schema."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lab_documents import Layout, make_document
from lab_problems import read_everything, set_at

from fpforensics.common.errors import Error, EvidenceError
from fpforensics.common.lab.schema import experiment_schema

# Fields that the schema types and reading ignores.
IGNORED = {"timestamp", "runtime_seconds", "prompt_text", "token_text"}

# Any JSON value, and what Python's writer makes of what is none.
numbers = st.one_of(
    st.integers(),
    st.integers(-1, 3),
    st.floats(),
    st.sampled_from([2**63 - 1, 2**63, 2**64, 10**400, -(10**400), 1e308, 5e-324, -0.0]),
)

texts = st.one_of(st.text(max_size=20), st.sampled_from(["", "h_1", "ref_0", "layer_1", "pos_-1", "\ud800", "\n", "a" * 5000]))  # fmt: skip

values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=8,
)

BASE = make_document(Layout(steps=2, positions=(-2, -1), hidden=2, keys=2, listed=2))


def paths_of(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    yield path
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from paths_of(inner, (*path, name))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from paths_of(inner, (*path, index))


PATHS = list(paths_of(BASE))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(PATHS), values, st.booleans()), min_size=1, max_size=2))
def test_any_value_anywhere_is_read_or_refused_and_what_is_read_fits_the_schema(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[tuple[str | int, ...], Any, bool]]
) -> None:
    document: Any = copy.deepcopy(BASE)
    for path, value, as_name in changes:
        holder, parent = document, document
        for step in path:
            parent, holder = holder, holder[step] if _has(holder, step) else None
        if not path:
            document = value
        elif not _has(parent, path[-1]):
            continue  # the other change took it away
        elif as_name and isinstance(parent, dict) and isinstance(value, str):
            parent[value] = parent.pop(path[-1])
        else:
            parent[path[-1]] = value
    check_read_or_refused(document, tmp_path_factory.getbasetemp() / "mutated.json")


def check_read_or_refused(document: Any, file: Path) -> None:
    file.write_text(json.dumps(document), encoding="utf-8")
    try:
        read_everything(file)
    except Error as error:
        assert isinstance(error, EvidenceError)
        assert error.diagnostics().isprintable()
        assert len(error.diagnostics()) < 500
        return
    for problem in jsonschema.Draft202012Validator(experiment_schema()).iter_errors(json.loads(file.read_text())):
        assert problem.absolute_path and problem.absolute_path[-1] in IGNORED, problem.message


TINY = make_document(Layout((("h_1", "H100", 1),), ("ref_0",), 1, True, 1, (-1,), (1,), 1, 1, 1))

PLAIN: list[Any] = [None, True, -1, 0, 1, 1.5, "", "x", [], [1], {}, {"x": 1}, 2**63, 10**400, float("nan"), "\ud800"]


@pytest.mark.parametrize("path", list(paths_of(TINY)), ids=str)
def test_each_kind_of_value_at_each_path(tmp_path: Path, path: tuple[str | int, ...]) -> None:
    for value in PLAIN:
        document = copy.deepcopy(TINY)
        if path:
            set_at(*path, to=value)(document)
        check_read_or_refused(document if path else value, tmp_path / "a.json")


def _has(holder: Any, step: str | int) -> bool:
    if isinstance(holder, dict):
        return step in holder
    return isinstance(holder, list) and isinstance(step, int) and step < len(holder)
