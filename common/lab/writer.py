"""Write an experiment: run by run, so that it may be larger than memory, and whole or not at all."""

from __future__ import annotations

import gzip
import io
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import msgspec
import numpy as np

from fpforensics.common.errors import UsageError, shorten
from fpforensics.common.lab.run import Ranked, Run, RunSignals, Vectors
from fpforensics.common.lab.schema import first_problem

RunDetails = Mapping[str, Any]
"""Further fields of a run (``timestamp``, ``runtime_seconds``, …)."""


def write_experiment(
    path: Path,
    metadata: Mapping[str, Any],
    configurations: Iterable[Mapping[str, Any]],
    runs: Iterable[tuple[Run, RunDetails]],
) -> None:
    """Write the uniform JSON to ``path``; gzip if it ends in ``.gz``. An existing file is replaced only by a whole one.

    Raises :class:`UsageError` for what the schema refuses, an experiment without runs included.
    """
    listed = [dict(each) for each in configurations]
    problem = first_problem(dict(metadata), "metadata", ("experiment_metadata",)) or first_problem(
        listed, "configurations", ("configurations",)
    )
    if problem:
        raise _refused(path, problem)
    with _replacing(path) as file:
        file.write(b'{"experiment_metadata":' + _encode(dict(metadata)))
        file.write(b',\n"configurations":' + _encode(listed))
        file.write(b',\n"runs":[')
        index = -1
        for index, (run, details) in enumerate(runs):
            document = run_document(run, details)
            if problem := _misfit(run, document, index):
                raise _refused(path, problem)
            file.write(b",\n" if index else b"\n")
            file.write(_encode(document))
        if index < 0:
            raise _refused(path, "runs: an empty list")
        file.write(b"\n]}\n")


def run_document(run: Run, details: RunDetails | None = None) -> dict[str, Any]:
    """One run as the document holds it."""
    info = run.info
    document: dict[str, Any] = {"config_id": info.config_id, "rep_id": info.rep_id, "ref_id": info.ref_id}
    if info.prompt_sha256:
        document["prompt_sha256"] = info.prompt_sha256
    if info.tokens is not None:
        document["token_ids"] = list(info.tokens)
    document.update(details or {})
    if (prefill := run.phases.get("prefill")) is not None:
        document["prefill"] = dict(_by_step(prefill)).get(0, {})
    tokens = info.tokens or ()
    steps = _by_step(run.phases.get("decode", RunSignals()))
    document["decode_steps"] = [
        {"step": step} | ({"token_id": tokens[step]} if step < len(tokens) else {}) | signals for step, signals in steps
    ]
    return document


def _misfit(run: Run, document: Mapping[str, Any], index: int) -> str:
    """What the schema refuses in a run: its fields, and numbers that JSON has no word for."""
    fields = {name: value for name, value in document.items() if name != "prefill"} | {"decode_steps": []}
    problem = first_problem(fields, "run", ("runs", index))
    for phase, signals in run.phases.items():
        where = f"runs[{index}], {phase}"
        for (signal, layer), vectors in signals.vectors.items():
            if not np.isfinite(vectors.values).all():
                problem = problem or f"{where}, {signal}, {layer}: a value is not finite"
        ranked = signals.logprobs
        if ranked is not None and not np.isfinite(ranked.logprobs[ranked.ids >= 0]).all():
            problem = problem or f"{where}, logprobs: a value is not finite"
    return problem


def _refused(path: Path, problem: str) -> UsageError:
    return UsageError(f"cannot write {shorten(path.name)}: {problem}", "see experiment.schema.json")


def _by_step(signals: RunSignals) -> list[tuple[int, dict[str, Any]]]:
    steps: dict[int, dict[str, Any]] = {}
    for (signal, layer), vectors in signals.vectors.items():
        for step, position, values in _rows(vectors):
            steps.setdefault(step, {}).setdefault(signal, {}).setdefault(layer, {})[position] = values
    if signals.logprobs is not None:
        for step, position, top in _tops(signals.logprobs):
            steps.setdefault(step, {}).setdefault("logprobs", {})[position] = top
    return sorted(steps.items())


def _rows(vectors: Vectors) -> Iterator[tuple[int, str, list[float]]]:
    for (step, position), row in zip(vectors.places, vectors.values, strict=True):
        yield step, f"pos_{position}", row.tolist()


def _tops(ranked: Ranked) -> Iterator[tuple[int, str, dict[str, Any]]]:
    for (step, position), ids, logprobs in zip(ranked.places, ranked.ids, ranked.logprobs, strict=True):
        listed = ids >= 0
        yield step, f"pos_{position}", {"token_ids": ids[listed].tolist(), "log_probs": logprobs[listed].tolist()}


def _encode(value: Any) -> bytes:
    return msgspec.json.encode(value)


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A new file beside ``path`` that takes its place when all went well."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:64]}.")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as raw:
            if path.suffix == ".gz":
                with (
                    gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as packed,
                    io.BufferedWriter(packed) as file,
                ):
                    yield file
            else:
                yield raw
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
