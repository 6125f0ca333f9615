"""``prover run --full-logits`` twice, then ``verifier compare``: every figure against NumPy over the bundles' own logits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fpforensics.common.keys import Keyring
from fpforensics.common.signals import Trace
from fpforensics.verifier.intake import open_bundle

BIN = Path(sys.executable).parent
SDPA = "attn=sdpa,dtype=bf16"
SESSION = (
    *("--model", "tiny", "--references", "2", "--prompt-tokens", "48", "--new-tokens", "5"),
    *("--repetitions", "1", "--full-logits"),
)


def run(program: str, *arguments: object) -> str:
    done = subprocess.run([str(BIN / program), *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A bundle of one config, and one of the same config and another."""
    folder = tmp_path_factory.mktemp("compare")
    run("prover", "keygen", folder / "prover.key")
    session = ("--key", folder / "prover.key", "--device", "cpu", "--model-path", f"tiny={tiny_llama}", *SESSION)
    run("prover", "run", *session, "--config", "attn=eager", "-o", folder / "one.msgpack")
    run("prover", "run", *session, "--config", "attn=eager", "--config", SDPA, "-o", folder / "two.msgpack")
    return folder


def compare(folder: Path, row: str, *options: str) -> str:
    """The eager config of the one bundle with a row of the other."""
    files = (folder / "one.msgpack", folder / "two.msgpack")
    return run("verifier", "compare", *files, "--key", folder / "prover.key.pub", "--row-b", row, *options)


def traces_of(folder: Path, name: str, config: str) -> list[Trace]:
    with open_bundle(folder / name, Keyring.from_paths([folder / "prover.key.pub"])) as bundle:
        (row,) = [row for row in bundle.evidence.rows if row.config_id == config]
        return [bundle.trace(row, entry.id) for entry in bundle.evidence.references]


def logits_between(ours: Trace, theirs: Trace) -> dict[str, Any]:
    """Both sides' logits by phase, as far as both were fed the same tokens, with their positions."""
    fed = min(len(ours.output_ids), len(theirs.output_ids)) - 1
    while not np.array_equal(ours.output_ids[:fed], theirs.output_ids[:fed]):
        fed -= 1
    found = {}
    for phase in ("prefill", "decode"):
        one, other = getattr(ours, phase), getattr(theirs, phase)
        count = len(one.positions) if phase == "prefill" else fed
        assert one.positions[:count].tolist() == other.positions[:count].tolist()
        found[phase] = one.positions[:count], one.logits[:count].astype(float), other.logits[:count].astype(float)
    return found


def expected_at(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """One position's figures from its logits (V,), by their definitions."""
    log_a, log_b = a - np.logaddexp.reduce(a), b - np.logaddexp.reduce(b)
    token = int(a.argmax())
    return {
        "max_abs": np.abs(a - b).max(),
        "mean_abs": np.abs(a - b).mean(),
        "cosine": a @ b / np.sqrt((a @ a) * (b @ b)),
        "top1_match": token == b.argmax(),
        "top5_shared": len({*np.argsort(-a, kind="stable")[:5]} & {*np.argsort(-b, kind="stable")[:5]}),
        "token": token,
        "logp_a": log_a[token],
        "logp_b": log_b[token],
        "delta": log_a[token] - log_b[token],
        "ratio": np.exp(abs(log_a[token] - log_b[token])),
        "kl_ab": np.sum(np.exp(log_a) * (log_a - log_b)),
        "kl_ba": np.sum(np.exp(log_b) * (log_b - log_a)),
        "total_variation": np.abs(np.exp(log_a) - np.exp(log_b)).sum() / 2,
    }


def check_summary(summary: dict[str, Any], rows: list[dict[str, float]], gaps: np.ndarray) -> None:
    """``gaps`` are all |A - B|."""

    def column(name: str) -> np.ndarray:
        return np.array([row[name] for row in rows], float)

    assert summary["positions"] == len(rows)
    logits = summary["logits"]
    assert logits["max_abs"] == gaps.max()
    assert logits["mean_abs"] == pytest.approx(gaps.mean(), rel=1e-9)
    assert logits["median_abs"] == pytest.approx(np.median(gaps), rel=1e-6)  # of float32
    assert [each["share"] for each in logits["shares_above"]] == [(gaps > 1e-4).mean(), (gaps > 1e-2).mean()]
    assert logits["cosine_min"] == pytest.approx(column("cosine").min(), abs=1e-12)
    assert logits["cosine_mean"] == pytest.approx(column("cosine").mean(), abs=1e-12)
    delta = column("delta")
    assert summary["chosen"] == pytest.approx(
        {
            "mean_abs": np.abs(delta).mean(),
            "max_abs": np.abs(delta).max(),
            "signed_mean": delta.mean(),
            "std": delta.std(ddof=1),
            "token_mult_prob_error": np.exp(np.abs(delta)).mean(),
        },
        rel=1e-9,
        abs=1e-12,
    )
    for name in ("kl_ab", "kl_ba", "total_variation"):
        assert summary["divergence"][f"{name}_mean"] == pytest.approx(column(name).mean(), rel=1e-9, abs=1e-12)
        assert summary["divergence"][f"{name}_max"] == pytest.approx(column(name).max(), rel=1e-9, abs=1e-12)
    agreement = summary["agreement"]
    assert agreement["top1_matches"] == column("top1_match").sum()
    assert (agreement["top5_shared"], agreement["top5_slots"]) == (column("top5_shared").sum(), 5 * len(rows))


def test_every_figure_of_two_configs(folder: Path) -> None:
    found = json.loads(compare(folder, SDPA, "--json"))
    everything: list[dict[str, float]] = []
    gaps = []
    sides = traces_of(folder, "one.msgpack", "attn=eager"), traces_of(folder, "two.msgpack", SDPA)
    for reference, ours, theirs in zip(found["references"], *sides, strict=True):
        assert reference["reference_id"] == ours.reference_id
        by_phase = logits_between(ours, theirs)
        compared = {each["phase"]: each for each in reference["phases"]}
        assert set(compared) == {phase for phase, (positions, _, _) in by_phase.items() if len(positions)}
        for phase, part in compared.items():
            positions, a, b = by_phase[phase]
            rows = [expected_at(x, y) for x, y in zip(a, b, strict=True)]
            for position, row, each in zip(positions, rows, part["positions"], strict=True):
                assert each.pop("position") == position
                assert each == pytest.approx(row, rel=1e-9, abs=1e-12)
            check_summary(part["summary"], rows, np.abs(a - b))
            everything += rows
            gaps.append(np.abs(a - b).reshape(-1))
    check_summary(found["pooled"], everything, np.concatenate(gaps))
    assert found["pooled"]["logits"]["max_abs"] > 0, "two kernels, two results"
    assert len(everything) > 2 * 16, "decode positions too"


def test_the_same_config_again_differs_nowhere(folder: Path) -> None:
    """The control: another process, another bundle, the same bits."""
    pooled = json.loads(compare(folder, "attn=eager", "--json"))["pooled"]
    assert pooled["logits"]["max_abs"] == pooled["chosen"]["max_abs"] == pooled["divergence"]["kl_ab_max"] == 0
    assert pooled["agreement"]["top5_share"] == 1


def test_the_printed_tables_hold_those_figures(folder: Path) -> None:
    pooled = json.loads(compare(folder, SDPA, "--json"))["pooled"]
    lines = [line.split() for line in compare(folder, SDPA).splitlines()]
    largest = next(line for line in lines if line[:3] == ["Max", "absolute", "difference"])
    assert largest[3] == f"{pooled['logits']['max_abs']:.4f}"
    top1 = next(line for line in lines if line[:2] == ["Top-1", "agreement"])
    assert top1[3] == f"({pooled['agreement']['top1_matches']}/{pooled['positions']}"
