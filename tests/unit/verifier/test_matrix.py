"""Matrices: the numbers that the published studies print, and what must never be NaN or infinite."""

from __future__ import annotations

import itertools

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fpforensics.common.errors import Error, ReplayError
from fpforensics.verifier.distance import POOLED, Cell
from fpforensics.verifier.matrix import (
    DistanceMatrix,
    Measurement,
    Ratio,
    build_matrices,
    kernel_classes,
    labels,
    ratio,
)

QUANT = ("awq", "awq_marlin", "gptq_marlin")
# Published quantization study (Qwen3-8B, A100 claimed, H100 verified): logprobs, four references, as printed.
QUANT_PREFILL = [
    [[4.41e-02, 6.56e-02, 4.74e00], [4.86e-02, 8.24e-02, 4.73e00], [4.72e00, 4.70e00, 2.29e-02]],
    [[5.70e-02, 5.25e-02, 4.01e00], [3.26e-02, 3.50e-02, 3.98e00], [3.80e00, 3.79e00, 6.34e-02]],
    [[4.12e-02, 3.96e-02, 4.01e00], [4.44e-02, 3.09e-02, 4.01e00], [3.85e00, 3.87e00, 4.14e-02]],
    [[4.20e-02, 3.61e-02, 4.26e00], [7.11e-02, 6.35e-02, 4.28e00], [4.27e00, 4.26e00, 5.51e-02]],
]
QUANT_DECODE = [
    [[3.46e-02, 1.26e-02, 2.55e00], [4.33e-02, 2.42e-02, 2.56e00], [3.24e00, 3.23e00, 2.26e-02]],
    [[2.82e-02, 4.43e-02, 2.07e00], [1.98e-02, 4.63e-02, 2.06e00], [2.39e00, 2.38e00, 1.95e-02]],
    [[2.54e-02, 2.19e-02, 1.90e00], [6.72e-03, 2.20e-02, 1.89e00], [2.21e00, 2.24e00, 4.16e-02]],
    [[4.66e-02, 5.01e-02, 2.86e00], [4.30e-02, 2.65e-02, 2.86e00], [2.40e00, 2.39e00, 3.91e-02]],
]
QUANT_PREFILL_AGGREGATE = [
    ["4.61e-02", "4.85e-02", "4.25e+00"],
    ["4.92e-02", "5.29e-02", "4.25e+00"],
    ["4.16e+00", "4.15e+00", "4.57e-02"],
]
QUANT_DECODE_AGGREGATE = [
    ["3.37e-02", "3.22e-02", "2.34e+00"],
    ["2.82e-02", "2.97e-02", "2.34e+00"],
    ["2.56e+00", "2.56e+00", "3.07e-02"],
]
# Published attention study (H100 claimed, A100 verified): aggregates as printed.
ATTENTION = ("eager", "sdpa", "flash_attention_2")
KEYS_PREFILL = [[8.51e-01, 1.29e01, 1.30e01], [1.27e01, 7.23e-01, 5.94e-01], [1.27e01, 6.87e-01, 8.34e-01]]
LOGPROBS_PREFILL = [[7.48e-01, 3.52, 3.58], [8.38, 2.46e-01, 2.26e-01], [8.37, 1.99e-01, 1.79e-01]]
KEYS_DECODE = [[7.78e-01, 4.48, 4.52], [2.37, 4.53e-01, 4.64e-01], [2.67, 4.93e-01, 4.60e-01]]
LOGPROBS_DECODE = [[2.47e-01, 1.47, 1.47], [9.69e-01, 1.10e-01, 1.11e-01], [1.26, 1.19e-01, 1.12e-01]]
# Published tensor-parallel study (Qwen3-14B, A100 claimed, H100 verified): aggregate as printed.
TP = ("TP=1", "TP=2", "TP=4")
TP_CROSS = [[3.60e-01, 2.88e-01, 2.99e-01], [2.40e-01, 2.33e-01, 3.09e-01], [2.41e-01, 3.25e-01, 3.55e-01]]
TP_WITHIN = [[0.0, 2.53e-01, 2.69e-01], [2.53e-01, 0.0, 3.14e-01], [2.69e-01, 3.14e-01, 0.0]]


def matrix(
    values: object, names: tuple[str, ...], columns: tuple[str, ...] = (), cell: Cell | None = None
) -> DistanceMatrix:
    table = np.array(values, np.float64)
    table = table[None] if table.ndim == 2 else table
    references = tuple(f"ref_{index}" for index in range(len(table)))
    return DistanceMatrix(cell or Cell("prefill", "logprobs"), names, columns or names, references, table)


@pytest.mark.parametrize(
    ("values", "names", "diagonal", "off_diagonal", "snr", "label"),
    [
        (TP_CROSS, TP, "3.16e-01", "2.84e-01", 0.90, "NOT RELIABLY DETECTABLE"),
        (QUANT_PREFILL, QUANT, "4.82e-02", "2.82e+00", 58.44, "CLEARLY DETECTABLE"),
        (QUANT_DECODE, QUANT, "3.14e-02", "1.64e+00", 52.40, "CLEARLY DETECTABLE"),
        (KEYS_PREFILL, ATTENTION, "8.03e-01", "8.78e+00", 10.94, "CLEARLY DETECTABLE"),
        (LOGPROBS_PREFILL, ATTENTION, "3.91e-01", "4.05e+00", 10.34, "CLEARLY DETECTABLE"),
        (KEYS_DECODE, ATTENTION, "5.64e-01", "2.50e+00", 4.43, "MARGINALLY DETECTABLE"),
        (LOGPROBS_DECODE, ATTENTION, "1.56e-01", "9.00e-01", 5.76, "MARGINALLY DETECTABLE"),
    ],
)
def test_published_snr(
    values: list[object], names: tuple[str, ...], diagonal: str, off_diagonal: str, snr: float, label: str
) -> None:
    """The inputs are printed to three digits: what follows from them must bracket what the studies print."""
    table = np.array(values, np.float64)
    half = 0.5 * 10.0 ** (np.floor(np.log10(table)) - 2)
    low, exact, high = (matrix(each, names).to_report() for each in (table - half, table, table + half))
    for name, printed in (("diagonal_mean", diagonal), ("off_diagonal_mean", off_diagonal)):
        last = _last_digit(printed) / 2
        assert getattr(low, name) - last <= float(printed) <= getattr(high, name) + last
    assert exact.off_diagonal_count == 6
    assert low.off_diagonal_mean is not None and high.diagonal_mean is not None
    assert high.off_diagonal_mean is not None and low.diagonal_mean is not None
    assert low.off_diagonal_mean / high.diagonal_mean - 0.005 <= snr
    assert snr <= high.off_diagonal_mean / low.diagonal_mean + 0.005
    assert exact.snr == pytest.approx(snr, rel=3e-3)
    # Without kernel classes all pairs are meaningful, as in the study.
    assert (exact.snr_meaningful, exact.meaningful_count, exact.label) == (exact.snr, 6, label)


def _last_digit(printed: str) -> float:
    return 10.0 ** (int(printed.partition("e")[2]) - 2)


@pytest.mark.parametrize(
    ("values", "table"), [(QUANT_PREFILL, QUANT_PREFILL_AGGREGATE), (QUANT_DECODE, QUANT_DECODE_AGGREGATE)]
)
def test_published_aggregate_is_the_mean_over_references(values: list[object], table: list[list[str]]) -> None:
    for row, printed_row in zip(matrix(values, QUANT).aggregate, table, strict=True):
        for value, printed in zip(row, printed_row, strict=True):
            assert value == pytest.approx(float(printed), abs=_last_digit(printed))


@pytest.mark.parametrize(
    ("values", "table"),
    [
        (
            QUANT_PREFILL,
            [
                ("awq", "gptq_marlin", 4.21, 4.59e-02, 91.7, "CLEARLY DETECTABLE", "Strong"),
                ("awq_marlin", "gptq_marlin", 4.20, 4.93e-02, 85.2, "CLEARLY DETECTABLE", "Strong"),
                ("awq", "awq_marlin", 4.88e-02, 4.95e-02, 1.0, "NOT RELIABLY DETECTABLE", "Not Detectable"),
            ],
        ),
        (
            QUANT_DECODE,
            [
                ("awq_marlin", "gptq_marlin", 2.45, 3.02e-02, 81.1, "CLEARLY DETECTABLE", "Strong"),
                ("awq", "gptq_marlin", 2.45, 3.22e-02, 76.1, "CLEARLY DETECTABLE", "Strong"),
                ("awq", "awq_marlin", 3.02e-02, 3.17e-02, 1.0, "NOT RELIABLY DETECTABLE", "Not Detectable"),
            ],
        ),
    ],
)
def test_published_pairwise_table_in_its_order(
    values: list[object], table: list[tuple[str, str, float, float, float, str, str]]
) -> None:
    pairs = matrix(values, QUANT).pairwise()
    for pair, (a, b, signal, noise, snr, label, second_label) in zip(pairs, table, strict=True):
        assert (pair.a, pair.b, pair.label, pair.second_label) == (a, b, label, second_label)
        assert pair.signal == pytest.approx(signal, rel=2e-3)
        assert pair.noise == pytest.approx(noise, rel=2e-3)
        assert pair.snr == pytest.approx(snr, rel=2e-3, abs=0.05)


def test_pooled_headline_hides_a_pair_that_the_pairwise_table_shows() -> None:
    pairs = {(pair.a, pair.b): pair for pair in matrix(KEYS_PREFILL, ATTENTION).pairwise()}
    hidden = pairs["sdpa", "flash_attention_2"]
    assert hidden.snr is not None and hidden.snr < 1 and hidden.label == "NOT RELIABLY DETECTABLE"


def test_zero_diagonal_is_a_flag_and_never_infinity_in_json() -> None:
    report = matrix(TP_WITHIN, TP).to_report()
    assert report.snr is None and report.snr_infinite and report.label == "TRIVIALLY DETECTABLE"
    assert all(pair.snr is None and pair.snr_infinite for pair in report.pairwise)
    assert [pair.signal for pair in report.pairwise] == sorted((pair.signal for pair in report.pairwise), reverse=True)
    text = msgspec.json.encode(report).decode()
    assert "NaN" not in text and "Infinity" not in text
    assert msgspec.json.decode(text, type=type(report)) == report


def test_meaningful_snr_leaves_out_kernel_classes() -> None:
    whole = matrix(QUANT_PREFILL, QUANT)
    classes = kernel_classes([("awq", "awq_marlin")])
    report = whole.to_report(classes)
    assert (report.off_diagonal_count, report.meaningful_count) == (6, 4)
    assert report.meaningful_mean == pytest.approx(np.mean([4.25, 4.25, 4.16, 4.15]), rel=2e-3)
    assert report.snr_meaningful is not None and report.snr is not None and report.snr_meaningful > report.snr
    assert [pair.same_kernel_class for pair in report.pairwise] == [False, False, True]
    everything = whole.to_report(kernel_classes([("awq", "awq_marlin"), ("awq_marlin", "gptq_marlin")]))
    assert (everything.meaningful_mean, everything.snr_meaningful, everything.label) == (None, None, "")


def test_directed_and_matched_by_id_where_the_lineup_is_larger_than_the_bundle() -> None:
    report = matrix([[9.0, 1.0, 4.0]], ("sdpa",), ("eager", "sdpa", "nf4")).to_report()
    assert (report.diagonal_mean, report.off_diagonal_mean, report.snr) == (1.0, 6.5, 6.5)
    assert [(pair.a, pair.b, pair.signal, pair.noise) for pair in report.pairwise] == [
        ("sdpa", "eager", 9.0, 1.0),
        ("sdpa", "nf4", 4.0, 1.0),
    ]
    directed = matrix([[1.0, 8.0], [2.0, 1.0]], ("a", "b"))
    assert (directed.distance("a", "b"), directed.distance("b", "a")) == (8.0, 2.0)


def test_diagonal_is_where_keys_are_equal_if_they_are_given() -> None:
    """Two experiments give one config two ids; what they are matched by is a third thing."""
    table = np.array([[[5.0, 1.0, 7.0], [3.0, 9.0, np.nan]]])
    keyed = DistanceMatrix(
        Cell("prefill", "logprobs"), ("a1", "a2"), ("h2", "h1", "h4"), ("ref_0",), table, ("1", "2"), ("2", "1", "4")
    )
    report = keyed.to_report([{"1", "2"}])
    assert (report.rows, report.columns) == (("a1", "a2"), ("h2", "h1", "h4"))
    assert (report.diagonal_mean, report.off_diagonal_count) == (2.0, 3)
    assert report.off_diagonal_mean == pytest.approx((5 + 7 + 9) / 3)
    assert (report.meaningful_count, report.meaningful_mean, report.snr_meaningful) == (1, 7.0, 3.5)
    pairs = {(pair.a, pair.b): (pair.signal, pair.noise) for pair in report.pairwise}
    assert pairs == {("1", "2"): (7.0, 2.0), ("1", "4"): (7.0, 1.0)}, "2 and 4 were not measured"
    assert keyed.distance("1", "2") == 5.0 and keyed.distance("2", "4") is None and keyed.distance("a1", "h1") is None


def test_rows_that_share_a_key_are_pooled_in_pairs_and_counted_singly() -> None:
    keyed = DistanceMatrix(
        Cell("prefill", "logprobs"),
        ("a", "b", "c"),
        ("x",),
        ("ref_0",),
        np.array([[[1.0], [3.0], [10.0]]]),
        ("1", "1", "2"),
        ("1",),
    )
    assert (keyed.distance("1", "1"), keyed.diagonal_mean, keyed.off_diagonal()) == (2.0, 2.0, [10.0])
    assert [(pair.a, pair.b, pair.signal, pair.noise) for pair in keyed.pairwise()] == [("1", "2", 10.0, 2.0)]
    with pytest.raises(Error, match="a key is missing"):
        DistanceMatrix(Cell("prefill", "logprobs"), ("a",), ("x",), ("r",), np.ones((1, 1, 1)), ("1", "2"), ("1",))


def test_without_any_diagonal_there_is_no_snr() -> None:
    report = matrix([[1.0]], ("a",), ("b",)).to_report()
    assert (report.diagonal_mean, report.snr, report.snr_infinite, report.label) == (None, None, False, "")
    assert [(pair.noise, pair.snr, pair.label) for pair in report.pairwise] == [(None, None, "")]


def measurement(row: str, column: str, distance: float, reference: str = "ref_0") -> Measurement:
    distances = {
        Cell("decode", "logprobs"): distance,
        Cell("decode", "hidden_states", "1"): distance,
        Cell("decode", "hidden_states", "last"): 3 * distance,
    }
    return Measurement(row=row, column=column, reference_id=reference, distances=distances)


def test_build_keeps_order_pools_layers_and_leaves_holes_empty() -> None:
    built = build_matrices(
        [
            measurement("b", "b", 1.0),
            measurement("b", "a", 2.0),
            measurement("a", "a", 1.0),
            measurement("b", "a", 4.0, "ref_1"),
        ]
    )
    assert [each.cell for each in built] == [
        Cell("decode", "logprobs"),
        Cell("decode", "hidden_states", POOLED),
        Cell("decode", "hidden_states", "1"),
        Cell("decode", "hidden_states", "last"),
    ]
    report = built[1].to_report()
    assert (report.rows, report.columns, report.references) == (("b", "a"), ("b", "a"), ("ref_0", "ref_1"))
    assert report.per_reference == (((2.0, 4.0), (None, 2.0)), ((None, 8.0), (None, None)))
    assert report.aggregate == ((2.0, 6.0), (None, 2.0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_a_distance_that_is_none_is_refused(bad: float) -> None:
    with pytest.raises(ReplayError, match="from 'a' to 'b' on 'ref_0'"):
        build_matrices([measurement("a", "b", bad)])
    if not np.isnan(bad):
        with pytest.raises(ReplayError, match="infinite or negative"):
            matrix([[bad]], ("a",))


def test_measured_twice_or_duplicate_ids_are_refused() -> None:
    with pytest.raises(Error, match="measured twice from 'a' to 'b'"):
        build_matrices([measurement("a", "b", 1.0), measurement("a", "b", 1.0)])
    with pytest.raises(Error, match="duplicate ids"):
        matrix([[1.0, 1.0], [1.0, 1.0]], ("a", "a"))
    with pytest.raises(Error, match="values of shape"):
        matrix([[1.0, 1.0]], ("a", "b"))


def test_labels_change_just_above_each_bound() -> None:
    published = [labels(Ratio(value))[0].split()[0] for value in (3.0, 3.01, 10.0, 10.01, 100.0, 100.01)]
    assert published == ["NOT", "MARGINALLY", "MARGINALLY", "CLEARLY", "CLEARLY", "TRIVIALLY"]
    plan = [labels(Ratio(value))[1] for value in (1.0, 1.01, 3.0, 3.01, 10.0, 10.01)]
    assert plan == ["Not Detectable", "Weak", "Weak", "Moderate", "Moderate", "Strong"]
    assert labels(Ratio()) == ("", "")
    assert labels(ratio(0.0, 0.0))[0] == "NOT RELIABLY DETECTABLE"
    assert ratio(1e-300, 5e-324) == Ratio(infinite=False, value=1e-300 / 5e-324)
    assert ratio(1e300, 5e-324) == Ratio(infinite=True)


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from("abcdef")), max_size=8))
def test_kernel_classes_are_the_transitive_closure_in_any_order(
    pairs: list[tuple[str, str]],
) -> None:
    classes = kernel_classes(pairs)
    joined = {name: {name} for name in "abcdef"}
    for _ in range(6):
        for a, b in pairs:
            joined[a] = joined[b] = joined[a] | joined[b]
            for name in joined[a]:
                joined[name] = joined[a]
    for a, b in itertools.combinations("abcdef", 2):
        assert any(a in members and b in members for members in classes) == (b in joined[a])
    assert all(len(members) > 1 for members in classes)
    assert kernel_classes([(b, a) for a, b in reversed(pairs)]) == classes
