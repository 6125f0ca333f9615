"""The plan's summary over many experiments: baseline, largest signal, SNR and how detectable that makes the variable."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np

from fpforensics.common.lab.reader import Experiment
from fpforensics.common.signals import Phase, Signal
from fpforensics.verifier.analysis.result import Analysis
from fpforensics.verifier.matrix import Ratio, labels, ratio


class SummaryRow(msgspec.Struct, frozen=True, kw_only=True):
    """One experiment, phase and signal (pooled over layers). None stands where nothing was measured.

    ``baseline_l2`` is the mean distance between machines that do the same, ``max_signal_l2`` the largest
    distance that a value of the variable makes within one machine, ``detectability`` Strong, Moderate, Weak or
    Not Detectable, or empty without a baseline.
    """

    experiment: str
    variable: str
    phase: Phase
    signal: Signal
    baseline_l2: float | None
    max_signal_l2: float | None
    snr: float | None
    snr_infinite: bool
    detectability: str


def summarize(experiment: Experiment, analysis: Analysis) -> Iterator[SummaryRow]:
    """A row for each phase and signal that was measured."""
    for phase, signals in analysis.items():
        for signal, cell in signals.items():
            baseline = [each.distance for each in cell.cross_hardware_baseline]
            noise = float(np.mean(baseline)) if baseline else None
            largest = max((each.distance for each in cell.within_hardware), default=None)
            snr = ratio(largest, noise) if noise is not None and largest is not None else Ratio()
            yield SummaryRow(
                experiment=experiment.metadata["experiment_type"],
                variable=experiment.metadata["variable_tested"],
                phase=phase,
                signal=signal,
                baseline_l2=noise,
                max_signal_l2=largest,
                snr=snr.value,
                snr_infinite=snr.infinite,
                detectability=labels(snr)[1],
            )
