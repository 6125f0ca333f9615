"""The one attack that the small bundle is too small for: 24 prompts' recorded distances at 64 positions each, to choose from."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import numpy as np
from bench_modules import bench_module

from fpforensics.common.signals import Array
from fpforensics.verifier.calibrated import Calibration, Part, Verdict, judge
from fpforensics.verifier.profile import Pool, built_in_profile
from fpforensics.verifier.score import EARLY, Scores, scores_of, worth_in_positions

SDPA, EAGER = "attn=sdpa,dtype=bf16", "attn=eager"
PROMPTS = 24
KINDS = ("evidence", "noise")


def verdicts(ran: str, claimed: str, *, prompts: int, positions: int, cut: bool) -> Counter[Verdict]:
    """Of every group of ``prompts`` from an H100 on a CPU, each shown at the last ``positions`` of its prompt.

    ``cut``: whoever chooses a prompt chooses where it ends. Each ends where it looks most like ``claimed``, those that do so
    best come first.
    """
    names = (SDPA, EAGER)
    own = names.index(claimed)
    evidence, units = (_windows(np.array([_recorded(kind, ran, name) for name in names]), positions) for kind in KINDS)
    to_anchor = _windows(_recorded("evidence", ran, "dtype=fp32"), positions)
    in_floors = (evidence / units[own]).mean(axis=2)  # (names, prompts, places to end at)
    nearer = in_floors[1 - own] / in_floors[own]
    ends = nearer.argmax(axis=1) if cut else np.full(PROMPTS, nearer.shape[1] - 1)
    order = np.argsort(-nearer.max(axis=1)) if cut else np.arange(PROMPTS)
    every = np.arange(PROMPTS)
    sums = evidence[:, every, :, ends], units[:, every, :, ends], to_anchor[every, :, ends]
    distances, floors, anchor = np.moveaxis(sums[0], 0, 1), np.moveaxis(sums[1], 0, 1), sums[2]

    def scores(group: Array) -> tuple[Scores, Pool]:
        worth = worth_in_positions([positions] * len(group))
        labels = tuple(f"ref_{number}" for number in group)
        found = scores_of(names, claimed, worth, distances[:, group], floors[:, group], anchor[group], labels)
        pool = built_in_profile().pool(found.positions)
        assert pool is not None
        return found, pool

    counted: Counter[Verdict] = Counter()
    for first in range(0, PROMPTS - prompts + 1, prompts):
        group = order[first : first + prompts]
        parts = [Part(str(number), *scores(np.array([number]))) for number in group] if prompts > 1 else []
        whole, pool = scores(group)
        calibration = Calibration(whole, pool, "built in", set(names), parts=parts)
        counted[judge(claimed, [claimed], [names[1 - own]], calibration).verdict] += 1
    return counted


def _windows(distances: Array, positions: int) -> Array:
    """(..., positions) -> (..., places to end at): sums over each run of so many positions."""
    sums: Array = np.lib.stride_tricks.sliding_window_view(distances, positions, axis=-1).sum(axis=-1)
    return sums


def _recorded(kind: str, row: str, member: str) -> Array:
    """(prompts, early cells, positions)."""
    recorded = _directions()[0]
    columns = [recorded.cells.index(f"{key.signal}/{key.layer}") for key in EARLY]
    every: Array = getattr(recorded, kind)[recorded.rows.index(row), recorded.members.index(member)]
    return every[:, columns]


@cache
def _directions() -> Any:
    """What ``bench/decision.py`` reads: first an H100's evidence on a CPU."""
    return bench_module("decision").load()
