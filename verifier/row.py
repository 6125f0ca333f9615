"""From the replays of one row to its verdict: by which calibration, and what its own repetitions excuse."""

from __future__ import annotations

from collections.abc import Mapping

from fpforensics.common.engines.base import ReplayMode
from fpforensics.common.environment import Environment
from fpforensics.verifier.collector import ANCHOR_PREFIX, Checked, Collector
from fpforensics.verifier.coverage import cover, scopes_of
from fpforensics.verifier.decision import RowVerdict, decide_row
from fpforensics.verifier.distance import Cell
from fpforensics.verifier.measured import MeasuredProfile
from fpforensics.verifier.repeats import with_own_noise


def verdict_on(
    each: Checked, collected: Collector, profile: MeasuredProfile | None, mode: ReplayMode, here: Environment
) -> RowVerdict:
    """One row decided, and noted what its calibration did not measure and what its own repetitions showed."""
    noise = collected.noise_floor(each)
    scopes = scopes_of(collected, each, collected.environment, here, mode)
    skipped = [report for report in collected.reports if report.skipped and not report.id.startswith(ANCHOR_PREFIX)]

    def decide(factors: Mapping[Cell, float]) -> RowVerdict:
        coverage = cover(collected, each, profile, scopes, factors)
        verdict = decide_row(
            config_id=each.label,
            claim=str(each.claim),
            members=collected.members_of(each),
            noise={cell: floor * factors.get(cell, 1.0) for cell, floor in noise.items()},
            kernel_classes=collected.kernel_classes(),
            identity_only=each.claim.assertions.keys() <= {"model"},
            calibration=coverage.calibration,
            uncalibrated=collected.lacking(each),
            setting=collected.setting(each, here, mode),
            not_replayed=[report.id for report in skipped if not each.claim.holds_for(report.config)],
        )
        return coverage.noted(verdict)

    return with_own_noise(decide({}), each.row.repetitions, noise, decide)
