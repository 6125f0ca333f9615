"""The published recordings: every number that the studies print, and what plain loops over the raw JSON give."""

from __future__ import annotations

from itertools import combinations, product
from pathlib import Path

import pytest
from lab_documents import Json, find_run, lab_document, lab_path, mean, naive_logprobs, naive_vectors

from fpforensics.common.lab.reader import open_experiment
from fpforensics.verifier.analysis import Canonical, CellAnalysis, analyze

A100, H100, BATCH = "tensor_parallel_A100.json", "tensor_parallel_H100.json", "batch_size_4gpus.json"
TP = ("tp1", "tp2", "tp4")
REFERENCES = ("ref_0", "ref_1", "ref_2")

# As printed by the tensor-parallel study, within one H100.
WITHIN = {
    "ref_0": [
        ["0.00e+00", "2.39e-01", "3.46e-01"],
        ["2.39e-01", "0.00e+00", "3.69e-01"],
        ["3.46e-01", "3.69e-01", "0.00e+00"],
    ],
    "ref_1": [
        ["0.00e+00", "1.72e-01", "2.01e-01"],
        ["1.72e-01", "0.00e+00", "3.07e-01"],
        ["2.01e-01", "3.07e-01", "0.00e+00"],
    ],
    "ref_2": [
        ["0.00e+00", "3.48e-01", "2.59e-01"],
        ["3.48e-01", "0.00e+00", "2.66e-01"],
        ["2.59e-01", "2.66e-01", "0.00e+00"],
    ],
    "aggregate": [
        ["0.00e+00", "2.53e-01", "2.69e-01"],
        ["2.53e-01", "0.00e+00", "3.14e-01"],
        ["2.69e-01", "3.14e-01", "0.00e+00"],
    ],
}
# And of an A100 as claimed (rows) against an H100 as verified (columns).
ACROSS = {
    "ref_0": [
        ["3.21e-01", "3.34e-01", "2.92e-01"],
        ["2.46e-01", "3.42e-01", "4.54e-01"],
        ["2.77e-01", "4.07e-01", "4.13e-01"],
    ],
    "ref_1": [
        ["3.34e-01", "3.44e-01", "3.23e-01"],
        ["1.45e-01", "1.33e-01", "2.70e-01"],
        ["2.29e-01", "2.24e-01", "3.07e-01"],
    ],
    "ref_2": [
        ["4.27e-01", "1.87e-01", "2.83e-01"],
        ["3.29e-01", "2.24e-01", "2.03e-01"],
        ["2.16e-01", "3.44e-01", "3.43e-01"],
    ],
    "aggregate": [
        ["3.60e-01", "2.88e-01", "2.99e-01"],
        ["2.40e-01", "2.33e-01", "3.09e-01"],
        ["2.41e-01", "3.25e-01", "3.55e-01"],
    ],
}


def tensor_parallel(claimed: str, observed: str | None, canonical: Canonical = "first", top: int = 5) -> CellAnalysis:
    """The study's only cell: prefill, logprobs."""
    with open_experiment(lab_path(claimed)) as one:
        if observed is None:
            found = analyze(one, canonical=canonical, top=top)
        else:
            with open_experiment(lab_path(observed)) as other:
                found = analyze(one, other, canonical=canonical, top=top)
    assert [(phase, *signals) for phase, signals in found.items()] == [("prefill", "logprobs")]
    return found["prefill"]["logprobs"]


def printed(table: object) -> list[list[str]]:
    assert isinstance(table, tuple)
    return [[f"{value:.2e}" for value in row] for row in table]


def test_within_one_machine_as_printed() -> None:
    cell = tensor_parallel(H100, None)
    assert {name: printed(table) for name, table in cell.per_reference.items()} == {
        name: WITHIN[name] for name in REFERENCES
    }
    assert printed(cell.matrix) == WITHIN["aggregate"]
    assert cell.configs == cell.observed_configs == ("H100_tp1", "H100_tp2", "H100_tp4")
    assert (cell.diagonal_mean, f"{cell.off_diagonal_mean:.2e}") == (0.0, "2.78e-01")
    assert (cell.snr, cell.snr_infinite) == (None, True), "printed: inf"
    assert cell.off_diagonal_count == 6


def test_across_machines_as_printed() -> None:
    cell = tensor_parallel(A100, H100)
    assert {name: printed(table) for name, table in cell.per_reference.items()} == {
        name: ACROSS[name] for name in REFERENCES
    }
    assert printed(cell.matrix) == ACROSS["aggregate"]
    assert (cell.configs, cell.observed_configs) == (
        ("A100_tp1", "A100_tp2", "A100_tp4"),
        ("H100_tp1", "H100_tp2", "H100_tp4"),
    )
    assert (f"{cell.diagonal_mean:.2e}", f"{cell.off_diagonal_mean:.2e}") == ("3.16e-01", "2.84e-01")
    assert (f"{cell.snr:.2f}", cell.snr_infinite) == ("0.90", False)
    assert cell.label == "NOT RELIABLY DETECTABLE"
    assert cell.kernel_classes == () and cell.snr_meaningful == cell.snr
    nearest = [min(range(3), key=lambda column: row[column] or 0.0) for row in cell.matrix]
    assert nearest == [1, 1, 0], "the claimed config is the nearest in one row of three"


def naive_table(
    claimed: Json, observed: Json, gpus: tuple[str, str], reference: str, canonical: Canonical, top: int
) -> list[list[float]]:
    first = find_run(claimed, f"{gpus[0]}_tp1", reference)
    table = []
    for row in TP:
        ours = find_run(claimed, f"{gpus[0]}_{row}", reference)
        source = first if canonical == "first" else ours
        runs = (find_run(observed, f"{gpus[1]}_{column}", reference) for column in TP)
        distances = [naive_logprobs(ours, theirs, "prefill", source, top) for theirs in runs]
        assert all(without == 0 for _, without in distances)
        table.append([distance for distance, _ in distances if distance is not None])
    return table


@pytest.mark.parametrize("top", [1, 2, 5, 100])
@pytest.mark.parametrize("canonical", ["first", "claimed"])
@pytest.mark.parametrize(("claimed", "observed"), [(H100, None), (A100, None), (A100, H100), (H100, A100)])
def test_as_a_plain_loop_over_the_raw_numbers(
    claimed: str, observed: str | None, canonical: Canonical, top: int
) -> None:
    """Each reference, the mean, the diagonal, the rest and their ratio, to six digits and more."""
    cell = tensor_parallel(claimed, observed, canonical, top)
    documents = lab_document(claimed), lab_document(observed or claimed)
    gpus = claimed[-9:-5], (observed or claimed)[-9:-5]
    tables = {each: naive_table(*documents, gpus, each, canonical, top) for each in REFERENCES}
    for reference, table in tables.items():
        assert [list(row) for row in cell.per_reference[reference]] == [pytest.approx(row, rel=1e-9) for row in table]
    whole = [[mean([tables[each][i][j] for each in REFERENCES]) for j in range(3)] for i in range(3)]
    assert [list(row) for row in cell.matrix] == [pytest.approx(row, rel=1e-9) for row in whole]
    diagonal = mean([whole[i][i] for i in range(3)])
    rest = mean([whole[i][j] for i, j in product(range(3), repeat=2) if i != j])
    assert cell.diagonal_mean == pytest.approx(diagonal, rel=1e-9)
    assert cell.off_diagonal_mean == pytest.approx(rest, rel=1e-9)
    assert cell.snr == (pytest.approx(rest / diagonal, rel=1e-9) if diagonal else None)
    assert cell.uncompared == 0
    for pair in cell.pairwise:
        i, j = (cell.configs.index(name) for name in pair.pair)
        signal, noise = mean([whole[i][j], whole[j][i]]), mean([whole[i][i], whole[j][j]])
        assert pair.signal == pytest.approx(signal, rel=1e-9)
        assert pair.noise == pytest.approx(noise, rel=1e-9)
        assert pair.snr == (pytest.approx(signal / noise, rel=1e-9) if noise else None)
        assert pair.snr_infinite == (noise == 0)


def test_top_and_canonical_make_a_difference_there() -> None:
    """The control of the test above: were they ignored, it would have to fail."""
    assert len({tensor_parallel(A100, H100, "first", top).matrix for top in (1, 2, 5)}) == 3
    assert tensor_parallel(A100, H100, "claimed", 2).matrix != tensor_parallel(A100, H100, "first", 2).matrix


KNOWN = {
    ("A100-SXM", "A40"): "0.495769",
    ("A100-SXM", "H100-PCIe"): "0.526376",
    ("A100-SXM", "L40S"): "0.449527",
    ("H100-PCIe", "A40"): "0.548924",
    ("A40", "L40S"): "0.576388",
    ("H100-PCIe", "L40S"): "0.456233",
}


@pytest.fixture(scope="module")
def batch_size() -> CellAnalysis:
    with open_experiment(lab_path(BATCH)) as experiment:
        found = analyze(experiment)
    assert [(phase, *signals) for phase, signals in found.items()] == [("prefill", "hidden_states")]
    cell = found["prefill"]["hidden_states"]
    assert tuple(cell.per_layer) == ("layer_28",)
    assert cell.per_layer["layer_28"].matrix == cell.matrix, "of one layer, the mean over layers is that layer"
    return cell


def test_distances_between_four_gpus(batch_size: CellAnalysis) -> None:
    names = batch_size.configs
    for (one, other), distance in KNOWN.items():
        i, j = names.index(f"{one}_bs1"), names.index(f"{other}_bs1")
        assert f"{batch_size.matrix[i][j]:.6f}" == f"{batch_size.matrix[j][i]:.6f}" == distance


def test_every_distance_as_a_plain_loop(batch_size: CellAnalysis) -> None:
    document = lab_document(BATCH)
    runs = {name: find_run(document, name) for name in batch_size.configs}
    for (i, one), (j, other) in combinations(enumerate(batch_size.configs), 2):
        naive = naive_vectors(runs[one], runs[other], "prefill", "hidden_states", "layer_28")
        assert batch_size.matrix[i][j] == batch_size.matrix[j][i] == pytest.approx(naive, rel=1e-9)
        assert (batch_size.matrix[i][j] == 0) == (naive == 0)


def test_repetitions_were_bit_identical(batch_size: CellAnalysis) -> None:
    assert batch_size.reproducible == dict.fromkeys(batch_size.configs, True)
    document = lab_document(BATCH)
    for name in batch_size.configs:
        first, *others = (find_run(document, name, "ref_0", repetition)["prefill"] for repetition in range(3))
        assert others == [first, first]


def test_kernel_classes_of_four_gpus(batch_size: CellAnalysis) -> None:
    """No distance between batch sizes where the same kernel ran; they are left out of the meaningful pairs."""
    assert set(batch_size.kernel_classes) == {
        ("H100-PCIe_bs1", "H100-PCIe_bs2", "H100-PCIe_bs4"),
        ("A40_bs2", "A40_bs4"),
    }
    assert (batch_size.off_diagonal_count, batch_size.meaningful_count) == (12 * 11, 12 * 11 - 6 - 2)


def test_the_plans_questions_of_four_gpus(batch_size: CellAnalysis) -> None:
    """Six pairs of machines at three batch sizes; two changes of batch size on each of four machines."""
    document = lab_document(BATCH)

    def naive(one: str, other: str) -> float:
        runs = find_run(document, one), find_run(document, other)
        return naive_vectors(*runs, "prefill", "hidden_states", "layer_28")

    assert len(batch_size.cross_hardware_baseline) == 18
    assert all(
        len(set(each.hardware)) == 2 and len(set(each.values)) == 1 for each in batch_size.cross_hardware_baseline
    )
    baseline = [naive(*each.configs) for each in batch_size.cross_hardware_baseline]
    assert [each.distance for each in batch_size.cross_hardware_baseline] == pytest.approx(baseline, rel=1e-9)
    noise = mean(baseline)
    gpus = ("A100-SXM", "H100-PCIe", "A40", "L40S")
    assert {each.configs for each in batch_size.within_hardware} == {
        (f"{gpu}_bs1", f"{gpu}_bs{value}") for gpu in gpus for value in (2, 4)
    }
    for each in batch_size.within_hardware:
        assert each.distance == pytest.approx(naive(*each.configs), rel=1e-9)
        assert each.snr == pytest.approx(naive(*each.configs) / noise, rel=1e-9)
    # A variant on one machine against the baseline of another, either way.
    assert len(batch_size.across_hardware) == 12 * 2
    for each in batch_size.across_hardware:
        assert sorted(value == "1" for value in each.values) == [False, True]
        assert each.distance == pytest.approx(naive(*each.configs), rel=1e-9)
        assert each.snr == pytest.approx(naive(*each.configs) / noise, rel=1e-9)


def test_the_small_examples_answer_every_question() -> None:
    folder = Path(__file__).parents[4] / "examples" / "experiments"
    names = [folder / f"attention_{kernels}.json.gz" for kernels in ("avx512", "avx2")]
    assert sum(name.stat().st_size for name in names) < 200_000
    with open_experiment(names[0]) as claimed, open_experiment(names[1]) as observed:
        claimed.validate()
        observed.validate()
        found = analyze(claimed, observed)
    for phase in ("prefill", "decode"):
        assert list(found[phase]) == ["logprobs", "key_vectors", "hidden_states"]
        for cell in found[phase].values():
            assert all(cell.reproducible.values()) and not cell.unanswered
            counts = [len(each) for each in (cell.cross_hardware_baseline, cell.within_hardware, cell.across_hardware)]
            assert counts == [3, 4, 4]
        # What the examples are there to show: seen in the early block's keys, and at the logits not.
        keys, logits = ((found[phase][signal].snr or 0.0) for signal in ("key_vectors", "logprobs"))
        assert keys > 2.5 and logits < 1.0
