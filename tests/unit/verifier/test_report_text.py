"""The text of a check: the published shape, and what a reader came for first."""

from __future__ import annotations

import msgspec
from check_results import SPECS, environment, facts, hostile_sample, sample

from fpforensics.verifier.environment_diff import compare_environments
from fpforensics.verifier.report import (
    clean,
    text,
)


def test_text_has_the_published_sections_in_order() -> None:
    lines = text.render(sample()).splitlines()
    sections = (
        "VERDICT",
        "VERIFICATION (teacher-forcing, decode)",
        "ENVIRONMENT COMPARISON",
        "LINEUP",
        "CLAIMED × VERIFIED (PREFILL)",
        "AGGREGATE (average across references):",
        "SNR ANALYSIS",
        "LAYER BY LAYER",
        "PAIRWISE SNR SUMMARY TABLE: LOGPROBS (PREFILL)",
        "CLAIMED × VERIFIED (DECODE)",
        "PREFILL vs DECODE COMPARISON",
    )
    at = [lines.index(section) for section in sections]
    assert at == sorted(at)
    assert lines[-1] == "✓ CONSISTENT"


def test_text_begins_with_what_a_reader_came_for() -> None:
    other = compare_environments(environment(), facts(), environment(), facts(versions={"torch": "2.11.0+cu128"}))
    result = sample(true="quant=bnb-nf4", environment=other)
    lines = text.render(result).splitlines()
    parts = (
        f"✗ {SPECS[0]}: INCONSISTENT",
        "  - " + result.rows[0].reasons[0],
        next(line for line in lines if line.startswith("  Member ")),
        "⚠ ENVIRONMENT MISMATCHES DETECTED",
        "  ✗ torch: prover=2.13.0+cu128, verifier=2.11.0+cu128",
        "What this cannot tell:",
        "VERIFICATION (teacher-forcing, decode)",
    )
    at = [lines.index(part) for part in parts]
    assert at == sorted(at) and at[0] < 8 and at[-1] < 40


def test_one_line_holds_the_verdict_and_its_reasons() -> None:
    caught = sample(true="quant=bnb-nf4")
    line = text.one_line(caught)
    rate = "by fixed limits: no error rate is known"
    assert line == f"✗ INCONSISTENT: {'; '.join(caught.rows[0].reasons)}; {rate}"
    several = msgspec.structs.replace(
        caught, rows=(msgspec.structs.replace(caught.rows[0], config_id="other", verdict="CONSISTENT"), *caught.rows)
    )
    assert text.one_line(several) == f"✗ INCONSISTENT: {SPECS[0]}: {'; '.join(caught.rows[0].reasons)}; {rate}"
    for given in ({"calibration": "h100-cpu-1", "alpha": 0.01}, {"equality": True}):
        row = msgspec.structs.replace(caught.rows[0], **given)
        assert "error rate" not in text.one_line(msgspec.structs.replace(caught, rows=(row,)))
    hostile = text.one_line(hostile_sample())
    assert hostile.isprintable()


def test_text_prints_each_matrix_entry_beside_its_configs() -> None:
    result = sample(rows=SPECS, claim="")
    lines = text.render(result).splitlines()
    aggregate = lines[lines.index("AGGREGATE (average across references):") :]
    start = aggregate.index("Logprobs (L2 distance):")
    assert aggregate[start + 1].split() == list(SPECS)
    for row, expected in zip(SPECS, result.matrices[0].aggregate, strict=True):
        line = next(line for line in aggregate[start + 2 :] if line.lstrip().startswith(row + " "))
        assert line.split() == [row, *(f"{value:.2e}" for value in expected if value is not None)]
    assert all(len(line) < 130 for line in lines if not line.startswith("      run as "))


def test_text_numbers_the_configs_of_a_table_that_would_be_too_wide() -> None:
    columns = (*SPECS, *(f"attn=eager,matmul=fp32-rounded,batch={size}" for size in range(2, 8)))
    printed = text.render(sample(columns=columns))
    assert " [10] attn=eager,matmul=fp32-rounded,batch=7\n" in printed
    line = next(line for line in printed.splitlines() if line.startswith("[1] "))
    assert len(line.split()) == 1 + len(columns)


def test_unexpected_differences_stand_apart() -> None:
    other = sample(
        environment=compare_environments(
            environment(), facts(), environment(hostname="b"), facts(versions={"torch": "2.11.0+cu128"})
        )
    )
    printed = text.render(other)
    assert "  ✗ torch: prover=2.13.0+cu128, verifier=2.11.0+cu128" in printed
    assert "  ✓ hostname: prover=prover-7, verifier=b" in printed
    assert "⚠ ENVIRONMENT MISMATCHES DETECTED" in printed
    assert "⚠" not in text.render(sample())


def test_hostile_strings_reach_the_terminal_as_printable_text_on_their_own_line() -> None:
    printed = text.render(hostile_sample())
    assert all(c.isprintable() or c == "\n" for c in printed)
    assert "\\x1b[2J" in printed
    assert printed.splitlines()[-1] == "✗ INCONSISTENT"
    assert not any(line.startswith("✓ CONSISTENT") for line in printed.splitlines())


def test_clean_cuts_and_escapes() -> None:
    assert clean("a\u202eb\x00\n\ud800") == "a\\u202eb\\x00\\n\\ud800"
    assert clean("naïve 模型 ✓") == "naïve 模型 ✓"
    assert clean("x" * 500) == "x" * 400 + "…"
