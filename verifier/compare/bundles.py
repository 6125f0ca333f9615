"""The full logits of a pair of rows, read from their bundles a part at a time, become one :class:`CompareResult`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version

from fpforensics.common.evidence import Tensor
from fpforensics.common.signals import PHASES, Array
from fpforensics.verifier.compare.figures import RowMeasures, absolute_gaps, by_position, join, measure, summarize
from fpforensics.verifier.compare.median import MedianSearch
from fpforensics.verifier.compare.pairing import Pair, Part, Side
from fpforensics.verifier.compare.result import (
    ComparedSide,
    CompareResult,
    PhaseComparison,
    PooledPhase,
    ReferenceComparison,
    Summary,
)

Report = Callable[[str, int, int], None]
"""Called with (what is happening, done, total)."""


def compare_pair(pair: Pair, report: Report = lambda _stage, _done, _total: None) -> CompareResult:
    """The figures of each part, of each phase and of everything.

    Logits are read from the bundles a part at a time, twice: a median over all parts needs a second look. Raises
    :class:`EvidenceError` for logits that were changed since the bundle was opened, or that no model computes.
    """
    everything, phases = _Pool(), {phase: _Pool() for phase in PHASES}
    total, done = 2 * len(pair.parts()), 0
    compared: list[ReferenceComparison] = []
    for reference in pair.references:
        found: list[PhaseComparison] = []
        for part in reference.parts:
            report(f"comparing {reference.reference_id}, {part.phase}", done, total)
            found.append(_compare_part(pair, part, (everything, phases[part.phase])))
            done += 1
        compared.append(
            ReferenceComparison(
                reference_id=reference.reference_id,
                source=reference.source,
                prompt_tokens=reference.prompt_tokens,
                phases=tuple(found),
                decode_skipped=reference.decode_skipped,
            )
        )
    for part in pair.parts():
        report("finding medians", done, total)
        for gaps in absolute_gaps(*_load(pair, part)):
            everything.median.refine(gaps)
            phases[part.phase].median.refine(gaps)
        done += 1
    return CompareResult(
        tool_version=version("fpforensics"),
        a=_compared_side(pair.a, (part.a for part in pair.parts())),
        b=_compared_side(pair.b, (part.b for part in pair.parts())),
        vocab_size=pair.vocab_size,
        pooled=everything.summary(pair.vocab_size),
        pooled_phases=tuple(
            PooledPhase(phase=phase, summary=pool.summary(pair.vocab_size))
            for phase, pool in phases.items()
            if pool.rows
        ),
        references=tuple(compared),
    )


@dataclass
class _Pool:
    """Rows of several parts, and the search for the median of all their elements."""

    rows: list[RowMeasures] = field(default_factory=list)
    median: MedianSearch = field(default_factory=MedianSearch)

    def summary(self, vocab_size: int) -> Summary:
        return summarize(join(self.rows), vocab_size, self.median.median())


def _compare_part(pair: Pair, part: Part, pools: Sequence[_Pool]) -> PhaseComparison:
    logits_a, logits_b = _load(pair, part)
    own = _Pool()
    rows = measure(part.positions, logits_a, logits_b)
    for pool in (own, *pools):
        pool.rows.append(rows)
    for gaps in absolute_gaps(logits_a, logits_b):
        for pool in (own, *pools):
            pool.median.count(gaps)
    for gaps in absolute_gaps(logits_a, logits_b):
        own.median.refine(gaps)
    return PhaseComparison(phase=part.phase, summary=own.summary(pair.vocab_size), positions=by_position(rows))


def _load(pair: Pair, part: Part) -> tuple[Array, Array]:
    """Both sides' logits (M, V) at the part's positions, digests checked."""
    count = len(part.positions)
    return pair.a.bundle.array(part.a)[:count], pair.b.bundle.array(part.b)[:count]


def _compared_side(side: Side, tensors: Iterable[Tensor]) -> ComparedSide:
    evidence = side.bundle.evidence
    return ComparedSide(
        file=side.bundle.path.name,
        bundle_digest=side.bundle.digest,
        signer=side.bundle.signer.keyid,
        evidence_created_at=evidence.created_at,
        config_id=side.row.config_id,
        config=side.row.config,
        logits_dtype=", ".join(dict.fromkeys(tensor.dtype for tensor in tensors)),
        facts=side.row.facts,
        environment=evidence.environment,
    )
