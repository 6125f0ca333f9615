"""Whether a bundle answers the session that was asked for: a prover must not choose what it is measured by."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from fpforensics.common.config import ExecutionConfig
from fpforensics.common.errors import EvidenceError
from fpforensics.common.evidence import Evidence, Row
from fpforensics.prover.session import SessionPlan
from fpforensics.verifier.intake import VerifiedBundle

_HINT = "do not rely on it; run the session again"


def require_as_asked(bundle: VerifiedBundle, plan: SessionPlan) -> None:
    """Raise :class:`EvidenceError` naming the first thing that differs from ``plan``.

    Compared are configs, sampling, capture plan, repetitions, the number and names of references, and that each row really holds the
    positions, layers and output length of the plan. The prompts' text is the caller's to compare: it needs the tokenizer.
    """
    evidence = bundle.evidence
    _require("configs", [_plain(row.config) for row in evidence.rows], [_plain(config) for config in plan.configs])
    _require("sampling", evidence.sampling, plan.sampling)
    _require("capture plan", evidence.capture, plan.capture)
    _require("number of references", len(evidence.references), plan.references)
    named = [f"ref_{number}" for number in range(plan.references)]  # a sampled token follows from its reference's name
    _require("names of references", [entry.id for entry in evidence.references], named)
    for row in evidence.rows:
        _require(f"repetitions of row {row.config_id}", row.repetitions.count, plan.repetitions)
        _require_row(evidence, row, plan)


def _require_row(evidence: Evidence, row: Row, plan: SessionPlan) -> None:
    depth = row.facts.model.num_layers
    beyond = {layer for layer in plan.capture.layers if layer.isdigit() and int(layer) > depth}
    layers = sorted(set(plan.capture.layers) - (set() if plan.layers_named else beyond))
    prompts = {entry.id: entry.prompt_ids.shape[0] for entry in evidence.references}
    generated = plan.sampling.max_new_tokens
    fed = generated - 1
    decoded = min(plan.capture.decode_positions, fed) if plan.capture.decode_positions else fed
    for trace in row.traces:
        where = f"of {trace.reference_id} in row {row.config_id}"
        _require(f"generated tokens {where}", trace.output_ids.shape[0], generated)
        prefilled = min(plan.capture.prefill_positions, prompts[trace.reference_id])
        for phase, tensors, positions in (("prefill", trace.prefill, prefilled), ("decode", trace.decode, decoded)):
            _require(f"{phase} positions {where}", tensors["positions"].shape[0], positions)
            for signal in ("hidden_states", "key_vectors"):
                held = sorted(name.partition("/")[2] for name in tensors if name.startswith(f"{signal}/"))
                _require(f"layers of {phase} {signal} {where}", held, layers)


def _plain(config: ExecutionConfig) -> ExecutionConfig:
    return msgspec.structs.replace(config, weights_digest="", revision="")


def _require(what: str, found: object, asked: object) -> None:
    if found != asked:
        raise EvidenceError(
            f"the bundle does not answer this session: {what} {_show(found)}, asked {_show(asked)}", _HINT
        )


def _show(value: object) -> str:
    items = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    text = "; ".join(str(item) for item in items)
    return text if len(text) <= 120 else f"{text[:120]}…"
