"""What a replay cannot contradict is not vouched for, however well everything else fits."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from fpforensics.verifier.collector import Checked, MemberReport
from fpforensics.verifier.decision import RowVerdict
from fpforensics.verifier.replay import OTHER_KERNELS

UNSEEN = (
    "backend",
    "attention",
    "batch_size",
    "compile",
    "cuda_graphs",
    "kv_cache",
    "expert_parallel",
    "pipeline_parallel",
    "max_batched_tokens",
    "batch_invariant",
    "concurrent_work",
)
"""Fields that a replay by another engine says nothing about."""


def vouched(row: RowVerdict, each: Checked, lineup: Sequence[MemberReport], *, named: bool) -> RowVerdict:
    """``row``, or INCONCLUSIVE where it was CONSISTENT with something that no replay could have contradicted.

    ``named`` says that somebody named the claim; else it is the row's whole declaration.
    """
    claimed = next(report for report in lineup if report.id == each.label)
    ours, asserted = claimed.runs_as.backend, each.claim.assertions
    if row.verdict != "CONSISTENT":
        return row
    if ours != each.config.backend:
        unseen = [*UNSEEN, *(["tensor_parallel"] if each.config.quantization != "none" else [])]
        if found := [field for field in unseen if field in asserted]:
            return _not_vouched(row, f"replayed by {ours}, which says nothing about {', '.join(found)}")
        if each.config.quantization in OTHER_KERNELS:
            said = f"replayed by {ours}: that tells weights apart, not the kernels that multiplied them"
            return msgspec.structs.replace(row, reasons=(*row.reasons, said))
    opposed = any(report.facts is not None and report.config.backend != each.config.backend for report in lineup)
    if named and asserted.get("backend") == "vllm" and not opposed:
        return _not_vouched(
            row,
            "no replay by another engine ran, so nothing contradicted the claimed backend: add one, e.g. --lineup backend=transformers",
        )
    return row


def _not_vouched(row: RowVerdict, said: str) -> RowVerdict:
    return msgspec.structs.replace(row, verdict="INCONCLUSIVE", reasons=(*row.reasons, said))
