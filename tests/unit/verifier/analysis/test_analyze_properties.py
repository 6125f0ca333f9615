"""What must hold of any experiment: the same against itself, scaled, and in any order."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lab_documents import Json, Layout, make_document, write_document

from fpforensics.common.lab.reader import open_experiment
from fpforensics.verifier.analysis import Analysis, Canonical, CellAnalysis, analyze

canonicals = st.sampled_from(["claimed", "first"])


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    values = draw(st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True))
    hardware = draw(st.lists(st.sampled_from(["A100", "H100"]), min_size=len(values), max_size=len(values)))
    return Layout(
        configs=tuple((f"c{value}", gpu, value) for value, gpu in zip(values, hardware, strict=True)),
        references=tuple(f"ref_{i}" for i in range(draw(st.integers(1, 2)))),
        prefill=draw(st.booleans()),
        steps=draw(st.integers(1, 3)),
        positions=tuple(draw(st.lists(st.integers(-9, -1), min_size=1, max_size=3, unique=True))),
        layers=tuple(draw(st.lists(st.integers(1, 40), min_size=1, max_size=2, unique=True))),
        hidden=draw(st.integers(0, 5)),
        keys=draw(st.integers(1, 3)),
        listed=draw(st.sampled_from([0, 4, 5])),  # of 7: any two lists have an id in common
        seed=draw(st.integers(0, 1000)),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("documents")


def analyzed(folder: Path, *documents: Json, canonical: Canonical = "claimed") -> Analysis:
    with ExitStack() as files:
        paths = (write_document(each, folder / f"{side}.json") for side, each in enumerate(documents))
        return analyze(*[files.enter_context(open_experiment(path)) for path in paths], canonical=canonical)


def every_cell(found: Analysis) -> Iterator[tuple[tuple[str, ...], CellAnalysis]]:
    for phase, signals in found.items():
        for signal, cell in signals.items():
            yield (phase, signal), cell
            for layer, each in cell.per_layer.items():
                yield (phase, signal, layer), each


def entries(cell: CellAnalysis) -> dict[tuple[str, str], float]:
    table = zip(product(cell.configs, cell.observed_configs), sum(cell.matrix, ()), strict=True)
    return {pair: value for pair, value in table if value is not None}


def about(value: float | None) -> Any:
    return None if value is None else pytest.approx(value, rel=1e-12)


@settings(max_examples=40, deadline=None)
@given(layout=layouts(), canonical=canonicals)
def test_an_experiment_is_at_no_distance_from_itself(folder: Path, layout: Layout, canonical: Canonical) -> None:
    """Alone or given twice, the diagonal is exactly zero, and the rest of the matrix is the same."""
    document = make_document(layout)
    alone = dict(every_cell(analyzed(folder, document, canonical=canonical)))
    twice = dict(every_cell(analyzed(folder, document, document, canonical=canonical)))
    assert alone and alone.keys() == twice.keys()
    for key, cell in alone.items():
        assert [cell.matrix[i][i] for i in range(len(layout.configs))] == [0.0] * len(layout.configs)
        assert [twice[key].matrix[i][i] for i in range(len(layout.configs))] == [0.0] * len(layout.configs)
        assert cell.diagonal_mean == twice[key].diagonal_mean == 0.0
        assert entries(twice[key]) == pytest.approx(entries(cell), rel=1e-12)
        assert cell.kernel_classes == (), "what is at a distance is not the same kernel"
        assert twice[key].kernel_classes == (), "a class is of one experiment's configs: of several values"
        if len(layout.configs) > 1 and entries(cell).keys() - {(name, name) for name in cell.configs}:
            assert (cell.snr, cell.snr_infinite) == (None, True)


def scaled(value: Any, factor: float, inside: bool = False) -> Any:
    """Every number of every vector and of every log-probability; ids and steps stay."""
    if isinstance(value, dict):
        return {
            name: each if name == "token_ids" else scaled(each, factor, inside or name in ("prefill", "decode_steps"))
            for name, each in value.items()
        }
    if isinstance(value, list):
        return [scaled(each, factor, inside) for each in value]
    return value * factor if inside and isinstance(value, float) else value


@settings(max_examples=30, deadline=None)
@given(layout=layouts(), exponent=st.integers(-30, 30))
def test_doubling_every_number_doubles_every_distance(folder: Path, layout: Layout, exponent: int) -> None:
    """Exactly, for a power of two only moves exponents."""
    document, factor = make_document(layout), 2.0**exponent
    before = dict(every_cell(analyzed(folder, document)))
    after = dict(every_cell(analyzed(folder, document | {"runs": scaled(document["runs"], factor)})))
    assert before.keys() == after.keys()
    for key, cell in before.items():
        assert entries(after[key]) == {pair: distance * factor for pair, distance in entries(cell).items()}


@settings(max_examples=40, deadline=None)
@given(layout=layouts(), data=st.data(), canonical=canonicals)
def test_order_of_configs_and_runs_only_permutes_the_matrix(
    folder: Path, layout: Layout, data: st.DataObject, canonical: Canonical
) -> None:
    """With the first config's ids as canonical, the first config has to stay."""
    document = make_document(layout)
    other = copy.deepcopy(document)
    kept = other["configurations"][:1] if canonical == "first" else []
    other["configurations"] = kept + data.draw(st.permutations(other["configurations"][len(kept) :]))
    other["runs"] = data.draw(st.permutations(other["runs"]))
    before, after = (dict(every_cell(analyzed(folder, each, canonical=canonical))) for each in (document, other))
    for key, cell in before.items():
        moved = after[key]
        assert moved.configs == tuple(each["config_id"] for each in other["configurations"])
        assert entries(moved) == pytest.approx(entries(cell), rel=1e-12)
        assert moved.snr == about(cell.snr)
        assert moved.reproducible == cell.reproducible


@settings(max_examples=40, deadline=None)
@given(layout=layouts(), seed=st.integers(1001, 2000))
def test_vectors_are_as_far_there_as_back(folder: Path, layout: Layout, seed: int) -> None:
    """Of vectors a distance has no direction: exchanging the experiments transposes the matrix."""
    claimed, observed = make_document(layout), make_document(Layout(**(vars(layout) | {"seed": seed})))
    forth, back = dict(every_cell(analyzed(folder, claimed, observed))), dict(every_cell(analyzed(folder, observed, claimed)))  # fmt: skip
    for key, cell in forth.items():
        if key[1] != "logprobs":
            transposed = {(column, row): distance for (row, column), distance in entries(back[key]).items()}
            assert entries(cell) == pytest.approx(transposed, rel=1e-12)
            assert cell.snr == about(back[key].snr)
