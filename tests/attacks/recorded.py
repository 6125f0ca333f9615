"""The one attack that the small bundle is too small for: 24 prompts' recorded distances at 64 positions each, to pick from."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from fpforensics.common.signals import Array
from fpforensics.verifier.calibrated import Calibration, Verdict, judge
from fpforensics.verifier.profile import built_in_profile
from fpforensics.verifier.score import EARLY, scores_of, worth_in_positions

BENCH = Path(__file__).parents[2] / "bench" / "decision.py"
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
    """(prompts, early cells, positions)."""
    recorded = _directions()[0]
    columns = [recorded.cells.index(f"{key.signal}/{key.layer}") for key in EARLY]
    every: Array = getattr(recorded, kind)[recorded.rows.index(row), recorded.members.index(member)]
    return every[:, columns]


@cache
def _directions() -> Any:
    """What ``bench/decision.py`` reads: first an H100's evidence on a CPU."""
    spec = importlib.util.spec_from_file_location("bench_decision", BENCH)
    assert spec is not None and spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    sys.modules["bench_decision"] = module
    spec.loader.exec_module(module)
    return module.load()
