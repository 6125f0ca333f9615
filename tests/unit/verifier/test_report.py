"""Reports: the published shape, nothing hostile gets through, and a picture that is a picture."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from page_parser import Page

from fpforensics.common.config import ExecutionConfig, claim_of, parse_config
from fpforensics.common.engines.base import EngineFacts, ModelFacts
from fpforensics.common.environment import Environment
from fpforensics.common.errors import MissingDependencyError
from fpforensics.common.signals import PHASES, Signal
from fpforensics.verifier.check import CheckResult, MemberReport
from fpforensics.verifier.decision import Member, combine_rows, decide_row
from fpforensics.verifier.distance import Cell
from fpforensics.verifier.environment_diff import compare_environments
from fpforensics.verifier.matrix import Measurement, build_matrices, kernel_classes
from fpforensics.verifier.report import (
    NO_SCALE,
    SAME_KERNELS,
    caveats,
    clean,
    heatmap,
    html,
    log_scale,
    misfits,
    pair_scale,
    scale,
    text,
)

SPECS = ("attn=sdpa,dtype=bf16", "attn=eager", "quant=bnb-nf4", "attn=sdpa_math")
LAYERS: dict[Signal, tuple[str, ...]] = {
    "logprobs": ("",),
    "key_vectors": ("1", "2", "last"),
    "hidden_states": ("1", "2", "last"),
}
SCALE = {"logprobs": 0.2, "key_vectors": 0.8, "hidden_states": 2.0}


def environment(**changes: Any) -> Environment:
    base = Environment(
        hostname="prover-7", platform="Linux-6.8-x86_64", python="3.11.9", cpu="AMD EPYC 9534", cpu_count=64,
        cpu_flags=("avx2", "avx512f", "fma"), gpus=("NVIDIA H100 80GB HBM3",), driver="570.86.15",
        packages={"torch": "2.13.0", "transformers": "5.19.0"}, variables={},
    )  # fmt: skip
    return msgspec.structs.replace(base, **changes)


def facts(**changes: Any) -> EngineFacts:
    model = ModelFacts(
        name="smollm2-135m", architecture="Llama", weights_digest="sha256:0", vocab_size=49152, num_layers=30,
        hidden_size=576, key_width=192,
    )  # fmt: skip
    base = EngineFacts(
        device="cuda", gpu="NVIDIA H100 80GB HBM3",
        attention_kernels={"prefill": ["cudnn"], "decode": ["flash"]}, quantization_kernel="",
        batch_sizes=[1],
        versions={"torch": "2.13.0+cu128", "cuda": "12.8"}, numerics={"threads": "8"}, model=model,
    )  # fmt: skip
    return msgspec.structs.replace(base, **changes)


def cells(floors: float, rng: np.random.Generator) -> dict[Cell, float]:
    return {
        Cell(phase, signal, layer): SCALE[signal] * floors * (1 + 0.3 * index) * rng.uniform(0.9, 1.1)
        for phase in PHASES
        for signal, layers in LAYERS.items()
        for index, layer in enumerate(layers)
    }


def sample(
    rows: tuple[str, ...] = SPECS[:1],
    columns: tuple[str, ...] = SPECS,
    true: str = SPECS[0],
    claim: str = "quant=none",
    same: tuple[tuple[str, str], ...] = (),
    identical: bool = False,
    **changes: Any,
) -> CheckResult:
    """A check of evidence that lies 20 noise floors from 4-bit weights and 1 from everything else."""
    rng = np.random.default_rng(1)
    quiet = np.random.default_rng(2)
    noise = cells(1, np.random.default_rng(3))
    measured, verdicts = [], []
    classes = kernel_classes(same)
    for row in rows:
        per_member: dict[str, dict[str, dict[Cell, float]]] = {}
        for column in columns:
            floors = 20.0 if ("nf4" in column) != ("nf4" in (row if len(rows) > 1 else true)) else 1.0
            zero = identical and column == row
            for reference in ("ref_0", "ref_1", "ref_2"):
                at = cells(0.0 if zero else floors + quiet.uniform(0, 0.1), rng)
                per_member.setdefault(column, {})[reference] = at
                measured.append(Measurement(row=row, column=column, reference_id=reference, distances=at))
        members = [
            Member(name, name == row if len(rows) > 1 else "nf4" not in name, measured_)
            for name, measured_ in per_member.items()
        ]
        verdicts.append(decide_row(config_id=row, claim=claim, members=members, noise=noise, kernel_classes=classes))
    laptop = environment(hostname="verifier-1", cpu="Intel Core i7", cpu_count=8, gpus=(), driver="")
    cpu = facts(
        device="cpu", gpu="", versions={"torch": "2.13.0+cpu"}, numerics={"threads": "2"},
        attention_kernels={"prefill": ["cpu_flash"], "decode": ["cpu_flash"]},
    )  # fmt: skip
    base = ExecutionConfig()
    lineup = tuple(
        MemberReport(
            id=name,
            config=parse_config(name) if "=" in name and "<" not in name else base,
            runs_as=base,
            facts=cpu,
            seconds=4.2,
            skipped="",
        )
        for name in columns
    )
    skipped = MemberReport(
        id="attn=flash_attention_2", config=base, runs_as=base, facts=None, seconds=0.0,
        skipped="flash-attn is not installed here",
    )  # fmt: skip
    result = CheckResult(
        bundle_digest="9f2c" * 16,
        signer="5b1d" * 16,
        nonce="",
        evidence_created_at="2026-01-01T10:00:00+00:00",
        checked_at="2026-01-01T10:05:00+00:00",
        tool_version="0.1.0",
        claim=claim,
        mode="decode",
        verdict=combine_rows(verdicts),
        rows=tuple(verdicts),
        references=3,
        lineup=(*lineup, skipped),
        kernel_classes=classes,
        matrices=tuple(each.to_report(classes) for each in build_matrices(measured)),
        environment=compare_environments(environment(), facts(), laptop, cpu),
        verifier_environment=laptop,
    )
    return msgspec.structs.replace(result, **changes)


HOSTILE = (
    "\x1b[2J\x07\u202e<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{7*7}}$\\frac{1}${\r\n✓ CONSISTENT"
)


def hostile_sample() -> CheckResult:
    """Everything that can come from evidence is hostile: ids, claim, references, environment, reasons."""
    row = HOSTILE + "nf4"
    result = sample(rows=(row,), columns=(row, f"a,{HOSTILE}"), true=row, claim=HOSTILE)
    hostile_matrices = tuple(
        msgspec.structs.replace(each, references=(HOSTILE, *each.references[1:])) for each in result.matrices
    )
    hostile_environment = compare_environments(
        environment(hostname=HOSTILE, packages={HOSTILE: HOSTILE}, variables={HOSTILE: HOSTILE}),
        facts(attention_kernels={HOSTILE: [HOSTILE]}, numerics={HOSTILE: HOSTILE}, versions={HOSTILE: HOSTILE}),
        environment(),
        facts(),
    )
    return msgspec.structs.replace(
        result,
        nonce=HOSTILE,
        signer=HOSTILE,
        evidence_created_at=HOSTILE,
        matrices=hostile_matrices,
        environment=hostile_environment,
        kernel_classes=((row, HOSTILE),),
        lineup=tuple(msgspec.structs.replace(each, id=HOSTILE) for each in result.lineup),
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
    assert line == f"✗ INCONSISTENT: {'; '.join(caught.rows[0].reasons)}"
    several = msgspec.structs.replace(
        caught, rows=(msgspec.structs.replace(caught.rows[0], config_id="other", verdict="CONSISTENT"), *caught.rows)
    )
    assert text.one_line(several) == f"✗ INCONSISTENT: {SPECS[0]}: {'; '.join(caught.rows[0].reasons)}"
    hostile = text.one_line(hostile_sample())
    assert hostile.isprintable()


LABELS = ("TRIVIALLY DETECTABLE", "CLEARLY DETECTABLE", "MARGINALLY DETECTABLE", "NOT RELIABLY DETECTABLE")


def test_a_caught_lie_has_no_scale() -> None:
    """Its diagonal is the distance to the false claim: labels by it would say of the lie that it cannot be detected."""
    caught = sample(true="quant=bnb-nf4")
    assert caught.verdict == "INCONSISTENT"
    assert all(each.label == "NOT RELIABLY DETECTABLE" for each in caught.matrices)
    printed, page = text.render(caught), Page(html.render(caught)).text
    for shown in (printed, page):
        assert not any(label in shown for label in LABELS)
        assert "Not Detectable" not in shown
        assert NO_SCALE in shown
    assert printed.count(f"→ {NO_SCALE}") == 6  # two phases, three signals


def test_a_diagonal_that_is_not_the_smallest_of_its_row_has_no_scale() -> None:
    matrix = build_matrices(
        Measurement(row="a", column=column, reference_id="r", distances={Cell("prefill", "logprobs"): distance})
        for column, distance in (("a", 2.0), ("b", 1.0), ("c", 90.0))
    )[0].to_report()
    rows = sample().rows
    assert misfits(matrix, rows) == {"a"}
    assert scale(matrix, {"a"}) == NO_SCALE != scale(matrix, ()) == "CLEARLY DETECTABLE (Strong)"
    (b,) = [pair for pair in matrix.pairwise if pair.b == "b"]
    assert pair_scale(b, {"a"}) == "no scale" and pair_scale(b, ()) == "NOT RELIABLY DETECTABLE (Not Detectable)"
    equal = msgspec.structs.replace(matrix, aggregate=((1.0, 1.0, 90.0),))
    assert misfits(equal, rows) == frozenset()


def test_an_honest_claim_keeps_its_labels() -> None:
    honest = sample(columns=(SPECS[0], "quant=bnb-nf4"))
    printed, page = text.render(honest), Page(html.render(honest)).text
    for shown in (printed, page):
        assert "CLEARLY DETECTABLE" in shown and NO_SCALE not in shown and SAME_KERNELS not in shown


def test_a_zero_diagonal_says_what_it_does_not_say() -> None:
    result = sample(rows=SPECS, claim="", identical=True)
    printed, page = text.render(result), Page(html.render(result)).text
    for shown in (printed, page):
        assert f"inf ({SAME_KERNELS})" in shown
        assert f"inf: {SAME_KERNELS}" in shown


def written(result: CheckResult, path: Path) -> str:
    """Every text of the picture."""
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    drawn: list[str] = []
    with pytest.MonkeyPatch.context() as patch:

        def savefig(figure: Figure, *_: Any, **__: Any) -> None:
            drawn.extend(each.get_text() for each in figure.findobj(Text))

        patch.setattr(Figure, "savefig", savefig)
        heatmap.render_png(result, path)
    return "\n".join(drawn)


def test_the_picture_has_no_scale_either(tmp_path: Path) -> None:
    caught = written(sample(true="quant=bnb-nf4"), tmp_path / "never.png")
    assert caught.count("no scale") == 7 and NO_SCALE in caught and "SNR" not in caught
    honest = written(sample(columns=(SPECS[0], "quant=bnb-nf4")), tmp_path / "never.png")
    assert "SNR" in honest and "no scale" not in honest
    same = written(sample(rows=SPECS, claim="", identical=True), tmp_path / "never.png")
    assert f"inf: {SAME_KERNELS}" in same


def test_the_lineup_says_whole_what_each_member_ran_as() -> None:
    """The weights are pinned by digest in what is run: that is no difference, and a short name of one would mislead."""
    result = sample()
    nf4 = parse_config("quant=bnb-nf4")
    ran = msgspec.structs.replace(nf4, weights_digest="sha256:" + "0" * 64, matmul="fp32-rounded")
    (member,) = [each for each in result.lineup if each.id == "quant=bnb-nf4"]
    result = msgspec.structs.replace(result, lineup=(msgspec.structs.replace(member, config=nf4, runs_as=ran),))
    printed, page = text.render(result), Page(html.render(result)).text
    for shown in (printed, page):
        assert str(claim_of(ran)) in shown
    assert "quant=bnb-nf4,attn=sdpa" in str(claim_of(ran)) and "matmul=fp32-rounded" in str(claim_of(ran))


def test_what_is_under_test_is_no_software_difference() -> None:
    lie = compare_environments(
        environment(),
        facts(quantization_kernel="bnb"),
        environment(),
        facts(),
        tested={"quantization"},
    )
    result = sample(environment=lie)
    printed, page = text.render(result), Page(html.render(result)).text
    assert "What the claim or the lineup is about:\n  ✓ quantization: prover=bnb, verifier=none" in printed
    assert "⚠" not in printed and "unexpected" not in page
    assert "quantization under test" in " ".join(page.split())


def test_ink_is_readable_on_every_page() -> None:
    """Where a cell is neither light nor dark, its ink is mixed by the same rule on both kinds of pages."""
    rules = [each for each in html.render(sample()).splitlines() if "--switch" in each]
    assert len(rules) == 3  # light, dark, and what uses it


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


def test_verdicts_reasons_and_what_it_cannot_tell_are_in_text_and_page() -> None:
    caught = sample(true="quant=bnb-nf4")
    printed, page = text.render(caught), Page(html.render(caught)).text
    for shown in (printed, page):
        assert "INCONSISTENT" in shown
        assert "further from the claimed config than rounding explains" in shown
        assert "quant=bnb-nf4, which contradicts the claim, fits better" in shown
        assert "Could not be run here, so were not compared: attn=flash_attention_2." in shown
        assert "no error rate is known for this verdict" in shown
    assert printed.splitlines()[-1] == "✗ INCONSISTENT"


def test_an_error_rate_is_named_where_a_calibration_gave_one() -> None:
    result = sample()
    (row,) = result.rows
    calibrated = msgspec.structs.replace(row, config_id="other", calibration="h100-cpu-1", alpha=0.01)
    only = " ".join(caveats(msgspec.structs.replace(result, rows=(calibrated,))))
    assert "The error rate is that of the calibration h100-cpu-1" in only and "fixed" not in only
    both = " ".join(caveats(msgspec.structs.replace(result, rows=(row, calibrated))))
    assert f"no error rate is known for the verdict on {row.config_id}." in both and "h100-cpu-1" in both


def test_kernel_classes_and_bit_identity_are_named() -> None:
    result = sample(rows=SPECS, claim="", same=((SPECS[0], SPECS[3]),), identical=True)
    named = f"{SPECS[0]} = {SPECS[3]}"
    printed, page = text.render(result), Page(html.render(result)).text
    for shown in (printed, page):
        assert f"The claim covers a kernel class: {named}" in shown
        assert "one kernel class" in shown and "identical" in shown and "inf" in shown
        assert "nan" not in shown.lower()
    assert f"Kernel class (bit-identical on this machine): {named}" in printed


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


def test_a_result_that_went_over_the_wire_prints_the_same() -> None:
    result = sample(rows=SPECS, claim="", identical=True)
    received = msgspec.json.decode(msgspec.json.encode(result), type=CheckResult)
    assert text.render(received) == text.render(result)
    assert html.render(received) == html.render(result)


def test_hostile_strings_reach_the_terminal_as_printable_text_on_their_own_line() -> None:
    printed = text.render(hostile_sample())
    assert all(c.isprintable() or c == "\n" for c in printed)
    assert "\\x1b[2J" in printed
    assert printed.splitlines()[-1] == "✗ INCONSISTENT"
    assert not any(line.startswith("✓ CONSISTENT") for line in printed.splitlines())


def test_hostile_strings_reach_the_page_as_text() -> None:
    rendered = html.render(hostile_sample())
    page, plain = Page(rendered), Page(html.render(sample()))
    assert page.tags <= plain.tags | {"wbr"}
    assert page.attributes <= plain.attributes
    page.require_harmless()
    assert all(c.isprintable() or c == "\n" for c in rendered)
    assert "<script>alert(1)</script>" in page.text and "{{7*7}}" in page.text


def test_page_stands_alone() -> None:
    page = html.render(sample())
    assert "://" not in page and "url(" not in page and "@import" not in page
    assert "default-src 'none'" in page and "prefers-color-scheme: dark" in page


def test_page_shows_layers_in_noise_floors() -> None:
    result = sample()
    lines = html.layer_lines(result.rows[0], result.matrices)
    assert len(lines) == len(result.rows[0].noise) == 14
    first = lines[0]
    logprobs = next(each for each in result.matrices if each.phase == first.phase and not each.layer)
    noise = next(each.noise for each in result.rows[0].noise if each.cell == Cell(first.phase, "logprobs"))
    own = logprobs.aggregate[0][0]
    assert own is not None and first.members[0].own and first.members[0].shown == f"{own / noise:.2f}"


@pytest.mark.parametrize("make", [sample, hostile_sample, lambda: sample(rows=SPECS, identical=True)])
def test_picture_is_a_picture_with_something_in_it(make: Callable[[], CheckResult], tmp_path: Path) -> None:
    import matplotlib.image

    path = tmp_path / "heat.png"
    heatmap.render_png(make(), path)
    pixels = matplotlib.image.imread(path)
    assert 500 < pixels.shape[0] < 4000 and 800 < pixels.shape[1] < 4000
    assert len(np.unique(pixels[..., :3].sum(axis=2))) > 100


@pytest.mark.parametrize(("module", "call"), [("jinja2", html.render), ("matplotlib.figure", None)])
def test_what_is_not_installed_is_named_with_its_install_command(
    module: str, call: Callable[[CheckResult], str] | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError) as caught:
        call(sample()) if call else heatmap.render_png(sample(), tmp_path / "never.png")
    assert "pip install 'fpforensics[report]'" in caught.value.diagnostics()
    assert not list(tmp_path.iterdir())


def test_an_auditor_needs_neither_torch_nor_a_plotting_library() -> None:
    code = (
        "import sys; from fpforensics.verifier.report import heatmap, html, text;"
        "print(sorted({'torch', 'transformers', 'matplotlib', 'jinja2', 'grpc'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@given(st.lists(st.one_of(st.just(0.0), st.just(float("nan")), st.floats(1e-12, 1e12)), min_size=1))
def test_colours_keep_the_order_of_the_distances(values: list[float]) -> None:
    array = np.array(values)
    scaled = log_scale(array)
    assert np.array_equal(np.isnan(scaled), np.isnan(array))
    known = ~np.isnan(array)
    assert ((scaled[known] >= 0) & (scaled[known] <= 1)).all()
    assert np.array_equal(scaled[known] == 0, array[known] == 0)
    order = np.argsort(array[known], kind="stable")
    assert (np.diff(scaled[known][order]) >= 0).all()


def test_clean_cuts_and_escapes() -> None:
    assert clean("a\u202eb\x00\n\ud800") == "a\\u202eb\\x00\\n\\ud800"
    assert clean("naïve 模型 ✓") == "naïve 模型 ✓"
    assert clean("x" * 500) == "x" * 400 + "…"


def test_a_calibrated_row_shows_its_p_values() -> None:
    result = sample()
    first, *rest = result.rows
    scores = tuple(
        msgspec.structs.replace(score, p_value=p, rejected=p is None or p < 0.01)
        for score, p in zip(first.scores, (1.0, 0.0083, None, *[1.0] * len(first.scores)), strict=False)
    )
    row = msgspec.structs.replace(
        first, scores=scores, calibration="the profile", alpha=0.01, p_value=0.7, positions=16
    )
    calibrated = msgspec.structs.replace(result, rows=(row, *rest))
    for shown in (text.render(calibrated), html.render(calibrated)):
        assert f"Calibrated by the profile; level 0.01; {row.references} prompts, worth 16 positions" in shown
        assert "p of the claim 0.7" in shown
        assert "0.0083" in shown
        assert "limit" in shown
    assert "Calibrated by" not in text.render(result)
