"""A verified bundle as a uniform experiment: each step shows its last three positions, as a view of the stored ones.

Step t fed generated token t, at absolute position P + t of a prompt of P tokens; its ``pos_-1`` is that position,
``pos_-2`` and ``pos_-3`` the two before it, which the bundle may hold under prefill. A step whose own position was
not captured is left out, a position that was not is missing from its step. Numbers are written exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from fpforensics.common.config import KEYS, config_id
from fpforensics.common.errors import UsageError, did_you_mean, shorten
from fpforensics.common.evidence import Evidence, Row
from fpforensics.common.lab.run import Layered, Place, Ranked, Run, RunInfo, RunSignals, Vectors
from fpforensics.common.lab.writer import RunDetails, write_experiment
from fpforensics.common.signals import LAST, Array, Phase, Trace
from fpforensics.verifier.intake import VerifiedBundle

VIEW = (-3, -2, -1)
"""The positions that a step shows, from its end: the plan's."""
_Held = dict[str, dict[int, Array]]
"""By tensor name, then absolute position: that position's row."""
_NOT_TESTED = ("weights_digest", "revision")


def export_bundle(bundle: VerifiedBundle, path: Path, variable: str = "") -> None:
    """Write every row and reference of ``bundle`` to ``path`` (gzip if it ends in ``.gz``).

    ``variable`` is the config key that the experiment is about; by default the one in which the rows differ. Raises
    :class:`UsageError` for an unknown one.
    """
    evidence = bundle.evidence
    tested = _variable(evidence, variable)
    configurations = [configuration_of(evidence, row, tested) for row in evidence.rows]
    write_experiment(path, metadata_of(evidence, tested), configurations, _runs(bundle))


def run_of(trace: Trace, prompt_tokens: int, depth: int, info: RunInfo) -> Run:
    """One trace as a run. ``depth`` is the model's number of blocks, which names the layer ``last``."""
    held: _Held = {}
    for phase in (trace.prefill, trace.decode):
        for name, values in phase.tensors().items():
            rows = held.setdefault(name, {})
            rows.update({int(position): values[row] for row, position in enumerate(phase.positions)})
    captured = {int(position) for position in trace.decode.positions}
    steps = [step for step in range(max(len(trace.output_ids) - 1, 0)) if prompt_tokens + step in captured]
    views: dict[Phase, list[tuple[int, int]]] = {
        "prefill": [(0, prompt_tokens - 1)] if len(trace.prefill.positions) else [],
        "decode": [(step, prompt_tokens + step) for step in steps],
    }
    phases: dict[Phase, RunSignals] = {}
    for phase_name, ends in views.items():
        if ends:
            phases[phase_name] = _signals(held, ends, depth)
    return Run(info, phases)


def _signals(held: _Held, ends: Sequence[tuple[int, int]], depth: int) -> RunSignals:
    """``ends`` are (step, absolute position of its last token)."""
    vectors: dict[Layered, Vectors] = {}
    for name, rows in held.items():
        signal, slash, layer = name.partition("/")
        if not slash:
            continue
        places = _places(rows, ends)
        if places:
            values = np.array([rows[at] for _, at in places], np.float64)
            key: Layered = (
                "key_vectors" if signal == "key_vectors" else "hidden_states",
                f"layer_{_number(layer, depth)}",
            )
            vectors[key] = Vectors(tuple(place for place, _ in places), values)
    ranked = held.get("logprobs", {})
    places = _places(ranked, ends)
    if not places:
        return RunSignals(None, vectors)
    ids = np.array([held["logprob_ids"][at] for _, at in places], np.int64)
    logprobs = np.array([ranked[at] for _, at in places], np.float64)
    return RunSignals(Ranked(tuple(place for place, _ in places), ids, logprobs), vectors)


def _places(rows: Mapping[int, Array], ends: Sequence[tuple[int, int]]) -> list[tuple[Place, int]]:
    return [((step, offset), end + 1 + offset) for step, end in ends for offset in VIEW if end + 1 + offset in rows]


def _number(layer: str, depth: int) -> int:
    return depth if layer == LAST else int(layer)


def _runs(bundle: VerifiedBundle) -> Iterator[tuple[Run, RunDetails]]:
    evidence = bundle.evidence
    prompts = {entry.id: entry.prompt_ids for entry in evidence.references}
    index = 0
    for row in evidence.rows:
        repetitions = row.repetitions
        for entry in row.traces:
            trace = bundle.trace(row, entry.reference_id)
            prompt = prompts[entry.reference_id]
            info = RunInfo(
                index,
                row.config_id,
                entry.reference_id,
                repetitions.count - 1,  # of the repetitions, the last one is stored
                tuple(int(token) for token in trace.output_ids),
                prompt.sha256,
            )
            details = {
                "timestamp": evidence.created_at,
                "runtime_seconds": repetitions.wall_seconds[-1],
                "repetitions": {"count": repetitions.count, "bit_identical": repetitions.bit_identical},
                "token_ids": list(info.tokens or ()),
            }
            yield run_of(trace, prompt.shape[0], row.facts.model.num_layers, info), details
            index += 1


def _variable(evidence: Evidence, wanted: str) -> str:
    """The config key that the experiment is about, or nothing when several differ."""
    if wanted:
        if wanted not in KEYS:
            raise UsageError(f"unknown variable {shorten(wanted)!r}", did_you_mean(wanted, KEYS))
        return wanted
    fields = [msgspec.structs.asdict(row.config) for row in evidence.rows]
    differing = [
        key
        for key, field in KEYS.items()
        if field not in _NOT_TESTED and len({str(each[field]) for each in fields}) > 1
    ]
    return differing[0] if len(differing) == 1 else ""


def metadata_of(evidence: Evidence, tested: str) -> dict[str, Any]:
    """What the uniform JSON says of the whole experiment; ``tested`` is a config key, or empty."""
    model = evidence.rows[0].facts.model
    layers = sorted({_number(layer, model.num_layers) for layer in evidence.capture.layers})
    return {
        "experiment_type": KEYS.get(tested, "configs"),
        "variable_tested": KEYS.get(tested, "config"),
        "model": model.name,
        "architecture": model.architecture,
        "sequence_length": max(entry.prompt_ids.shape[0] for entry in evidence.references),
        "decode_steps": evidence.sampling.max_new_tokens - 1,
        "extraction_config": {
            "layers": [layer for layer in layers if layer <= model.num_layers],
            "positions": list(VIEW),
            "hidden_dim": model.hidden_size,
            "key_dim": model.key_width,
            "top_k_logprobs": evidence.capture.top_k,
        },
        "date_created": evidence.created_at,
    }


def configuration_of(evidence: Evidence, row: Row, tested: str) -> dict[str, Any]:
    """What the uniform JSON says of one row's config and of where it ran."""
    environment, facts = evidence.environment, row.facts
    config = msgspec.structs.asdict(row.config)
    versions = environment.packages | facts.versions
    named = {f"{name}_version": versions[name] for name in ("torch", "transformers", "vllm") if name in versions}
    return {
        "config_id": row.config_id,
        "hardware": facts.gpu or environment.cpu or facts.device,
        "variable_value": config[KEYS[tested]] if tested else config_id(row.config),
        **named,
        "python_version": environment.python,
        "fixed_params": {key: value for key, value in config.items() if key != KEYS.get(tested)},
    }
