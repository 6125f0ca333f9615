"""``bench/fresh.py``: windows say what the positions in them say, in either phase and in both together."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import decision
import evidence
import fresh
import numpy as np
import pytest

from fpforensics.verifier.profile import built_in_profile

SDPA, EAGER, INT8 = decision.SDPA, decision.EAGER, "quant=torchao-int8"
ROWS = (SDPA, EAGER, INT8)
MEMBERS = (decision.ANCHOR, SDPA, EAGER, INT8, "model=disturbed")
PROMPTS = 6
CUT = 4
"""A prompt whose generated positions end early."""
CODED = 2**-7
"""What codes of logarithms leave of a number."""


class InPlace:
    """A pool of processes that is none."""

    imap = staticmethod(map)


@pytest.fixture(scope="module")
def positions() -> decision.Direction:
    """Recorded distances at every position of a few prompts."""
    recorded = decision.load()[1]
    i, j = [recorded.rows.index(row) for row in ROWS], [recorded.members.index(member) for member in MEMBERS]
    values = (each[i][:, j][:, :, :PROMPTS] for each in (recorded.evidence, recorded.noise))
    return decision.Direction("cpu-on-gpu", list(ROWS), list(MEMBERS), recorded.cells, *values)


def raw(direction: decision.Direction, path: Path, members: tuple[str, ...] = MEMBERS, generated: int = 0) -> Path:
    """A file as ``bench/evidence.py replay --windows`` writes it, in which the same positions are both prompt's and generated."""
    j = [direction.members.index(member) for member in members]
    tables = {}
    for name, values in (("evidence", direction.evidence[:, j]), ("noise", direction.noise[:, j])):
        decode = np.full((*values.shape[:-1], 8), np.nan, np.float32)
        if generated:
            decode = values[..., :generated].copy()
            decode[:, :, CUT, :, generated // 2 :] = np.nan
        both = np.concatenate([values, decode], axis=-1)
        tables |= {f"{phase}.{name}": evidence.means(both, phase) for phase in ("prefill", "decode")}
    np.savez(path, rows=direction.rows, members=members, cells=direction.cells, prefill=decision.PREFILL, **tables)
    return path


@pytest.fixture(scope="module")
def data(positions: decision.Direction, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts, in two files, and generated positions, in either mode."""
    folder = tmp_path_factory.mktemp("raw")
    files = [
        raw(positions, folder / "prompts-cpu-on-gpu.a.npz", MEMBERS[:3]),
        raw(positions, folder / "prompts-cpu-on-gpu.b.npz", (MEMBERS[0], *MEMBERS[3:])),
        raw(positions, folder / "generated-cpu-on-gpu.npz", generated=32),
        raw(positions, folder / "decode-cpu-on-gpu.npz", MEMBERS[:3], generated=32),
    ]
    fresh.reduce(files, folder / "fresh.npz")
    return folder / "fresh.npz"


@pytest.fixture(scope="module")
def kept(data: Path) -> dict[str, Any]:
    """What is read of it."""
    return dict(fresh.load(data))


def test_sums_and_means_of_windows_are_those_of_their_positions(
    positions: decision.Direction, kept: dict[str, Any]
) -> None:
    (windowed,) = fresh.directions(kept, "prompt")
    places = [each for each in evidence.windows_of(decision.PREFILL) if each[0] in fresh.JUDGED]
    assert windowed.widths == tuple(width for width, _ in places)
    for count in fresh.JUDGED:
        assert [places[window][0] for window in windowed.windows(count)] == [count] * min(2, 64 // count)
    for row in ROWS:
        for window, (width, place) in enumerate(places):
            ours, theirs = windowed.tables(row, window), positions.tables(row, place)
            assert (ours.width, ours.names) == (width, theirs.names)
            for table in ("distances", "units", "to_anchor"):
                np.testing.assert_allclose(getattr(ours, table), getattr(theirs, table), rtol=CODED)
    means = [
        each.means(SDPA, [SDPA, EAGER], EAGER, window) for each, window in ((windowed, 4), (positions, places[4][1]))
    ]
    for found, expected in zip(*means, strict=True):
        assert found.shape[-1] == len(positions.cells) and not np.isnan(found).any()
        np.testing.assert_allclose(found, expected, rtol=CODED)


def test_windows_are_judged_as_their_positions_are(positions: decision.Direction, kept: dict[str, Any]) -> None:
    (windowed,) = fresh.directions(kept, "prompt")
    for row, claimed in ((SDPA, SDPA), (EAGER, SDPA), (SDPA, EAGER), (INT8, INT8), (SDPA, INT8)):
        ours, theirs = (
            decision.Bundles(decision.Case(each, row, claimed), built_in_profile(), 64)
            for each in (windowed, positions)
        )
        for drawn in ([0], [1, 2, 3]):
            one, other = ours.verdict(drawn, 0), theirs.verdict(drawn, 0)
            assert one.verdict == other.verdict
            assert one.floors == pytest.approx(other.floors, rel=CODED)


def test_half_of_the_positions_of_either_phase(positions: decision.Direction, kept: dict[str, Any]) -> None:
    (mixed,) = fresh.directions(kept, "mixed")
    assert mixed.windows(3) == [] and len(mixed.windows(64)) == 1 and len(mixed.windows(32)) == 2
    (window,) = mixed.windows(64)
    parts, whole = mixed.parts(SDPA, window), mixed.tables(SDPA, window)
    half = positions.tables(SDPA, slice(0, 32)).distances  # generated positions are the prompt's once more
    usable = mixed.complete(SDPA, [window])
    assert usable == [prompt for prompt in range(PROMPTS) if prompt != CUT]
    assert whole.width == 64 and list(parts) == ["prefill", "decode"]
    np.testing.assert_allclose(whole.distances[:, usable], 2 * half[:, usable], rtol=CODED)
    bundles = decision.Bundles(decision.Case(mixed, SDPA, SDPA), built_in_profile(), 64)
    assert {cell.phase for cell in bundles.measured(0, 0, 0)} == {"prefill", "decode"}


def test_prompts_that_ended_early_are_not_judged(kept: dict[str, Any]) -> None:
    (generated,) = fresh.directions(kept, "generated")
    case = decision.Case(generated, SDPA, SDPA)
    found = decision.singles(case, built_in_profile(), 16)
    assert [each["verdicts"] for each in found] == [0 if prompt == CUT else 2 for prompt in range(PROMPTS)]
    drawn = decision.verdicts(case, built_in_profile(), 3, 16, 20, np.random.default_rng(0))
    assert drawn["verdicts"] == 20 and drawn["INCONSISTENT"] == 0


def test_a_lie_in_one_phase_is_seen_though_the_whole_hides_it(kept: dict[str, Any]) -> None:
    """The generated half is another kernel's, and the prompt's so near to the claimed one that together they look honest."""
    prompt, generated = kept["generated-cpu-on-gpu"].values()
    near, another = prompt.evidence.copy(), generated.evidence.copy()
    near[ROWS.index(SDPA), MEMBERS.index(SDPA)] *= 0.3
    another[ROWS.index(SDPA)] = another[ROWS.index(EAGER)]
    halves = fresh.replace(prompt, evidence=near), fresh.replace(generated, evidence=another)
    own = "", list(ROWS), list(MEMBERS), prompt.cells, near, prompt.noise
    said = []
    for phases in (halves, (halves[0], generated)):
        mixed = fresh.Mixed(*own, halves=phases)
        said.append(decision.Bundles(decision.Case(mixed, SDPA, SDPA), built_in_profile(), 64).verdict([0, 1, 2], 0))
    assert said[0].verdict == "INCONCLUSIVE" and "alone, decode would be unlike any honest" in said[0].reasons[1]
    assert said[1].verdict == "CONSISTENT"


def test_files_that_do_not_belong_together_are_refused(positions: decision.Direction, tmp_path: Path) -> None:
    other = fresh.replace(positions, evidence=positions.evidence * 2)
    files = raw(positions, tmp_path / "prompts-x.a.npz"), raw(other, tmp_path / "prompts-x.b.npz")
    with pytest.raises(SystemExit, match="other evidence"):
        fresh.merged(files)


def test_what_is_the_same_in_either_mode_is_said_to_be(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fresh.print_modes(data)
    blocks = capsys.readouterr().out.strip().split("\n\n")
    assert [block.split(", ")[2].split(";")[0] for block in blocks] == [
        f"{count} {phase} positions" for phase in ("prefill", "decode") for count in fresh.COMPARED
    ]
    for block in blocks:
        lines = [line.split(" replayed in ") for line in block.splitlines()[1:]]
        assert [row.strip() for row, _ in lines] == [SDPA, SDPA, EAGER, EAGER]
        found = [said.split(maxsplit=1) for _, said in lines]
        assert [mode for mode, _ in found] == ["prefill", "decode"] * 2
        assert found[0][1] == found[1][1] and found[2][1] == found[3][1] != found[0][1]
        assert "margin 0." in found[0][1]
        assert f"0 of {(PROMPTS - ('decode' in block.splitlines()[0])) * 2} rejected" in found[0][1]


def test_rates_count_every_prompt_and_window(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind, count in (("prompt", 16), ("generated", 16), ("mixed", 32), ("mixed", 3), ("generated", 64)):
        fresh.print_rates(InPlace(), fresh.Work(0, count, 1, 0, 0, False, kind, data))  # type: ignore[arg-type]
    fresh.print_rates(InPlace(), fresh.Work(0, 16, PROMPTS + 1, 10, 5, False, "prompt", data))  # type: ignore[arg-type]
    blocks = capsys.readouterr().out.strip().split("\n\n")
    assert len(blocks) == 3  # none of halves of 3 positions, of more positions or prompts than there are
    for block, prompts in zip(blocks, (PROMPTS, PROMPTS - 1, PROMPTS - 1), strict=True):
        lines = block.splitlines()
        of = {line.split(":")[0].strip(): line for line in lines if ":" in line}
        honest = 3 * 2 * prompts
        assert f" of {honest}, " in of["all honest claims"] and "INCONSISTENT 0.00%" in of["all honest claims"]
        texts = [int(of[f"honest claims, {text}"].split(" of ")[1]) for text in fresh.TEXTS]
        assert sum(texts) == honest and texts[0] == 3 * 2 * (3 if prompts == PROMPTS else 2)
        assert f" of {2 * 2 * prompts}" in of["lies among the four kernels"]
        assert "INCONSISTENT 100.00%" in of["other lies"] and of["other lies"].endswith(f" of {3 * 2 * prompts}")


@pytest.mark.parametrize("kind", fresh.KINDS)
def test_verdicts_on_recorded_prompts_that_nothing_was_tuned_on(kind: str) -> None:
    """Every prompt alone, 16 positions of it: H100 evidence on a CPU, and of prompts the other way round too."""
    found: dict[str, Counter[str]] = {"honest": Counter(), "kernel": Counter(), "other": Counter()}
    for direction in fresh.directions(fresh.load(), kind):
        for case in decision.cases([direction]):
            among = {case.row, case.claimed} <= set(decision.KERNELS)
            name = "honest" if case.honest else "kernel" if among else "other"
            found[name] += sum(decision.singles(case, built_in_profile(), 16), Counter())
    honest, kernel, other = found.values()
    assert honest["verdicts"] >= 240 and honest["INCONSISTENT"] <= 0.01 * honest["verdicts"]
    assert honest["nearest"] >= 0.95 * honest["verdicts"]
    assert kernel["INCONSISTENT"] >= 0.95 * kernel["verdicts"] and kernel["CONSISTENT"] == 0
    assert other["INCONSISTENT"] == other["verdicts"] >= 200
