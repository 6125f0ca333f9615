"""The plan's summary over many experiments: baseline, largest signal, SNR and how detectable that makes the variable."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np

from fpforensics.common.errors import Error
from fpforensics.common.lab.reader import Experiment
from fpforensics.common.signals import Phase, Signal
from fpforensics.verifier.analysis.result import Analysis, CellAnalysis
from fpforensics.verifier.matrix import Ratio, labels, ratio


class SummaryRow(msgspec.Struct, frozen=True, kw_only=True):
    """One experiment, phase and signal (pooled over layers). None stands where nothing was measured.

    ``baseline_l2`` is the mean distance between machines that do the same, ``max_signal_l2`` the largest distance
    from the first config of a machine to another one on it (the plan's sketch looks at no other pairs),
    ``detectability`` Strong, Moderate, Weak or Not Detectable, or empty without a baseline. ``unmeasured`` is why one of the
    two is None although there are configs that could be compared, or empty. Of a file that could not be analyzed there is
    one row, with nothing but ``file`` and ``error``.
    """

    file: str
    hardware: tuple[str, ...] = ()
    experiment: str = ""
    variable: str = ""
    phase: Phase | None = None
    signal: Signal | None = None
    baseline_l2: float | None = None
    max_signal_l2: float | None = None
    snr: float | None = None
    snr_infinite: bool = False
    detectability: str = ""
    unmeasured: str = ""
    error: str = ""


def summarize(experiment: Experiment, analysis: Analysis, file: str = "") -> Iterator[SummaryRow]:
    """A row for each phase and signal that was measured; ``file`` is the experiment's path, by default its name."""
    for phase, signals in analysis.items():
        for signal, cell in signals.items():
            sides = (cell.about.claimed, cell.about.observed)
            baseline = [each.distance for each in cell.cross_hardware_baseline]
            noise = float(np.mean(baseline)) if baseline else None
            largest = max((each.distance for each in cell.within_hardware), default=None)
            snr = ratio(largest, noise) if noise is not None and largest is not None else Ratio()
            yield SummaryRow(
                file=file or experiment.name,
                hardware=tuple(dict.fromkeys(name for side in sides if side for name in side.hardware)),
                experiment=experiment.metadata["experiment_type"],
                variable=experiment.metadata["variable_tested"],
                phase=phase,
                signal=signal,
                baseline_l2=noise,
                max_signal_l2=largest,
                snr=snr.value,
                snr_infinite=snr.infinite,
                detectability=labels(snr)[1],
                unmeasured=_unmeasured(cell),
            )


def _unmeasured(cell: CellAnalysis) -> str:
    steps = [
        each.step
        for each in cell.unanswered
        if each.step is not None and each.question in ("within_hardware", "cross_hardware_baseline")
    ]
    return f"tokens diverged from step {min(steps)} on" if steps else ""


def failed(file: str, error: Error) -> SummaryRow:
    """The row of a file that could not be analyzed."""
    return SummaryRow(file=file, error=error.diagnostics())
