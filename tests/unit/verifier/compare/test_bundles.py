"""Which positions of two bundles are compared, with which figures, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from logit_bundles import SIZE, compared, logits_of, nudged, refused, with_output, write
from synthetic import trace

from fpforensics.common.errors import EvidenceError
from fpforensics.common.evidence import Evidence
from fpforensics.common.signals import Trace
from fpforensics.verifier.report import compare_text


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
    assert "no row 'attn=sdp' in B (rows.msgpack) (did you mean 'attn=sdpa'?)" in refused(
        path, path, "attn=eager", "attn=sdp"
    )


def test_a_row_is_offered_that_says_what_was_asked_for_and_more(tmp_path: Path) -> None:
    def renamed(made: Evidence) -> Evidence:
        first, second = made.rows
        return msgspec.structs.replace(
            made, rows=(first, msgspec.structs.replace(second, config_id="attn=sdpa,dtype=bf16"))
        )

    path = write(tmp_path / "rows.msgpack", replace(SIZE, rows=2), change=renamed)
    for asked in ("attn=sdpa", "dtype=bf16", "dtype=bf16,attn=sdpa"):
        assert "(did you mean 'attn=sdpa,dtype=bf16'?)" in refused(path, path, asked)
    assert "(known: attn=eager, attn=sdpa,dtype=bf16)" in refused(path, path, "x")


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
