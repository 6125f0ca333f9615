"""``verifier compare``: which positions of two bundles are compared, what is refused, what is printed."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner, Result
from synthetic import OTHER_KEY, TEST_KEY, Size, evidence, trace, write_synthetic

from fpforensics.common.bundle import BundleWriter
from fpforensics.common.errors import EvidenceError, SignatureError, UsageError
from fpforensics.common.evidence import Evidence
from fpforensics.common.keys import Keyring
from fpforensics.common.signals import Array, Trace
from fpforensics.verifier.cli import cli, main
from fpforensics.verifier.compare.bundles import compare_pair
from fpforensics.verifier.compare.pairing import choose_side, pair_rows
from fpforensics.verifier.compare.result import CompareResult
from fpforensics.verifier.intake import open_bundle
from fpforensics.verifier.report import compare_text

KEYRING = Keyring([TEST_KEY.public])
SIZE = Size(references=2, prompt=6, prefill=6, output=4, logits=True)
# What writing a bundle may change: (row, trace) to a trace.
Edit = Callable[[int, Trace], Trace]


def write(
    path: Path,
    size: Size = SIZE,
    edit: Edit = lambda _row, unchanged: unchanged,
    change: Callable[[Evidence], Evidence] = lambda unchanged: unchanged,
) -> Path:
    """Synthetic evidence whose traces went through ``edit``."""
    with BundleWriter(path) as writer:
        made = evidence(size, writer)
        rows = tuple(
            msgspec.structs.replace(
                row,
                traces=tuple(writer.add_trace(edit(index, trace(size, index, at))) for at in range(size.references)),
            )
            for index, row in enumerate(made.rows)
        )
        writer.finish(change(msgspec.structs.replace(made, rows=rows)), TEST_KEY)
    return path


def nudged(amount: float) -> Edit:
    """Row 0's logits plus noise."""

    def edit(row: int, each: Trace) -> Trace:
        phases = []
        for phase in (each.prefill, each.decode):
            assert phase.logits is not None
            wave = np.sin(np.arange(phase.logits.size)).reshape(phase.logits.shape)
            phases.append(
                replace(phase, logits=(phase.logits.astype(float) + amount * wave).astype(phase.logits.dtype))
            )
        return replace(each, prefill=phases[0], decode=phases[1])

    return edit


def with_output(*output_ids: int, only: str = "ref_1") -> Edit:
    """Another output for one reference; of its decode signals the rows that then fit."""

    def edit(_row: int, each: Trace) -> Trace:
        if each.reference_id != only:
            return each
        keep = len(output_ids) - 1
        decode = {name: rows[:keep] for name, rows in each.decode.tensors().items()}
        return replace(each, output_ids=np.array(output_ids, np.int32), decode=type(each.decode).from_tensors(decode))

    return edit


def compared(a: Path, b: Path, row_a: str = "", row_b: str = "") -> CompareResult:
    with open_bundle(a, KEYRING) as first, open_bundle(b, KEYRING) as second:
        return compare_pair(pair_rows(choose_side("A", first, row_a), choose_side("B", second, row_b)))


def refused(a: Path, b: Path, row_a: str = "", row_b: str = "") -> str:
    with pytest.raises(UsageError) as caught:
        compared(a, b, row_a, row_b)
    text = caught.value.diagnostics()
    assert caught.value.hint
    assert text.isprintable()
    assert len(text) < 400
    return text


def logits_of(size: Size, row: int, edit: Edit = lambda _row, unchanged: unchanged) -> dict[tuple[str, str], Array]:
    found = {}
    for at in range(size.references):
        each = edit(row, trace(size, row, at))
        for phase, signals in (("prefill", each.prefill), ("decode", each.decode)):
            assert signals.logits is not None
            found[each.reference_id, phase] = signals.logits.astype(np.float64)
    return found


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_figures_of_each_part_of_each_phase_and_of_everything(tmp_path: Path, dtype: str) -> None:
    size = replace(SIZE, dtype=dtype)
    a, b = write(tmp_path / "a.msgpack", size), write(tmp_path / "b.msgpack", size, nudged(0.3))
    result = compared(a, b)
    ours, theirs = logits_of(size, 0), logits_of(size, 0, nudged(0.3))
    gaps = {part: np.abs(ours[part] - theirs[part]).astype(np.float32) for part in ours}

    assert result.vocab_size == size.vocabulary
    assert (result.a.logits_dtype, result.b.file, result.b.config_id) == (dtype, "b.msgpack", "attn=eager")
    assert result.a.environment.cpu == "none"
    seen = {}
    for reference in result.references:
        assert (reference.prompt_tokens, reference.decode_skipped) == (6, None)
        for each in reference.phases:
            seen[reference.reference_id, each.phase] = each
    assert seen.keys() == gaps.keys()
    for part, each in seen.items():
        assert [at.position for at in each.positions] == ([0, 1, 2, 3, 4, 5] if part[1] == "prefill" else [6, 7, 8])
        assert each.summary.logits.median_abs == float(np.median(gaps[part].astype(np.float64)))
        assert each.summary.positions == len(each.positions)
        np.testing.assert_allclose([at.max_abs for at in each.positions], gaps[part].max(axis=1), rtol=1e-6)
        assert [at.token for at in each.positions] == ours[part].argmax(axis=1).tolist()
    for pooled, phases in (
        (result.pooled, ("prefill", "decode")),
        *((each.summary, (each.phase,)) for each in result.pooled_phases),
    ):
        together = np.concatenate([rows for (_, phase), rows in gaps.items() if phase in phases]).astype(np.float64)
        assert pooled.positions == len(together)
        assert pooled.logits.elements == together.size
        assert pooled.logits.median_abs == float(np.median(together))
        assert pooled.logits.mean_abs == pytest.approx(together.mean(), rel=1e-6)
        deltas = [at.delta for part, each in seen.items() if part[1] in phases for at in each.positions]
        assert pooled.chosen.signed_mean == pytest.approx(np.mean(deltas))
        assert pooled.chosen.std == pytest.approx(np.std(deltas, ddof=1))


def test_a_row_against_itself_differs_nowhere(tmp_path: Path) -> None:
    path = write(tmp_path / "a.msgpack")
    result = compared(path, path)
    assert (result.pooled.logits.max_abs, result.pooled.chosen.max_abs) == (0, 0)
    assert result.pooled.divergence.kl_ab_max == 0
    assert result.pooled.agreement.top5_share == 1


def test_rows_are_chosen_by_their_config_ids(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.msgpack", replace(SIZE, rows=2))
    result = compared(path, path, "attn=sdpa", "attn=eager")
    assert (result.a.config_id, result.b.config_id) == ("attn=sdpa", "attn=eager")
    assert result.pooled.logits.max_abs > 0
    assert "has 2 rows: attn=eager, attn=sdpa (choose one with --row-a)" in refused(path, path)
    assert "choose one with --row-b" in refused(path, path, row_a="attn=eager")
    assert "no row 'attn=sdp' in B (did you mean 'attn=sdpa'?)" in refused(path, path, "attn=eager", "attn=sdp")


def test_a_phase_without_positions_is_left_out(tmp_path: Path) -> None:
    size = replace(SIZE, output=1)

    def no_decode_logits(_row: int, each: Trace) -> Trace:
        return replace(each, decode=replace(each.decode, logits=None))  # as an engine leaves it

    result = compared(*(write(tmp_path / name, size, no_decode_logits) for name in ("a.msgpack", "b.msgpack")))
    assert [each.phase for each in result.pooled_phases] == ["prefill"]
    assert result.references[0].decode_skipped is None
    assert result.pooled == result.pooled_phases[0].summary


OUTPUT = trace(SIZE, 0, 1).output_ids.tolist()


@pytest.mark.parametrize(
    ("output", "decoded", "skipped", "reason"),
    [
        ([(OUTPUT[0] + 1) % 64, *OUTPUT[1:]], [], (6, 3, 3), "differ from token 0 on"),
        ([*OUTPUT[:2], (OUTPUT[2] + 1) % 64, OUTPUT[3]], [6, 7], (8, 1, 1), f"token 2 on: {OUTPUT[2]} in A"),
        ([*OUTPUT[:3], (OUTPUT[3] + 1) % 64], [6, 7, 8], None, ""),  # the last token was never fed
        (OUTPUT[:3], [6, 7], (8, 1, 0), "have 4 tokens in A and 3 in B"),
        ([*OUTPUT[:2], (OUTPUT[2] + 1) % 64], [6, 7], (8, 1, 0), "have 4 tokens in A and 3 in B"),
        (OUTPUT[:1], [], (6, 3, 0), "have 4 tokens in A and 1 in B"),
    ],
)
def test_decode_is_compared_while_the_fed_tokens_agree(
    tmp_path: Path, output: list[int], decoded: list[int], skipped: tuple[int, int, int] | None, reason: str
) -> None:
    a, b = write(tmp_path / "a.msgpack"), write(tmp_path / "b.msgpack", edit=with_output(*output))
    result = compared(a, b)
    unaffected, affected = result.references
    assert [len(each.positions) for each in unaffected.phases] == [6, 3]
    assert unaffected.decode_skipped is None
    found = {each.phase: [at.position for at in each.positions] for each in affected.phases}
    assert found == {"prefill": [0, 1, 2, 3, 4, 5]} | ({"decode": decoded} if decoded else {})
    if skipped is None:
        assert affected.decode_skipped is None
    else:
        assert affected.decode_skipped is not None
        said = affected.decode_skipped
        assert (said.first, said.positions_a, said.positions_b) == skipped
        assert reason in said.reason
        assert reason in compare_text.render(result)
        assert f"ref_1, decode from position {skipped[0]} on" in compare_text.render(result)


def test_what_does_not_fit_together_is_refused(tmp_path: Path) -> None:
    a = write(tmp_path / "a.msgpack")

    def against(name: str, *arguments: Any, **options: Any) -> str:
        return refused(a, write(tmp_path / f"{name}.msgpack", *arguments, **options))

    assert "vocabularies differ: 64 tokens in A" in against("vocabulary", replace(SIZE, vocabulary=65))
    assert "has 'ref_1', B" in against("references", replace(SIZE, references=1))
    assert "has 'ref_2', A" in against("more", replace(SIZE, references=3))
    assert "ref_0: prompts of A" in against("length", replace(SIZE, prompt=7))
    assert "have 6 and 7 tokens" in refused(a, tmp_path / "length.msgpack")
    assert "differ at token 0: " in against("prompts", change=_prompts_swapped)
    assert "ref_0, prefill: captured positions differ, 6 from 0 to 5 in A" in against("few", replace(SIZE, prefill=2))
    assert "2 from 4 to 5 in B (few.msgpack, attn=eager)" in refused(a, tmp_path / "few.msgpack")

    missing = write(tmp_path / "missing.msgpack", replace(SIZE, logits=False))
    assert "B (missing.msgpack, attn=eager) holds no full logits" in refused(a, missing)
    assert "A (missing.msgpack, attn=eager) holds no full logits (ref_0, prefill)" in refused(missing, a)
    assert "prover run --full-logits" in refused(missing, missing)


def _prompts_swapped(made: Evidence) -> Evidence:
    first, second = made.references
    swapped = (
        msgspec.structs.replace(first, prompt_ids=second.prompt_ids),
        msgspec.structs.replace(second, prompt_ids=first.prompt_ids),
    )
    return msgspec.structs.replace(made, references=swapped)


def test_nothing_left_to_compare_is_refused(tmp_path: Path) -> None:
    size = replace(SIZE, references=1, prefill=0)
    a = write(tmp_path / "a.msgpack", size)
    other = [(token + 1) % 64 for token in trace(size, 0, 0).output_ids.tolist()]
    b = write(tmp_path / "b.msgpack", size, with_output(*other, only="ref_0"))
    said = refused(a, b)
    assert "no position of A (a.msgpack, attn=eager)" in said
    assert "the outputs differ from token 0 on" in said
    assert "--prefill-positions" in said


def test_logits_that_no_model_computes_are_bad_evidence(tmp_path: Path) -> None:
    def huge(_row: int, each: Trace) -> Trace:
        assert each.prefill.logits is not None
        return replace(each, prefill=replace(each.prefill, logits=each.prefill.logits.astype(np.float64) * 1e300))

    a, b = write(tmp_path / "a.msgpack"), write(tmp_path / "b.msgpack", edit=huge)
    with pytest.raises(EvidenceError, match="logits of B"):
        compared(a, b)


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
