"""A comparison of two runs' full logits as text, in the shape of the published comparison of TP=1 with TP=4 logits.

Tables that sum up come first, over everything and by phase; then, for each reference, the positions one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from fpforensics.common.words import counted
from fpforensics.verifier.compare.result import (
    ComparedSide,
    CompareResult,
    PhaseComparison,
    PositionComparison,
    ReferenceComparison,
    Summary,
)
from fpforensics.verifier.report import clean, fixed, tables

# More positions than anybody reads; the JSON has them all.
_MOST_POSITIONS = 64

Column = tuple[str, Summary]


def render(result: CompareResult) -> str:
    """The whole report; every line has been cleaned, and ends with a newline."""
    return tables.finish(_report(result))


def _report(result: CompareResult) -> Iterator[str]:
    yield from tables.heading("LOGIT & LOG-PROB COMPARISON")
    yield from _setup(result)
    columns = [(each.phase, each.summary) for each in result.pooled_phases]
    yield from _figures([("all", result.pooled), *columns] if len(columns) > 1 else columns)
    for reference in result.references:
        yield from _reference(reference, alone=len(result.references) == 1)
    yield from ("", "These figures describe a difference; they are no verdict (see verifier check).")


def _setup(result: CompareResult) -> Iterator[str]:
    a, b = result.a, result.b
    model = a.facts.model
    prompts = ", ".join(
        f"{each.reference_id} ({counted(each.prompt_tokens, 'token')}{', ' + each.source if each.source else ''})"
        for each in result.references[:4]
    )
    more = f" and {len(result.references) - 4} more" if len(result.references) > 4 else ""
    shared = [
        ("Model", model.name),
        ("Layers", f"{model.num_layers}"),
        ("Hidden size", f"{model.hidden_size}"),
        ("Vocab size", f"{result.vocab_size:,}"),
        ("Prompts", prompts + more),
        ("Positions", f"{result.pooled.positions}"),
    ]
    yield from tables.columns([("Parameter", "Value"), *shared], "<<")
    yield ""
    sides = [(name, value(a), value(b)) for name, value in _SIDE]
    yield from tables.columns([("", "A (baseline)", "B (comparison)"), *sides], "<<<")


_SIDE: tuple[tuple[str, Callable[[ComparedSide], str]], ...] = (
    ("Config", lambda side: clean(side.config_id, 80)),
    ("Bundle", lambda side: f"{clean(side.file, 60)}, {side.bundle_digest[:19]}…"),
    ("Signed by", lambda side: f"{side.signer[:16]}…"),
    ("Weights", lambda side: f"{clean(side.facts.model.weights_digest, 19)}"),
    ("Logits", lambda side: side.logits_dtype),
    ("GPU", lambda side: clean(side.facts.gpu or ", ".join(side.environment.gpus) or "none", 80)),
    ("CPU", lambda side: clean(side.environment.cpu, 80)),
    ("Ran on", lambda side: clean(side.facts.device, 40)),
)


def _figures(columns: Sequence[Column]) -> Iterator[str]:
    """The four tables of figures, one column of values for each summary."""
    names = [name for name, _ in columns] if len(columns) > 1 else ["Value"]
    yield from _subheading("Raw Logit Differences")
    yield from _metrics(names, columns, _RAW)
    yield from _subheading("Chosen-Token Log-Prob Error")
    yield "The chosen token t is A's argmax at each position: Δ = logp_A(t) - logp_B(t)."
    yield ""
    yield from _metrics(names, columns, _CHOSEN)
    yield from _subheading("Full-Distribution Divergence")
    heads = [f"{name} {which}" if len(columns) > 1 else which.title() for name in names for which in ("mean", "max")]
    yield from _metrics(heads, [column for column in columns for _ in "ab"], _DIVERGENCE, alternating=True)
    yield from _subheading("Top-k Token Agreement")
    yield from _metrics(names, columns, _AGREEMENT)


Metric = tuple[str, Callable[[Summary], str]]
_RAW: tuple[Metric, ...] = (
    ("Max absolute difference", lambda s: fixed(s.logits.max_abs)),
    ("Mean absolute difference", lambda s: fixed(s.logits.mean_abs)),
    ("Median absolute difference", lambda s: fixed(s.logits.median_abs)),
    ("Cosine similarity (min)", lambda s: _cosine(s.logits.cosine_min)),
    ("Cosine similarity (mean)", lambda s: _cosine(s.logits.cosine_mean)),
    ("Differ by more than 1e-4", lambda s: _percent(s.logits.shares_above[0].share)),
    ("Differ by more than 1e-2", lambda s: _percent(s.logits.shares_above[1].share)),
)
_CHOSEN: tuple[Metric, ...] = (
    ("mean |Δ|", lambda s: fixed(s.chosen.mean_abs)),
    ("max |Δ|", lambda s: fixed(s.chosen.max_abs)),
    ("signed mean (bias)", lambda s: fixed(s.chosen.signed_mean)),
    ("std", lambda s: "—" if s.chosen.std is None else fixed(s.chosen.std)),
    ("token_mult_prob_error", lambda s: _ratio(s.chosen.token_mult_prob_error)),
)
# A mean, then a maximum.
_DIVERGENCE: tuple[tuple[str, Callable[[Summary], str], Callable[[Summary], str]], ...] = (
    ("KL(A || B)", lambda s: fixed(s.divergence.kl_ab_mean, 5), lambda s: fixed(s.divergence.kl_ab_max, 5)),
    ("KL(B || A)", lambda s: fixed(s.divergence.kl_ba_mean, 5), lambda s: fixed(s.divergence.kl_ba_max, 5)),
    (
        "Total variation dist",
        lambda s: fixed(s.divergence.total_variation_mean, 5),
        lambda s: fixed(s.divergence.total_variation_max, 5),
    ),
)
_AGREEMENT: tuple[Metric, ...] = (
    (
        "Top-1 agreement",
        lambda s: f"{_percent(s.agreement.top1_share)} ({s.agreement.top1_matches}/{counted(s.positions, 'position')})",
    ),
    (
        "Top-5 agreement",
        lambda s: f"{_percent(s.agreement.top5_share)} ({s.agreement.top5_shared}/{s.agreement.top5_slots} slots)",
    ),
)


def _metrics(
    heads: Sequence[str],
    columns: Sequence[Column],
    metrics: Sequence[tuple[str, *tuple[Callable[[Summary], str], ...]]],
    alternating: bool = False,
) -> Iterator[str]:
    """``alternating``: the columns come in pairs, of which the second shows each metric's second figure."""
    rows = [
        (name, *(values[index % 2 if alternating else 0](summary) for index, (_, summary) in enumerate(columns)))
        for name, *values in metrics
    ]
    yield from tables.columns([("Metric", *heads), *rows], "<" + ">" * len(heads))


def _reference(reference: ReferenceComparison, alone: bool) -> Iterator[str]:
    for each in reference.phases:
        yield from tables.heading(f"{clean(reference.reference_id).upper()} ({each.phase.upper()})")
        if not alone:
            yield from _figures([(each.phase, each.summary)])
        yield from _positions(each)
    skipped = reference.decode_skipped
    if skipped:
        yield from ("", f"Not compared, {clean(reference.reference_id)}, decode from position {skipped.first} on:")
        yield f"  {skipped.reason} (positions left out: {skipped.positions_a} of A, {skipped.positions_b} of B)"


def _positions(phase: PhaseComparison) -> Iterator[str]:
    shown = phase.positions[:_MOST_POSITIONS]
    more = len(phase.positions) - len(shown)
    rest = [f"… and {counted(more, 'more position')}: --json has them all"] if more else []
    yield from _subheading("Per-position logit breakdown")
    yield from tables.columns([_RAW_HEADS, *(_raw_row(each) for each in shown)], ">>>>>")
    yield from rest
    furthest = max(phase.positions, key=lambda each: each.max_abs)
    if furthest.max_abs > 0:
        yield from ("", f"Position {furthest.position} has the largest divergence.")
    yield from _subheading("Per-position detail")
    yield from tables.columns([_CHOSEN_HEADS, *(_chosen_row(each) for each in shown)], ">>>>>>")
    yield from rest
    worst = max(phase.positions, key=lambda each: abs(each.delta))
    if worst.delta:
        yield from ("", f"Position {worst.position} is the worst: {_worst(worst)}")
    if phase.summary.divergence.total_variation_max > 0:
        moved = _percent(phase.summary.divergence.total_variation_max)
        yield f"At worst {moved} of probability mass shifts between A and B."


_RAW_HEADS = ("Pos", "Max Abs Diff", "Mean Abs Diff", "Cosine Sim", "Top-1 Match")
_CHOSEN_HEADS = ("Pos", "Token", "logp (A)", "logp (B)", "Δ", "p_A/p_B")


def _raw_row(each: PositionComparison) -> tuple[str, ...]:
    match = "YES" if each.top1_match else "NO"
    return (f"{each.position}", fixed(each.max_abs), fixed(each.mean_abs), _cosine(each.cosine), match)


def _chosen_row(each: PositionComparison) -> tuple[str, ...]:
    delta = fixed(each.delta, sign="+")
    return (f"{each.position}", f"{each.token}", f"{each.logp_a:.4f}", f"{each.logp_b:.4f}", delta, _ratio(each.ratio))


def _worst(each: PositionComparison) -> str:
    if each.ratio is None:
        return f"one side gives token {each.token} next to no probability."
    share = each.ratio - 1 if each.delta < 0 else 1 - 1 / each.ratio
    return f"B assigns {_percent(share)} {'more' if each.delta < 0 else 'less'} probability to A's top token than A."


def _subheading(title: str) -> Iterator[str]:
    yield from ("", title, "-" * len(title))


def _cosine(value: float | None) -> str:
    return "—" if value is None else f"{value:.5f}"


def _ratio(value: float | None) -> str:
    return "inf" if value is None else f"{value:.3f}x" if value < 1e6 else f"{value:.3g}x"


def _percent(share: float) -> str:
    return f"{100 * share:.4g}%"
