"""Reports of two experiments side by side: environments, and what is matched, not compared, or doubtful."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from lab_experiments import METADATA, QUANT, config, published, ranked, rich, write
from lab_reports import after, rendered
from page_parser import Page

from fpforensics.common.lab.reader import Experiment, open_experiment
from fpforensics.common.lab.run import Run, RunInfo, RunSignals
from fpforensics.verifier.analysis.environment import Stated, compare_configurations, mismatches


def test_environments_stand_side_by_side(tmp_path: Path) -> None:
    claimed, observed = published(tmp_path)
    text, page = rendered(claimed, observed)
    lines = text.splitlines()
    assert "Mode:       CROSS-HARDWARE" in lines
    assert "Claimed:    INT4_A100.json, 3 configs on NVIDIA A100" in lines
    assert "  ✓ cuda_version: 12.8" in lines
    assert "  ✗ torch_version: claimed=2.9.1+cu128, observed=2.9.0+cu128" in lines
    assert "  ✓ hardware: claimed=NVIDIA A100, observed=NVIDIA H100" in after(lines, "Expected differences (hardware):")
    assert "⚠ ENVIRONMENT MISMATCHES DETECTED" in lines
    assert "torch_version" in Page(page).text and "1 unexpected" in Page(page).text
    fields = {each.name: each for each in compare_configurations(claimed, observed)}
    assert [each.name for each in mismatches(fields.values())] == ["torch_version"]
    assert fields["torch_version"].observed == (Stated("2.9.0+cu128", tuple(f"H100_{name}" for name in QUANT)),)
    assert "quant_method" not in fields and "variable_value" not in fields


def test_fields_are_compared_where_the_variable_is_the_same(tmp_path: Path) -> None:
    """The CUDA version is the variable: torch follows it on both machines, python only on one."""

    def side(name: str, python: Mapping[str, str], extra: Mapping[str, object]) -> Experiment:
        configurations = [
            config(f"{name}_{cuda}", name, cuda, cuda_version=cuda, torch_version=f"2.7+{cuda}", **extra)
            | ({"python_version": python[cuda]} if cuda in python else {})
            for cuda in ("11.8", "12.1")
        ]
        run = Run(RunInfo(0, f"{name}_11.8", "ref_0", 0), {"prefill": RunSignals(ranked({1: -1.0}))})
        return write(tmp_path / f"{name}.json", configurations, [run], METADATA | {"variable_tested": "cuda"})

    claimed = side("A", {"11.8": "3.10", "12.1": "3.12"}, {"provider": "x", "gpu_count": 1})
    observed = side("B", {"11.8": "3.12", "12.1": "3.12"}, {"provider": "y", "compile": True})
    fields = {each.name: each for each in compare_configurations(claimed, observed)}
    assert "cuda_version" not in fields
    assert fields["torch_version"].equal and not fields["python_version"].equal
    assert fields["provider"].expected and fields["gpu_count"].expected
    assert fields["compile"].claimed[0].value == "absent" and fields["compile"].observed[0].value == "true"
    assert {each.name for each in mismatches(fields.values())} == {"python_version", "compile"}
    alone = {each.name: each for each in compare_configurations(claimed)}
    assert [each.value for each in alone["torch_version"].claimed] == ["2.7+11.8", "2.7+12.1"]
    assert not alone["torch_version"].equal and alone["dtype"].equal


def test_the_diagonal_of_two_files_is_matched_by_value(tmp_path: Path) -> None:
    _, page = rendered(*published(tmp_path))
    assert page.count('own"') == 2 * 3 * (1 + 4)  # phases, configs, aggregate and references


def test_what_two_files_do_not_share_is_said(tmp_path: Path) -> None:
    claimed, observed = rich(tmp_path / "one.json"), rich(tmp_path / "other.json")
    document = json.loads((tmp_path / "other.json").read_text())
    for run in document["runs"]:
        run["ref_id"] = run["ref_id"].replace("ref_1", "ref_2")
    document["configurations"][5]["variable_value"] = 8
    (tmp_path / "other.json").write_text(json.dumps(document))
    observed = open_experiment(tmp_path / "other.json")
    text, page = rendered(claimed, observed)
    shown = [" ".join(line.split()) for line in Page(page).text.splitlines()]
    for phase in ("PREFILL", "DECODE"):
        said = after(text.splitlines(), f"CROSS-HARDWARE COMPARISON ({phase})", "Not compared:")
        for line in (
            "ref_1: only in one.json, so in no mean",
            "ref_2: only in other.json, so in no mean",
            "B_bs4 (observed): the other file has no config with its batch_size, so it is off the diagonal only",
        ):
            assert f"  {line}" in said[:8] and shown.count(line) == 2
    alone, _ = rendered(claimed)
    assert "  B_bs4: not measured on ref_1, so its means are over the other references" in alone.splitlines()


def test_two_files_with_the_same_ids_are_told_apart(tmp_path: Path) -> None:
    claimed, observed = rich(tmp_path / "one.json"), rich(tmp_path / "other.json", provider="elsewhere")
    text, page = rendered(claimed, observed)
    for shown in (text, Page(page).text):
        lines = [" ".join(line.split()) for line in shown.splitlines()]
        assert "NVIDIA A (claimed) vs NVIDIA A (observed)" in lines and "NVIDIA B (observed)" in lines
        assert any(
            line.startswith("A_bs1 (claimed) and A_bs4 (observed) diverged at step 2 on ref_0") for line in lines
        )
        assert any("claimed and observed: B_bs1 = B_bs2" in line for line in lines)
        assert any("A_bs2 (claimed and observed)" in line for line in lines)
        assert any("Pair of batch_size" in line for line in lines)
    pairs = after(text.splitlines(), "PAIRWISE SNR SUMMARY TABLE: LOGPROBS (DECODE)")[3:6]
    assert {line.partition("  ")[0] for line in pairs} == {"1 vs 2", "1 vs 4", "2 vs 4"}
    assert [line.partition("  ")[0] for line in pairs if line.endswith("one kernel class")] == ["1 vs 2"]


def test_the_same_contents_on_both_sides_are_warned_of(tmp_path: Path) -> None:
    rich(tmp_path / "one.json")
    (tmp_path / "copy.json").write_bytes((tmp_path / "one.json").read_bytes())
    (tmp_path / "spaced.json").write_bytes((tmp_path / "one.json").read_bytes() + b" ")
    said = {
        "one": "one.json: the same contents as claimed and as observed, which says nothing about other hardware",
        "copy": "one.json and copy.json: the same contents as claimed and as observed, which says nothing about other hardware",
        "spaced": "each claimed config is bit-identical to an observed one with its batch_size",
    }
    for name, warning in said.items():
        text, page = rendered(open_experiment(tmp_path / "one.json"), open_experiment(tmp_path / f"{name}.json"))
        assert f"⚠ {warning}" in text and warning in Page(page).text
    assert "⚠ each" not in (text := rendered(*published(tmp_path))[0]) and "same contents" not in text
