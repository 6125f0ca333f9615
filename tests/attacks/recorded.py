"""The one attack that the small bundle is too small for: 24 prompts' recorded distances at 64 positions each, to pick from."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from fpforensics.common.signals import Array
from fpforensics.verifier.calibrated import Calibration, Verdict, judge
from fpforensics.verifier.profile import built_in_profile
from fpforensics.verifier.score import EARLY, scores_of, worth_in_positions

DISTANCES = Path(__file__).parents[1] / "assets" / "h100" / "distances.npz"
SDPA, EAGER = "attn=sdpa,dtype=bf16", "attn=eager"
PROMPTS, POSITIONS = 24, 64


def verdicts(ran: str, claimed: str, *, prompts: int, positions: int, picked: bool) -> Counter[Verdict]:
    """Of every group of ``prompts`` from an H100 on a CPU: each shown at its last ``positions``, or at the likeliest ones."""
    names = (SDPA, EAGER)
    evidence, units = (np.array([_recorded(kind, ran, name) for name in names]) for kind in ("evidence", "noise"))
    to_anchor = _recorded("evidence", ran, "dtype=fp32")
    own = names.index(claimed)
    in_floors = (evidence / units[own]).mean(axis=2)  # (names, prompts, positions)
    order = in_floors[own] / in_floors[1 - own] if picked else np.tile(-np.arange(POSITIONS), (PROMPTS, 1))
    shown = np.argsort(order, axis=1)[:, None, :positions]

    def sums(distances: Array) -> Array:
        rows = np.broadcast_to(shown, (*distances.shape[:-1], positions))
        total: Array = np.take_along_axis(distances, rows, -1).sum(-1)
        return total

    found: Counter[Verdict] = Counter()
    for first in range(0, PROMPTS, prompts):
        group = slice(first, first + prompts)
        scores = scores_of(
            names,
            claimed,
            worth_in_positions([positions] * prompts),
            sums(evidence)[:, group],
            sums(units)[:, group],
            sums(to_anchor)[group],
            tuple(f"ref_{number}" for number in range(prompts)),
        )
        pool = built_in_profile().pool(scores.positions)
        assert pool is not None
        calibration = Calibration(scores, pool, "built in", set(names))
        found[judge(claimed, [claimed], [names[1 - own]], calibration).verdict] += 1
    return found


def _recorded(kind: str, row: str, member: str) -> Array:
    """(prompts, early cells, positions): 128 · log2 in 16 bits, -32767 for zero."""
    with np.load(DISTANCES) as data:
        rows, members, cells = (data[f"h100-on-cpu.{name}"].tolist() for name in ("rows", "members", "cells"))
        codes = data[f"h100-on-cpu.{kind}"][rows.index(row), members.index(member)]
    early = codes[:, [cells.index(f"{key.signal}/{key.layer}") for key in EARLY]]
    return np.where(early == -32767, 0.0, np.exp2(early / 128))
