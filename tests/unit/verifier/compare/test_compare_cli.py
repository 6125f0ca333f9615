"""``verifier compare``: what is printed, harmlessly, and the exit codes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result
from logit_bundles import SIZE, compared, nudged, write
from synthetic import OTHER_KEY, TEST_KEY, write_synthetic

from fpforensics.common.errors import SignatureError, UsageError
from fpforensics.common.signals import Trace
from fpforensics.verifier.cli import cli, main
from fpforensics.verifier.compare.result import CompareResult
from fpforensics.verifier.report import compare_text


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "prover.pub"
    path.write_bytes(TEST_KEY.public.pem())
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["compare", *map(str, arguments)])


def test_the_command_prints_the_published_shape(tmp_path: Path, key: Path) -> None:
    size = replace(SIZE, references=1, output=1)
    a, b = write(tmp_path / "a.msgpack", size), write(tmp_path / "b.msgpack", size, nudged(0.3))
    done = run(a, b, "--key", key)
    assert done.exit_code == 0, done.output
    result = compared(a, b)
    for title in (
        "Raw Logit Differences",
        "Per-position logit breakdown",
        "Chosen-Token Log-Prob Error",
        "Per-position detail",
        "Full-Distribution Divergence",
        "Top-k Token Agreement",
    ):
        assert done.output.count(f"\n{title}\n") == 1
    lines = [line.split() for line in done.output.splitlines()]
    figures = result.pooled
    assert ["Max", "absolute", "difference", f"{figures.logits.max_abs:.4f}"] in lines
    assert ["Median", "absolute", "difference", f"{figures.logits.median_abs:.4f}"] in lines
    assert ["Cosine", "similarity", "(min)", f"{figures.logits.cosine_min:.5f}"] in lines
    assert ["mean", "|Δ|", f"{figures.chosen.mean_abs:.4f}"] in lines
    assert ["token_mult_prob_error", f"{figures.chosen.token_mult_prob_error:.3f}x"] in lines
    divergence = figures.divergence
    assert ["KL(A", "||", "B)", f"{divergence.kl_ab_mean:.5f}", f"{divergence.kl_ab_max:.5f}"] in lines
    agreed = figures.agreement
    assert f"({agreed.top1_matches}/6 positions)" in done.output
    assert f"({agreed.top5_shared}/30 slots)" in done.output
    for each in result.references[0].phases[0].positions:
        match = "YES" if each.top1_match else "NO"
        assert [f"{each.position}", f"{each.max_abs:.4f}", f"{each.mean_abs:.4f}", f"{each.cosine:.5f}", match] in lines
        assert each.ratio is not None
        row = [f"{each.position}", f"{each.token}", f"{each.logp_a:.4f}", f"{each.logp_b:.4f}"]
        assert [*row, f"{each.delta:+.4f}", f"{each.ratio:.3f}x"] in lines
    assert "A (baseline)" in done.output
    assert ["CPU", "none", "none"] in lines


def test_json_holds_the_whole_result(tmp_path: Path, key: Path) -> None:
    a, b = write(tmp_path / "a.msgpack"), write(tmp_path / "b.msgpack", SIZE, nudged(0.3))
    done = run(a, b, "--key", key, "--json", "--quiet")
    assert done.exit_code == 0, done.output
    assert msgspec.json.decode(done.output, type=CompareResult) == compared(a, b)
    assert json.loads(done.output)["references"][1]["phases"][1]["positions"][0]["position"] == 6


def test_many_references_get_tables_by_phase_and_long_tables_end(tmp_path: Path) -> None:
    size = replace(SIZE, prompt=80, prefill=80)
    result = compared(write(tmp_path / "a.msgpack", size), write(tmp_path / "b.msgpack", size, nudged(1e-6)))
    text = compare_text.render(result)
    assert "REF_0 (PREFILL)" in text
    assert "REF_1 (DECODE)" in text
    assert ["Metric", "all", "prefill", "decode"] in [line.split() for line in text.splitlines()]
    assert "… and 16 more positions: --json has them all" in text


def test_what_a_bundle_says_is_printed_harmlessly(tmp_path: Path) -> None:
    path = write(tmp_path / "a.msgpack")
    result = compared(path, path)
    hostile = "\x1b[31m\u202ered\n"
    side = msgspec.structs.replace(result.b, config_id=hostile, file=hostile)
    reference = msgspec.structs.replace(result.references[0], reference_id=hostile, source=hostile)
    text = compare_text.render(msgspec.structs.replace(result, b=side, references=(reference,)))
    assert all(line.isprintable() for line in text.splitlines())
    assert "\\x1b[31m" in text


def test_exit_codes(
    tmp_path: Path, key: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    a, forged = write(tmp_path / "a.msgpack"), tmp_path / "forged.msgpack"
    write_synthetic(forged, SIZE, OTHER_KEY)
    missing = write(tmp_path / "missing.msgpack", replace(SIZE, logits=False))
    damaged = tmp_path / "damaged.msgpack"
    damaged.write_bytes(a.read_bytes()[:-1] + b"\xff")
    for b, code, message in (
        (missing, 2, "holds no full logits"),
        (forged, 4, "error: bundle forged.msgpack: no trusted key signed this"),
        (damaged, 4, "digest differs"),
        (a, 0, ""),
    ):
        monkeypatch.setattr(sys, "argv", ["verifier", "compare", str(a), str(b), "--key", str(key)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        assert ended.value.code == code
        assert message in said.err
        assert bool(said.out) == (code == 0)
        assert said.err.count("\n") == (code != 0)


def test_missing_logits_are_said_before_anybody_is_asked_for_a_row(tmp_path: Path, key: Path) -> None:
    rows = write(tmp_path / "rows.msgpack", replace(SIZE, rows=2))
    without = write(tmp_path / "without.msgpack", replace(SIZE, rows=2, logits=False))
    for a, b, name in ((without, rows, "A"), (rows, without, "B")):
        error = run(a, b, "--key", key).exception
        assert isinstance(error, UsageError)
        assert error.diagnostics() == (
            f"{name} (without.msgpack) holds no full logits (capture them: prover run --full-logits)"
        )
    assert "choose one with --row-a" in run(rows, rows, "--key", key).exception.diagnostics()


def test_untrusted_bundles_are_not_compared(tmp_path: Path, key: Path) -> None:
    a, forged = write(tmp_path / "a.msgpack"), tmp_path / "forged.msgpack"
    write_synthetic(forged, SIZE, OTHER_KEY)
    assert isinstance(run(forged, a, "--key", key).exception, SignatureError)
    assert run(a, a).exit_code == 2  # no key at all


def test_neither_torch_nor_grpc_is_needed() -> None:
    code = (
        "import sys; import fpforensics.verifier.cli.compare, fpforensics.verifier.compare.bundles;"
        "import fpforensics.verifier.report.compare_text;"
        "print(sorted({'torch', 'transformers', 'grpc', 'matplotlib'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_ratio_beyond_float64_is_printed_and_not_in_the_json(tmp_path: Path) -> None:
    size = replace(SIZE, dtype="f32", references=1, output=1)

    def far(_row: int, each: Trace) -> Trace:
        assert each.prefill.logits is not None
        return replace(each, prefill=replace(each.prefill, logits=-1e6 * each.prefill.logits))

    result = compared(write(tmp_path / "a.msgpack", size), write(tmp_path / "b.msgpack", size, far))
    assert result.pooled.chosen.token_mult_prob_error is None
    assert math.isfinite(result.pooled.divergence.kl_ab_max)
    text = compare_text.render(result)
    assert "next to no probability" in text
    assert " inf" in text
