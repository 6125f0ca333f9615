"""The table of ``bench/detection.py`` from the committed measurements: its figures, and controls for every method."""

from __future__ import annotations

from pathlib import Path

import detectors
import numpy as np
import pytest
import standings
from detectors import EAGER, METHODS, SDPA, SIZES, Method, Recorded
from roc import auc

DATA = Path(__file__).parents[2] / "assets" / "h100" / "detection.npz"
BY_NAME = {method.name: method for method in METHODS}
GROSS = ("quant=bnb-nf4", "wrong-prompt")
RAN = (EAGER, "dtype=fp16", "emulate_tp=2", "emulate_tp=4", "quant=bnb-nf4", "quant=torchao-int8", "wrong-prompt")
# AUC at 16 positions of one prompt, sdpa claimed, in the order of RAN: the table's own figures.
FIGURES = {
    "SNR rule: logprobs (top 20)": (0.534, 0.247, 0.570, 0.573, 1.0, 0.978, 1.0),
    "SNR rule: keys, five layers": (0.794, 0.993, 0.949, 0.976, 1.0, 1.0, 1.0),
    "SNR rule: last hidden state": (0.558, 0.190, 0.656, 0.678, 1.0, 1.0, 1.0),
    "TOPLOC, 32 tokens a proof": (0.529, 0.319, 0.610, 0.609, 1.0, 1.0, 1.0),
    "Activation-DiFR, 2 numbers": (0.525, 0.276, 0.581, 0.607, 1.0, 1.0, 1.0),
    "Activation-DiFR, 8 numbers": (0.541, 0.329, 0.589, 0.620, 1.0, 1.0, 1.0),
    "Token-DiFR": (0.523, 0.478, 0.523, 0.480, 0.955, 0.704, 1.0),
    "SNR rule moved to block 1": (0.896, 0.999, 0.997, 1.0, 1.0, 1.0, 1.0),
    "ours": (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0),
    "ours, 4 numbers a layer": (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0),
}


@pytest.fixture(scope="module")
def recorded() -> Recorded:
    return Recorded.load(DATA)


def auc_of(recorded: Recorded, name: str, ran: str, size: int, claimed: str = SDPA) -> float:
    score = BY_NAME[name].score
    honest, lies = score(recorded, claimed, claimed, size), score(recorded, claimed, ran, size)
    assert honest is not None
    assert lies is not None
    return auc(honest, lies)


def test_what_is_kept_is_small_and_whole(recorded: Recorded) -> None:
    assert DATA.stat().st_size < 1 << 20
    assert recorded.measured.shape[2] == 24
    assert set(recorded.pairs) >= {(SDPA, run) for run in recorded.runs} | {(EAGER, SDPA), (EAGER, EAGER)}
    assert all(np.isfinite(table).all() for table in (recorded.measured, recorded.margins, *recorded.toploc.values()))


def test_batches_do_not_overlap_and_are_small_beside_their_pool(recorded: Recorded) -> None:
    assert standings.batch_to_pool(recorded) <= 0.10
    for size in SIZES:
        taken = [position for window in detectors.batches(size) for position in range(64)[window]]
        assert len(taken) == len(set(taken)) == 64 // size * size
        assert taken[-1] == 63


@pytest.mark.parametrize(("k", "within"), [(detectors.FULL, 0.011), (16, 0.022)])
def test_shrinking_keeps_values(k: int, within: float) -> None:
    values = np.concatenate([[0.0], np.geomspace(1e-5, 1e4, 999)])
    found = detectors.expand(detectors.shrink(values, k), k)
    assert found[0] == 0
    np.testing.assert_allclose(found, values, rtol=within)


@pytest.mark.parametrize("name", FIGURES)
def test_the_tables_figures_are_those_of_the_recordings(recorded: Recorded, name: str) -> None:
    found = [auc_of(recorded, name, ran, 16) for ran in RAN]
    np.testing.assert_allclose(found, FIGURES[name], atol=6e-4)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_controls(recorded: Recorded, method: Method) -> None:
    """Honest evidence is not told from itself, and no method misses another prompt."""
    score = method.score(recorded, SDPA, SDPA, 16)
    assert score is not None
    assert np.isfinite(score).all()
    assert auc(score, score) == 0.5
    assert auc_of(recorded, method.name, "wrong-prompt", 16) > 0.99


def test_others_see_four_bit_weights_for_fewer_bytes(recorded: Recorded) -> None:
    """Where another one wins: gross lies, from one position, one replay and few bytes."""
    assert auc_of(recorded, "TOPLOC, 32 tokens a proof", "quant=bnb-nf4", 1) > 0.999
    assert auc_of(recorded, "Activation-DiFR, 8 numbers", "quant=bnb-nf4", 1) > 0.999
    assert auc_of(recorded, "ours, 1 number a layer", "quant=bnb-nf4", 1) < 0.98
    assert auc_of(recorded, "TOPLOC, 32 tokens a proof", "quant=torchao-int8", 1) > auc_of(
        recorded, "ours", "quant=torchao-int8", 1
    )


@pytest.mark.parametrize(
    ("claimed", "ran"), [(SDPA, EAGER), (SDPA, "emulate_tp=2"), (SDPA, "emulate_tp=4"), (EAGER, SDPA)]
)
def test_only_the_first_blocks_tell_kernels_apart(recorded: Recorded, claimed: str, ran: str) -> None:
    """At 16 positions; figures that the README may quote."""
    for name in ("ours", "ours, 16 numbers a layer", "ours, 4 numbers a layer"):
        assert auc_of(recorded, name, ran, 16, claimed) > 0.999
    for name in METHODS:
        if name.name.startswith(("TOPLOC", "Activation", "Token", "SNR rule: l")):
            assert auc_of(recorded, name.name, ran, 16, claimed) < 0.7


def test_fixed_thresholds_pass_everything_but_gross_lies(recorded: Recorded) -> None:
    for ran in recorded.runs:
        for rejected in (detectors.rejected_by_toploc, lambda *args: detectors.rejected_by_snr(*args, "keys")):
            assert rejected(recorded, SDPA, ran, 16).mean() == (1.0 if ran in GROSS else 0.0)


def test_our_own_level_accuses_nobody_honest_and_catches_every_lie(recorded: Recorded) -> None:
    for ran in recorded.runs:
        assert detectors.rejected_by_us(recorded, SDPA, ran, 16).mean() == (0.0 if ran == SDPA else 1.0)


def test_the_table_prints_every_method_on_every_task(recorded: Recorded, capsys: pytest.CaptureFixture[str]) -> None:
    standings.print_standings(recorded, replicates=20)
    printed = capsys.readouterr().out
    for method in METHODS:
        assert printed.count(f"\n{method.name:<28}") == 1 + len(standings.tasks(recorded))
    assert "nan" not in printed
