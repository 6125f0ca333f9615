"""What a manifest must say to make sense: bounds and agreement of its numbers, names and shapes.

No blob is looked at here. The prover checks these rules before it signs, the verifier before it believes a
size.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import datetime
from math import prod

from fpforensics.common.engines.base import ConcurrentWork, ModelFacts
from fpforensics.common.engines.overlap import MIN_OVERLAP
from fpforensics.common.errors import EvidenceError, did_you_mean, shorten
from fpforensics.common.evidence import Evidence, EvidenceStatement, Row, Tensor, TraceEntry
from fpforensics.common.frame import MAX_BLOB_BYTES
from fpforensics.common.manifest import phase_tensors, span, subjects
from fpforensics.common.sampling import MIN_TEMPERATURE
from fpforensics.common.signals import DTYPES, LAST, PHASES
from fpforensics.common.strict import Limits
from fpforensics.common.words import counted

REQUIRED = ("positions", "logprob_ids", "logprobs", "chosen_logprobs")
_FLOATS = ("bf16", "f16", "f32", "f64")
_MAX_ID = 64
_MAX_CONFIG_ID = 256
_MAX_DEGREE = 4096  # as in config specs
_MAX_RANK = 4
_ROUNDING = 1e-6
_MAX_SIDE = 1 << 20  # of a square matrix
_HEX_DIGEST = re.compile(r"[0-9a-f]{64}")
_NONCE = re.compile(r"(?:[0-9a-f]{2}){0,64}")


def check_statement(statement: EvidenceStatement, limits: Limits) -> None:
    """Refuse a manifest that contradicts itself, claims more than ``limits``, or leaves something out."""
    evidence = statement.predicate
    _check_session(evidence, limits)
    _bounded(len(evidence.references), 1, limits.references, "references")
    _bounded(len(evidence.rows), 1, limits.rows, "rows")
    _unique((reference.id for reference in evidence.references), "reference id")
    _unique((row.config_id for row in evidence.rows), "config id")
    claimed = 0
    prompts: dict[str, int] = {}
    for reference in evidence.references:
        _name(reference.id, "reference id", _MAX_ID)
        where = f"{reference.id}, prompt_ids"
        prompts[reference.id] = _vector(reference.prompt_ids, where, limits.prompt_tokens, limits)
        claimed += 1
    if statement.subject != subjects(evidence.references):
        raise EvidenceError("manifest's subjects are not its references' prompts", "ask the prover to write it again")
    for row in evidence.rows:
        _name(row.config_id, "config id", _MAX_CONFIG_ID)
        _check_row(row, limits)
        found = [trace.reference_id for trace in row.traces]
        _unique(found, f"trace of row {shorten(row.config_id)}: reference")
        for unknown in sorted(set(found) - prompts.keys()):
            raise EvidenceError(
                f"row {shorten(row.config_id)} has a trace of unknown reference {shorten(unknown)!r}",
                did_you_mean(unknown, list(prompts)[:8]),
            )
        for missing in sorted(prompts.keys() - set(found)):
            raise EvidenceError(
                f"row {shorten(row.config_id)} has no trace of {missing}", "every row needs one of each"
            )
        for trace in row.traces:
            claimed += 1 + len(trace.prefill) + len(trace.decode)
            _bounded(claimed, 1, limits.tensors, "tensors")
            _check_trace(evidence, row, trace, prompts[trace.reference_id], limits)


def _check_session(evidence: Evidence, limits: Limits) -> None:
    try:
        aware = datetime.fromisoformat(evidence.created_at).tzinfo is not None
    except ValueError:
        aware = False
    if not aware:
        raise EvidenceError(
            f"created_at {shorten(evidence.created_at)!r} is no time with a zone",
            "write e.g. 2026-01-31T12:00:00+00:00",
        )
    if not _NONCE.fullmatch(evidence.nonce):
        raise EvidenceError(f"nonce {shorten(evidence.nonce)!r} is not hex", "at most 64 bytes, lower case")
    _name(evidence.session_id, "session id", _MAX_ID)
    _bounded(evidence.environment.cpu_count, 1, 1 << 20, "environment.cpu_count")
    _bounded(len(evidence.capture.layers), 0, limits.layers, "capture.layers")
    for layer in evidence.capture.layers:
        _layer(layer, limits.layers, "capture.layers")
    _bounded(evidence.capture.prefill_positions, 0, limits.prompt_tokens, "capture.prefill_positions")
    _bounded(evidence.capture.decode_positions, 0, limits.output_tokens, "capture.decode_positions")
    _bounded(evidence.capture.top_k, 1, limits.width, "capture.top_k")
    _bounded(evidence.sampling.max_new_tokens, 1, limits.output_tokens, "sampling.max_new_tokens")
    _bounded(evidence.sampling.seed, 0, (1 << 64) - 1, "sampling.seed")
    if evidence.sampling.temperature != 0:  # greedy
        _bounded(evidence.sampling.temperature, MIN_TEMPERATURE, 1000, "sampling.temperature")
    _bounded(evidence.sampling.top_p, 0, 1, "sampling.top_p")


def _check_row(row: Row, limits: Limits) -> None:
    where = f"row {shorten(row.config_id)}"
    for degree in ("tensor_parallel", "expert_parallel", "emulate_tensor_parallel", "pipeline_parallel"):
        _bounded(getattr(row.config, degree), 1, _MAX_DEGREE, f"{where}, {degree}")
    _bounded(row.config.batch_size, 0, _MAX_DEGREE, f"{where}, batch_size")  # 0: all references together
    _bounded(row.config.max_batched_tokens, 0, limits.prompt_tokens, f"{where}, max_batched_tokens")
    model = row.facts.model
    _bounded(model.vocab_size, 1, limits.width, f"{where}, vocab_size")
    _bounded(model.num_layers, 1, limits.layers, f"{where}, num_layers")
    _bounded(model.hidden_size, 1, limits.width, f"{where}, hidden_size")
    _bounded(model.key_width, 1, limits.width, f"{where}, key_width")
    for size in row.facts.batch_sizes:
        _bounded(size, 1, _MAX_DEGREE, f"{where}, batch_sizes")
    for weights in (model.weights_digest, row.config.weights_digest or model.weights_digest):
        if not weights.startswith("sha256:") or not _HEX_DIGEST.fullmatch(weights[7:]):
            raise EvidenceError(f"{where}: weights digest {shorten(weights)!r}", "write sha256: and 64 hex digits")
        if weights != model.weights_digest:
            raise EvidenceError(f"{where}: its config and its facts name different weights", "one of them is wrong")
    repetitions = row.repetitions
    _bounded(repetitions.count, 1, limits.repetitions, f"{where}, repetitions")
    if len(repetitions.wall_seconds) != repetitions.count:
        raise EvidenceError(
            f"{where}: {counted(repetitions.count, 'repetition')} and {counted(len(repetitions.wall_seconds), 'wall time')}",
            "one for each",
        )
    for seconds in (*repetitions.wall_seconds, repetitions.wall_mean, repetitions.wall_variance):
        _bounded(seconds, 0, 1e12, f"{where}, wall time")
    _check_concurrent_work(row, where)


def _check_concurrent_work(row: Row, where: str) -> None:
    """One entry for each repetition of a config that has it, each of enough overlap to be a result; none for another."""
    entries, expected = row.facts.concurrent_work, row.repetitions.count if row.config.concurrent_work else 0
    if len(entries) != expected:
        too_old = "the prover is too old to measure it: run the session again with a newer one"
        raise EvidenceError(
            f"{where}: concurrent={str(row.config.concurrent_work).lower()}, {counted(row.repetitions.count, 'repetition')} "
            f"and {counted(len(entries), 'measurement')} of concurrent work",
            too_old if expected and not entries else "one for each repetition where it is true, else none",
        )
    for number, entry in enumerate(entries, start=1):
        _check_work(entry, f"{where}, repetition {number}, concurrent work")


def _check_work(entry: ConcurrentWork, here: str) -> None:
    _bounded(entry.size, 1, _MAX_SIDE, f"{here}, size")
    _bounded(entry.workers, 1, _MAX_DEGREE, f"{here}, workers")
    _bounded(entry.products, 1, 1 << 40, f"{here}, products")
    _bounded(entry.seconds, 0, 1e12, f"{here}, seconds")
    _bounded(entry.outside_seconds, 0, 1e12, f"{here}, outside_seconds")
    _bounded(entry.overlap, MIN_OVERLAP, 1, f"{here}, overlap")
    _bounded(entry.busy, entry.overlap / entry.workers - _ROUNDING, entry.overlap, f"{here}, busy")
    _name(entry.dtype, f"{here}, dtype", _MAX_ID)


def _check_trace(evidence: Evidence, row: Row, trace: TraceEntry, prompt: int, limits: Limits) -> None:
    where = f"{shorten(row.config_id)}, {trace.reference_id}"
    most = min(limits.output_tokens, evidence.sampling.max_new_tokens)
    output = _vector(trace.output_ids, f"{where}, output_ids", most, limits)
    captured = 0
    for phase in PHASES:
        named = phase_tensors(trace, phase)
        for name, tensor in named.items():
            _check_size(tensor, f"{where}, {phase}, {name[:_MAX_ID]}", limits)
        for name in REQUIRED:
            if name not in named:
                raise EvidenceError(f"{where}, {phase} lacks {name}", "every phase needs it, even when it is empty")
        first, last = span(phase, prompt, output)
        positions = named["positions"].shape[0] if len(named["positions"].shape) == 1 else -1
        if not 0 <= positions <= last - first + 1:
            raise EvidenceError(
                f"{where}, {phase}, positions have shape {named['positions'].shape}",
                f"a vector of at most {last - first + 1} fits between positions {first} and {last}",
            )
        ids = named["logprob_ids"].shape
        top = ids[1] if len(ids) == 2 else 0
        _bounded(top, 1, row.facts.model.vocab_size, f"{where}, {phase}, logprob_ids' columns")
        model, here = row.facts.model, f"{where}, {phase}"
        forms = _forms(positions, top, model)
        for name, tensor in named.items():
            dtypes, shape = _form(name, forms, model.num_layers, here)
            _check_form(tensor, dtypes, shape, f"{here}, {name}")
        captured += positions
    if captured == 0:
        raise EvidenceError(f"{where} holds no positions", "evidence needs at least one")


_Form = tuple[tuple[str, ...], tuple[int, ...]]  # allowed dtypes, shape


def _forms(positions: int, top: int, model: ModelFacts) -> dict[str, _Form]:
    """The form of each tensor of a phase by its name, or by its signal where it has layers."""
    return {
        "positions": (("i32",), (positions,)),
        "logprob_ids": (("i32",), (positions, top)),
        "logprobs": (("f32",), (positions, top)),
        "chosen_logprobs": (("f32",), (positions,)),
        "logits": (_FLOATS, (positions, model.vocab_size)),
        "hidden_states/": (_FLOATS, (positions, model.hidden_size)),
        "key_vectors/": (_FLOATS, (positions, model.key_width)),
    }


def _form(name: str, forms: Mapping[str, _Form], layers: int, where: str) -> _Form:
    signal, slash, layer = name.partition("/")
    form = forms.get(signal + slash)
    if form is None:
        raise EvidenceError(f"{where} holds an unknown tensor {shorten(name)!r}", did_you_mean(name[:_MAX_ID], forms))
    if slash:
        _layer(layer, layers, f"{where}, {signal}")
    return form


def _vector(tensor: Tensor, where: str, most: int, limits: Limits) -> int:
    _check_size(tensor, where, limits)
    if len(tensor.shape) != 1 or not 1 <= tensor.shape[0] <= most:
        raise EvidenceError(f"{where} have shape {_show(tensor.shape)}", f"a vector of 1 to {most} is expected")
    _check_form(tensor, ("i32",), tensor.shape, where)
    return tensor.shape[0]


def _check_size(tensor: Tensor, where: str, limits: Limits) -> None:
    if len(tensor.shape) > _MAX_RANK or any(size < 0 for size in tensor.shape):
        raise EvidenceError(f"{where} has shape {_show(tensor.shape)}", f"at most {_MAX_RANK} sizes, none negative")
    elements = prod(tensor.shape)
    if elements > limits.elements:
        raise EvidenceError(f"{where} claims {elements} elements", f"at most {limits.elements}")


def _check_form(tensor: Tensor, dtypes: tuple[str, ...], shape: tuple[int, ...], where: str) -> None:
    if not _HEX_DIGEST.fullmatch(tensor.sha256):
        raise EvidenceError(f"{where}: SHA-256 {shorten(tensor.sha256)!r}", "write 64 lower-case hex digits")
    if tensor.dtype not in dtypes:
        raise EvidenceError(f"{where} has dtype {shorten(tensor.dtype)!r}", f"it must be {' or '.join(dtypes)}")
    if tensor.shape != shape:
        raise EvidenceError(f"{where} has shape {_show(tensor.shape)}", f"{_show(shape)} is expected")
    size = prod(shape) * DTYPES[tensor.dtype].itemsize
    if size > MAX_BLOB_BYTES:
        raise EvidenceError(f"{where} has {size} bytes", f"a blob holds at most {MAX_BLOB_BYTES}")


def _show(shape: tuple[int, ...]) -> str:
    return shorten(str(shape[:9]))


def _layer(layer: str, most: int, where: str) -> None:
    number = int(layer) if layer.isascii() and layer.isdigit() and len(layer) < 8 else 0
    if layer != LAST and (str(number) != layer or not 1 <= number <= most):
        raise EvidenceError(f"{where}: layer {shorten(layer)!r}", f"write {LAST!r} or 1 to {most}")


def _name(text: str, what: str, limit: int) -> None:
    if not 1 <= len(text) <= limit:
        raise EvidenceError(f"{what} {shorten(text)!r} has {len(text)} characters", f"1 to {limit} are expected")


def _bounded(value: float, low: float, high: float, what: str) -> None:
    if not low <= value <= high:
        raise EvidenceError(f"{what}: {shorten(str(value))}", f"{low} to {high} are allowed")


def _unique(names: Iterable[str], what: str) -> None:
    for name, times in Counter(names).items():
        if times > 1:
            raise EvidenceError(f"{what} {shorten(name)!r} is given {times} times", "each must be unique")
