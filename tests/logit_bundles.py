"""Synthetic bundles with full logits, edited as they are written, and compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from synthetic import TEST_KEY, Size, evidence, trace

from fpforensics.common.bundle import BundleWriter
from fpforensics.common.errors import UsageError
from fpforensics.common.evidence import Evidence
from fpforensics.common.keys import Keyring
from fpforensics.common.signals import Array, Trace
from fpforensics.verifier.compare.bundles import compare_pair
from fpforensics.verifier.compare.pairing import choose_side, pair_rows
from fpforensics.verifier.compare.result import CompareResult
from fpforensics.verifier.intake import open_bundle

KEYRING = Keyring([TEST_KEY.public])

SIZE = Size(references=2, prompt=6, prefill=6, output=4, logits=True)

# What writing a bundle may change: (row, trace) to a trace.
Edit = Callable[[int, Trace], Trace]


def write(
    path: Path,
    size: Size = SIZE,
    edit: Edit = lambda _row, unchanged: unchanged,
    change: Callable[[Evidence], Evidence] = lambda unchanged: unchanged,
) -> Path:
    """Synthetic evidence whose traces went through ``edit``."""
    with BundleWriter(path) as writer:
        made = evidence(size, writer)
        rows = tuple(
            msgspec.structs.replace(
                row,
                traces=tuple(writer.add_trace(edit(index, trace(size, index, at))) for at in range(size.references)),
            )
            for index, row in enumerate(made.rows)
        )
        writer.finish(change(msgspec.structs.replace(made, rows=rows)), TEST_KEY)
    return path


def nudged(amount: float) -> Edit:
    """Row 0's logits plus noise."""

    def edit(row: int, each: Trace) -> Trace:
        phases = []
        for phase in (each.prefill, each.decode):
            assert phase.logits is not None
            wave = np.sin(np.arange(phase.logits.size)).reshape(phase.logits.shape)
            phases.append(
                replace(phase, logits=(phase.logits.astype(float) + amount * wave).astype(phase.logits.dtype))
            )
        return replace(each, prefill=phases[0], decode=phases[1])

    return edit


def with_output(*output_ids: int, only: str = "ref_1") -> Edit:
    """Another output for one reference; of its decode signals the rows that then fit."""

    def edit(_row: int, each: Trace) -> Trace:
        if each.reference_id != only:
            return each
        keep = len(output_ids) - 1
        decode = {name: rows[:keep] for name, rows in each.decode.tensors().items()}
        return replace(each, output_ids=np.array(output_ids, np.int32), decode=type(each.decode).from_tensors(decode))

    return edit


def compared(a: Path, b: Path, row_a: str = "", row_b: str = "") -> CompareResult:
    with open_bundle(a, KEYRING) as first, open_bundle(b, KEYRING) as second:
        return compare_pair(pair_rows(choose_side("A", first, row_a), choose_side("B", second, row_b)))


def refused(a: Path, b: Path, row_a: str = "", row_b: str = "") -> str:
    with pytest.raises(UsageError) as caught:
        compared(a, b, row_a, row_b)
    text = caught.value.diagnostics()
    assert caught.value.hint
    assert text.isprintable()
    assert len(text) < 400
    return text


def logits_of(size: Size, row: int, edit: Edit = lambda _row, unchanged: unchanged) -> dict[tuple[str, str], Array]:
    found = {}
    for at in range(size.references):
        each = edit(row, trace(size, row, at))
        for phase, signals in (("prefill", each.prefill), ("decode", each.decode)):
            assert signals.logits is not None
            found[each.reference_id, phase] = signals.logits.astype(np.float64)
    return found
