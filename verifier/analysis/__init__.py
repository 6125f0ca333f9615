"""Redo a published study from its numbers: distances, matrices and SNR of one experiment, or of one against another.

Pure NumPy over files. Alone, an experiment is compared with itself: the diagonal is zero, and what differs is
seen within one machine. With a second one, rows are the first's configs (claimed), columns the second's
(verified), and the diagonal is matched by ``variable_value``. The plan's four questions are answered for each
phase and signal: is each config reproducible; how far apart are two machines that do the same; is each value
of the variable seen within one machine; and across machines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fpforensics.common.errors import EvidenceError, UsageError, shorten
from fpforensics.common.lab.reader import Experiment
from fpforensics.common.lab.run import Run
from fpforensics.verifier.analysis.measure import Canonical, Measurements, Member
from fpforensics.verifier.analysis.report import report_of
from fpforensics.verifier.analysis.result import About, Analysis, CellAnalysis, Source

__all__ = ["DEFAULT_TOP", "Analysis", "Canonical", "CellAnalysis", "analyze"]

Report = Callable[[str, int, int], None]
"""Called with (what is happening, done, total)."""
DEFAULT_TOP = 5
"""How many of the listed ids are compared: the published studies used five."""


def analyze(
    claimed: Experiment,
    observed: Experiment | None = None,
    *,
    canonical: Canonical = "claimed",
    top: int = DEFAULT_TOP,
    report: Report = lambda _stage, _done, _total: None,
) -> Analysis:
    """Every phase and signal that was measured, in the order of :data:`PHASES` and :data:`SIGNALS`.

    Log-probabilities are compared at the first ``top`` ids as listed by each row's own trace (``claimed``) or by
    the first config's (``first``), where both sides list them. Raises :class:`EvidenceError` for experiments
    that cannot be compared, :class:`UsageError` for a ``top`` below 1 and for experiments of two different variables.
    """
    if top < 1:
        raise UsageError(f"top {top}", "compare at least one token id")
    sides = [claimed] if observed is None else [claimed, observed]
    _require_one_variable(sides)
    members = [Member(side, each) for side, source in enumerate(sides) for each in source.configurations]
    references, one_sided = _shared([each.references for each in sides])
    if not references:
        raise EvidenceError(
            f"no reference is in both {claimed.name} and {sides[-1].name}",
            f"they hold {' and '.join(', '.join(map(shorten, each.references[:3])) for each in sides)}",
        )
    collected = Measurements(members, one_sided)
    for done, reference in enumerate(references):
        report("comparing references", done, len(references))
        runs: dict[tuple[int, str], Run] = {}
        for side, source in enumerate(sides):
            for run in source.read_all(reference):
                if (first := runs.setdefault((side, run.info.config_id), run)) is not run:
                    collected.repeat(side, first, run)
        collected.measure(reference, [runs.get((each.side, each.id)) for each in members], canonical, top)
    if not collected.distances:
        names = " and ".join(each.name for each in sides)
        raise EvidenceError(f"{names}: no run holds a signal", "there is nothing to compare")
    about = About(
        variable=claimed.metadata["variable_tested"],
        claimed=_source(claimed),
        observed=None if observed is None else _source(observed),
        canonical=canonical,
        top=top,
    )
    return report_of(collected, about)


def _require_one_variable(sides: Sequence[Experiment]) -> None:
    variables = [each.metadata["variable_tested"] for each in sides]
    if len(set(variables)) > 1:
        tested = (f"{each.name} tests {shorten(name)!r}" for each, name in zip(sides, variables, strict=True))
        raise UsageError(
            " and ".join(tested), "configs are matched by the value of one variable: give two experiments on the same"
        )


def _shared(held: Sequence[Sequence[str]]) -> tuple[list[str], list[tuple[str, ...]]]:
    """The references that every side holds, and of each side those that only it holds; in order."""
    common = set.intersection(*map(set, held))
    return [name for name in held[0] if name in common], [
        tuple(name for name in each if name not in common) for each in held
    ]


def _source(experiment: Experiment) -> Source:
    hardware = dict.fromkeys(each.hardware for each in experiment.configurations)
    return Source(file=experiment.name, model=experiment.metadata.get("model", ""), hardware=tuple(hardware))
