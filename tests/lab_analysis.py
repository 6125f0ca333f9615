"""Made-up experiments analyzed, and their cells and entries found."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lab_documents import (
    Json,
    find_run,
    write_document,
)

from fpforensics.common.lab.reader import open_experiment
from fpforensics.verifier.analysis import Analysis, CellAnalysis, analyze

THREE = (("h_1", "H100", 1), ("h_2", "H100", 2), ("h_4", "H100", 4))

THREE_ELSEWHERE = (("a_1", "A100", 1), ("a_2", "A100", 2), ("a_4", "A100", 4))

SIGNALS = ("logprobs", "key_vectors", "hidden_states")


def analyzed(folder: Path, claimed: Json, observed: Json | None = None, **options: Any) -> Analysis:
    with ExitStack() as files:
        one = files.enter_context(open_experiment(write_document(claimed, folder / "claimed.json")))
        other = None
        if observed is not None:
            other = files.enter_context(open_experiment(write_document(observed, folder / "observed.json")))
        return analyze(one, other, **options)


def every_cell(found: Analysis) -> Iterator[CellAnalysis]:
    for signals in found.values():
        for cell in signals.values():
            yield cell
            yield from cell.per_layer.values()


def copy_signals(document: Json, source: str, target: str) -> None:
    """From one config's runs to another's: two names for one kernel."""
    for run in document["runs"]:
        if run["config_id"] == target:
            original = find_run(document, source, run["ref_id"], run["rep_id"])
            run |= {name: copy.deepcopy(original[name]) for name in ("prefill", "decode_steps")}


def entry(cell: CellAnalysis, row: str, column: str, reference: str = "") -> float | None:
    table = cell.per_reference[reference] if reference else cell.matrix
    return table[cell.configs.index(row)][cell.observed_configs.index(column)]
