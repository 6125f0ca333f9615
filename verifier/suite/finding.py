"""What a check before a suite's run found: one line each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import msgspec

from fpforensics.common.errors import Error, shorten

Status = Literal["passed", "failed", "not_applicable"]
MARKS: dict[Status, str] = {"passed": "✓", "failed": "✗", "not_applicable": "–"}

INTERPRETERS = "other interpreters"
RANKS = "GPUs and NCCL"
MODELS_SPACE = "space for models"
LOADS = "model loads"
SIGNALS = "signals and shapes"
REPEATS = "repetitions bit-exact"
DOCUMENT = "experiment JSON"
PROMPTS = "prompts exact"
OUTPUTS_SPACE = "space for outputs"
SKIPPED = "would be skipped"
REPLAY_OF = "replay of "
_MAX_LINE, _MAX_NAMES = 1000, 600
_WIDTH = max(map(len, (INTERPRETERS, RANKS, MODELS_SPACE, LOADS, SIGNALS, REPEATS, DOCUMENT, OUTPUTS_SPACE, SKIPPED)))


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One check of one thing: ``where`` is a prover, an interpreter, a model or a job; ``way_out`` is for what failed."""

    check: str
    where: str
    status: Status
    said: str
    way_out: str = ""


def passed(check: str, where: str, said: str) -> Finding:
    """It is as it must be."""
    return Finding(check=check, where=where, status="passed", said=said)


def not_applicable(check: str, where: str, said: str) -> Finding:
    """There is nothing to check, or no way to: ``said`` is why."""
    return Finding(check=check, where=where, status="not_applicable", said=said)


def failed(check: str, where: str, error: Error) -> Finding:
    """It is not, with the way out that the error knows."""
    return Finding(check=check, where=where, status="failed", said=error.message, way_out=error.hint)


def joined(findings: Iterable[Finding]) -> Iterator[Finding]:
    """For people: those that would be skipped for one reason as one, after all others, which come as they are found."""
    skipped: dict[str, list[Finding]] = {}
    for each in findings:
        if each.check == SKIPPED:
            skipped.setdefault(each.said, []).append(each)
        else:
            yield each
    for same in skipped.values():
        sessions = [each.where for each in same if not each.where.startswith(REPLAY_OF)]
        replays = [each.where.removeprefix(REPLAY_OF) for each in same if each.where.startswith(REPLAY_OF)]
        parts = [", ".join(sessions)] * bool(sessions) + [REPLAY_OF + ", ".join(replays)] * bool(replays)
        yield msgspec.structs.replace(same[0], where=shorten("; ".join(parts), _MAX_NAMES))


def is_ready(findings: Sequence[Finding]) -> bool:
    """Whether nothing failed."""
    return all(each.status != "failed" for each in findings)


def render_finding(finding: Finding) -> str:
    """One line for people; what came from another machine cannot steer a terminal."""
    hint = f" ({finding.way_out})" if finding.way_out else ""
    where = f"{finding.where}: " if finding.where else ""
    line = f"{MARKS[finding.status]} {finding.check:<{_WIDTH}}  {where}{finding.said}{hint}"
    return shorten(line.replace("\n", " "), _MAX_LINE)
