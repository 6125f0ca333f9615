"""A collector that also keeps what calibration needs: the early cells' distances position by position, all cells' by prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fpforensics.common.errors import UsageError, shorten
from fpforensics.common.evidence import Row
from fpforensics.common.signals import PHASES, Trace
from fpforensics.verifier.collector import Checked, Collector, kind_of, position_counts
from fpforensics.verifier.coverage import rival_name
from fpforensics.verifier.distance import Cell, Floats, rows_l2
from fpforensics.verifier.intake import VerifiedBundle
from fpforensics.verifier.pooling import HonestPrompt
from fpforensics.verifier.replay import MemberReplay
from fpforensics.verifier.score import EARLY

_HOW = "record the early blocks: prover run --layers 1,2,4,…"


@dataclass(frozen=True)
class Recorded:
    """One prompt of one row. ``cells`` holds each cell's (honest distance, noise floor), L2; ``equal``: nothing differs."""

    prompt: HonestPrompt
    cells: Mapping[Cell, tuple[float, float]]
    equal: bool


class Recorder(Collector):
    """Records what :class:`Collector` measures, by position."""

    def __init__(self, bundle: VerifiedBundle, checked: Sequence[Checked]) -> None:
        super().__init__(bundle, checked)
        self._evidence: dict[tuple[str, str], list[Floats]] = {}  # (label, member) -> a (C, P) for each reference
        self._floors: dict[tuple[str, str], list[Floats]] = {}
        self._anchored: dict[str, list[Floats]] = {}

    def add(self, replay: MemberReplay) -> None:
        """Measure one member's replay, and keep its positions."""
        super().add(replay)
        member = replay.member
        for each in self._checked:
            traces = replay.traces.get(each.row.config_id)
            if traces is None:
                continue
            # One of the bundle's traces at a time: together they may be larger than memory.
            found = [early_rows(self._bundle.trace(each.row, trace.reference_id), trace) for trace in traces]
            if member.config == each.anchor:
                self._anchored[each.label] = found
            if (each.label, member.id) in self._distances:
                self._evidence[each.label, member.id] = found
            elif member.config != each.anchor:
                continue
            anchor = each.anchor and self._kept.get((each.anchor, each.label))
            if anchor and member.config != each.anchor and (each.label, member.config) in self._noise:
                pairs = zip(traces, anchor, strict=True)
                self._floors[each.label, member.id] = [early_rows(*pair) for pair in pairs]

    def prompts(self, each: Checked, keys: Mapping[str, str]) -> list[Recorded]:
        """Every prompt of one row; ``keys`` names the prompt that each reference is. Rivals are named beside the row's config."""
        if each.label not in self._anchored:
            raise UsageError(
                f"{each.label} has no anchor: nothing wider than {each.config.dtype} with {each.config.quantization} weights "
                "can be computed",
                "equality and fixed limits decide there; calibrate other rows",
            )
        names = [name for (label, name) in self._evidence if label == each.label]
        kinds = {name: kind_of(self._configs[name]) for name in names}
        said = {name: rival_name(self._configs[name], each.config) for name in names}
        own = self._distances[each.label, each.label]
        floors = self._noise[each.label, each.config]
        counts = position_counts(each.row)
        recorded = []
        for index, reference in enumerate(own):
            to_anchor = self._anchored[each.label][index]
            missing = np.full_like(to_anchor, np.nan)
            units = [self._floors.get((each.label, name)) for name in names]
            prompt = HonestPrompt(
                key=keys[reference],
                own=said[each.label],
                base=said[each.label],
                rivals=tuple(said[name] for name in names if kinds[name] != kinds[each.label]),
                names=tuple(said.values()),
                distances=np.array([self._evidence[each.label, name][index] for name in names]),
                units=np.array([missing if found is None else found[index] for found in units]),
                to_anchor=to_anchor,
                decode=counts[reference]["decode"],
            )
            cells = {cell: (value, floors[reference][cell]) for cell, value in own[reference].items()}
            recorded.append(Recorded(prompt, cells, not any(own[reference].values())))
        return recorded


def early_rows(ours: Trace, theirs: Trace) -> Floats:
    """The early cells' distances at each position, (C, P): prefill first, then decode."""
    rows = []
    for key in EARLY:
        phases = []
        for phase in PHASES:
            one, other = (getattr(trace.phase(phase), key.signal) for trace in (ours, theirs))
            if len(ours.phase(phase).positions):
                phases.append(rows_l2(one[key.layer], other[key.layer], f"{key.signal}/{key.layer}"))
        rows.append(np.concatenate(phases))
    return np.array(rows, np.float64)


def require_early(row: Row, path: Path) -> None:
    """Raise :class:`UsageError` for a row that lacks an early layer; ``path`` names its bundle."""
    for entry in row.traces:
        for tensors in (entry.prefill, entry.decode):
            missing = [f"{key.signal}/{key.layer}" for key in EARLY if f"{key.signal}/{key.layer}" not in tensors]
            if missing and tensors["positions"].shape[0]:
                raise UsageError(f"row {shorten(row.config_id)} of {path} lacks {', '.join(missing)}", _HOW)
