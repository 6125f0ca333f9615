"""Open an experiment file: its index in memory, its numbers decoded run by run as they are asked for.

What a long document costs is one run's arrays at a time. All that is wrong raises an :class:`EvidenceError` of one line
that begins with the path in the document. A name that is given twice in one object is an error in the metadata and the
configurations, and everywhere in documents of up to 8 MiB; in longer ones, which are not read twice, the last one counts.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import msgspec
from msgspec import UNSET

from fpforensics.common.errors import EvidenceError, shorten
from fpforensics.common.lab.decode import WrongError, decode_ids, decode_signals
from fpforensics.common.lab.document import Document, RunDoc, misfit, unlike
from fpforensics.common.lab.run import Configuration, Run, RunInfo, RunSignals
from fpforensics.common.lab.schema import EXPLAINED_BYTES, explain, first_problem, repeated_name
from fpforensics.common.lab.text import map_text, open_text, require_readable, same_text
from fpforensics.common.signals import Phase

MAX_UNTYPED_BYTES = 4 << 20
"""Of the metadata, and of the configurations: what may be anything takes many times its text's memory."""
_UNDECODED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError, MemoryError)

_document = msgspec.json.Decoder(Document)


def open_experiment(path: Path) -> Experiment:
    """The experiment in ``path`` (JSON, or gzip of it), checked as far as its index goes; use it in a ``with``.

    Raises :class:`UsageError` when there is no such file, or it is a bundle, :class:`EvidenceError` for what is no
    experiment. Vectors are checked when their run is read: :meth:`Experiment.validate` reads them all.
    """
    file = open_text(path)
    try:
        return Experiment(path.name, file)
    except BaseException:
        file.close()
        raise


class Experiment:
    """One experiment file, open. ``metadata`` is as written; ``configurations`` and ``runs`` keep the file's order."""

    def __init__(self, name: str, file: IO[bytes]) -> None:
        self.name = shorten(name)
        self._file = file
        self._runs: list[RunDoc] = []
        self._text = map_text(self.name, file)
        try:
            self._read_index()
        except BaseException as error:
            _forget_frames(error)
            self.close()
            raise

    def _read_index(self) -> None:
        require_readable(self.name, self._text)
        try:
            document = _document.decode(self._text)
        except _UNDECODED as error:
            raise EvidenceError(explain(error, self._text), f"in {self.name}") from None
        if len(self._text) <= EXPLAINED_BYTES and (problem := repeated_name(self._text[:])):
            raise EvidenceError(problem, f"in {self.name}")
        self.metadata: Mapping[str, Any] = self._untyped(
            document.experiment_metadata, "experiment_metadata", "metadata"
        )
        configurations = self._untyped(document.configurations, "configurations", "configurations")
        if problem := misfit(configurations, document.runs):
            raise EvidenceError(problem, f"in {self.name}")
        self.configurations = tuple(
            Configuration(each["config_id"], each["hardware"], each["variable_value"], each) for each in configurations
        )
        self._runs = document.runs
        try:
            self.runs = tuple(_info(index, run) for index, run in enumerate(document.runs))
        except WrongError as error:
            raise EvidenceError(str(error), f"in {self.name}") from None
        except MemoryError as error:
            raise EvidenceError(explain(error, b"", at=("runs",)), f"in {self.name}") from None

    @property
    def references(self) -> tuple[str, ...]:
        """The ids of the references, in order of appearance."""
        return tuple(dict.fromkeys(run.ref_id for run in self.runs))

    def read(self, info: RunInfo) -> Run:
        """Decode one run. Raises :class:`EvidenceError` for numbers that are not finite, or do not fit together."""
        raw, where = self._runs[info.index], f"runs[{info.index}]"
        try:
            phases: dict[Phase, RunSignals] = {}
            if raw.prefill is not UNSET:
                phases["prefill"] = decode_signals([(f"{where}.prefill", 0, raw.prefill)])
            if raw.decode_steps:
                steps = [(f"{where}.decode_steps[{i}]", each.step, each) for i, each in enumerate(raw.decode_steps)]
                phases["decode"] = decode_signals(steps)
        except WrongError as error:
            raise EvidenceError(str(error), f"in {self.name}") from None
        except MemoryError as error:
            raise EvidenceError(explain(error, b"", at=("runs", info.index)), f"in {self.name}") from None
        return Run(info, phases)

    def read_all(self, reference: str) -> Iterator[Run]:
        """Every run of one reference, one at a time, in the file's order but first repetitions first.

        Raises :class:`EvidenceError` where two of them were not measured at the same places: they cannot be compared.
        """
        first: Run | None = None
        for info in sorted((each for each in self.runs if each.ref_id == reference), key=lambda each: each.rep_id):
            run = self.read(info)
            first = first or run
            self._require_alike(first, run)
            yield run

    def validate(self) -> None:
        """Read everything. Raises :class:`EvidenceError` for the first thing that is wrong."""
        for reference in self.references:
            for _ in self.read_all(reference):
                pass

    def same_contents(self, other: Experiment) -> bool:
        """Whether both files hold the same text, packed or not."""
        return same_text(self._text, other._text)

    def close(self) -> None:
        """Let go of the file."""
        self._runs = []
        with suppress(BufferError):  # what an error's traceback still holds points into the map, and keeps it
            self._text.close()
        self._file.close()

    def __enter__(self) -> Experiment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _untyped(self, raw: msgspec.Raw, name: str, part: str) -> Any:
        """Decode and check what the types leave open."""
        text = bytes(memoryview(raw)[: MAX_UNTYPED_BYTES + 1])
        if len(text) > MAX_UNTYPED_BYTES:
            raise EvidenceError(f"{name}: more than {MAX_UNTYPED_BYTES} bytes", f"in {self.name}")
        try:
            value = msgspec.json.decode(text)
        except _UNDECODED as error:
            raise EvidenceError(explain(error, text, part, (name,)), f"in {self.name}") from None
        if problem := repeated_name(text, (name,)) or first_problem(value, part, (name,)):
            raise EvidenceError(problem, f"in {self.name}")
        return value

    def _require_alike(self, first: Run, run: Run) -> None:
        """Same signals, layers, widths and positions; decode may stop at another step, where tokens diverged."""
        where, there = f"runs[{run.info.index}]", f"runs[{first.info.index}]"
        problem = ""
        if run.info.prompt_sha256 and first.info.prompt_sha256 not in ("", run.info.prompt_sha256):
            problem = f"{where}.prompt_sha256: another prompt than {there} has for {shorten(run.info.ref_id)}"
        for phase, name in (("prefill", "prefill"), ("decode", "decode_steps")):
            ours, theirs = run.phases.get(phase), first.phases.get(phase)  # type: ignore[call-overload]
            if ours is None or theirs is None:
                if (ours is None) != (theirs is None) and phase == "prefill":
                    problem = problem or f"{where}.prefill: {'missing' if ours is None else 'given'}, unlike in {there}"
                continue
            problem = problem or unlike(theirs, ours, f"{where}.{name}", there)
        if problem:
            raise EvidenceError(problem, f"in {self.name}")


def _forget_frames(error: BaseException) -> None:
    """What the frames of tracebacks hold points into the map, and would keep it open."""
    each: BaseException | None = error
    while each is not None:
        traceback.clear_frames(each.__traceback__)
        each = each.__context__


def _info(index: int, run: RunDoc) -> RunInfo:
    said: bool | None = None
    if run.repetitions is not UNSET and run.repetitions.count > 1:
        said = run.repetitions.bit_identical
    steps = [step.step for step in run.decode_steps]
    own = tuple(step.token_id for step in run.decode_steps if step.token_id is not UNSET)
    tokens = own if own and len(own) == len(steps) else None
    listed = [] if run.token_ids is UNSET else decode_ids(run.token_ids, f"runs[{index}].token_ids")
    if run.token_ids is not UNSET and (tokens is None or steps[-1] >= len(steps)):  # steps were left out
        tokens = tuple(listed[: steps[-1] + 1 if steps else None])
    return RunInfo(index, run.config_id, run.ref_id, run.rep_id, tokens, run.prompt_sha256, said)


__all__ = ["Experiment", "open_experiment"]
