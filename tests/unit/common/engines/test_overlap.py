"""How much of a window spans cover: properties, and the bound under which a run is no result."""

from __future__ import annotations

import math

import msgspec
import pytest
from fake_engine import WORK
from hypothesis import given
from hypothesis import strategies as st

from fpforensics.common.engines.overlap import MIN_OVERLAP, Burst, covered, measure, require_overlap
from fpforensics.common.errors import OverlapError

# Whole numbers: sums of lengths are exact.
MOMENTS = st.integers(-50, 50).map(float)
SPANS = st.lists(st.tuples(MOMENTS, MOMENTS).map(lambda two: (min(two), max(two))), max_size=8)
WINDOW = st.tuples(st.integers(-20, 0).map(float), st.integers(1, 20).map(float))


@given(SPANS, WINDOW)
def test_covered_is_the_count_of_covered_unit_steps(
    spans: list[tuple[float, float]], window: tuple[float, float]
) -> None:
    steps = range(int(window[0]), int(window[1]))
    assert covered(spans, window) == sum(any(a <= step and step + 1 <= b for a, b in spans) for step in steps)


@given(SPANS, SPANS, WINDOW)
def test_more_spans_cover_no_less(
    some: list[tuple[float, float]], more: list[tuple[float, float]], window: tuple[float, float]
) -> None:
    both = covered([*some, *more], window)
    assert max(covered(some, window), covered(more, window)) <= both <= window[1] - window[0]
    assert both <= covered(some, window) + covered(more, window)


@given(st.lists(SPANS, min_size=1, max_size=4), WINDOW)
def test_one_worker_is_never_busier_than_all_overlap(
    workers: list[list[tuple[float, float]]], window: tuple[float, float]
) -> None:
    found = measure([[Burst(a, b, 2) for a, b in spans] for spans in workers], window)
    assert 0 <= found.busy <= found.overlap <= 1
    assert (found.products > 0) >= (found.overlap > 0)
    if len(workers) == 1:
        assert found.busy == found.overlap


def test_what_lies_outside_is_not_counted() -> None:
    bursts = [Burst(0.0, 1.0, 5), Burst(2.0, 4.0, 3), Burst(9.0, 11.0, 4), Burst(12.0, 13.0, 7)]
    found = measure([bursts, []], (3.0, 10.0))
    assert found.overlap == pytest.approx(2 / 7)
    assert found.busy == pytest.approx(1 / 7)
    assert found.products == 7


@pytest.mark.parametrize("window", [(1.0, 1.0), (2.0, 1.0)])
def test_no_time_is_no_overlap(window: tuple[float, float]) -> None:
    assert measure([[Burst(0.0, 5.0, 1)]], window) == (0.0, 0.0, 0)


@pytest.mark.parametrize("overlap", [0.0, math.nextafter(MIN_OVERLAP, 0), math.nan])
def test_too_little_is_refused_with_its_size(overlap: float) -> None:
    with pytest.raises(OverlapError) as refused:
        require_overlap(msgspec.structs.replace(WORK, overlap=overlap))
    assert f"overlapped {overlap:.1%} of the 0.500 s" in refused.value.message
    assert "30%" in refused.value.message
    assert refused.value.hint


@pytest.mark.parametrize("overlap", [MIN_OVERLAP, 0.5, 1.0])
def test_enough_passes(overlap: float) -> None:
    require_overlap(msgspec.structs.replace(WORK, overlap=overlap))
