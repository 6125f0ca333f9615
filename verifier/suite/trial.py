"""A tiny session of a suite's baseline on each prover, by the same way as its real ones: what it shows before they take hours."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import msgspec

from fpforensics.common.errors import Error, EvidenceError, NondeterminismError, ReplayError, SignatureError
from fpforensics.common.lab.reader import open_experiment
from fpforensics.common.lab.schema import first_problem
from fpforensics.prover.session import SessionPlan
from fpforensics.verifier.answer import require_as_asked
from fpforensics.verifier.coherence import require_coherent
from fpforensics.verifier.intake import VerifiedBundle, open_bundle
from fpforensics.verifier.suite.files import REFERENCE_FILE, write_files
from fpforensics.verifier.suite.finding import (
    DOCUMENT,
    LOADS,
    MODELS_SPACE,
    REPEATS,
    SIGNALS,
    Finding,
    failed,
    not_applicable,
    passed,
)
from fpforensics.verifier.suite.journal import Entry
from fpforensics.verifier.suite.model import LOCAL, Suite
from fpforensics.verifier.suite.plan import Job, plan_jobs, session_plan
from fpforensics.verifier.suite.sessions import Report, Setting, new_nonce, obtain

PROMPT_TOKENS, NEW_TOKENS, REPETITIONS = 32, 4, 2
_NO_SESSION = "there is no evidence of a tiny session"


def tiny(suite: Suite) -> Suite:
    """The baseline alone: one short prompt, a few tokens, two repetitions that may differ, so that it is seen whether they do."""
    references = suite.references
    return msgspec.structs.replace(
        suite,
        experiments=(),
        baseline=msgspec.structs.replace(suite.baseline, nondeterministic=True),
        repetitions=REPETITIONS,
        references=msgspec.structs.replace(
            references,
            count=1,
            prompt_tokens=min(PROMPT_TOKENS, references.prompt_tokens),
            new_tokens=min(NEW_TOKENS, references.new_tokens),
        ),
    )


@dataclass
class Trial:
    """Tiny sessions in a folder of their own. ``setting`` holds the suite as :func:`tiny` made it.

    ``bundle_bytes`` and ``document_bytes`` are the sizes of a bundle that came back and of its part of the JSON; 0 for none.
    """

    setting: Setting
    bundle_bytes: int = 0
    document_bytes: int = 0

    def run(self, report: Report, without: Collection[str] = ()) -> Iterator[Finding]:
        """A session on each prover, then the JSON of all of them. Models ``without`` a place here are not loaded here."""
        ended: dict[str, Entry] = {}
        for job in plan_jobs(self.setting.suite):
            if job.prover.endpoint == LOCAL and job.variant.config.model in without:
                reason = f"{job.variant.config.model} is not here, see {MODELS_SPACE}"
                yield from (not_applicable(check, job.prover.name, reason) for check in (LOADS, SIGNALS, REPEATS))
                continue
            yield from self._session(job, ended, report)
        yield self._document(ended)

    def _session(self, job: Job, ended: dict[str, Entry], report: Report) -> Iterator[Finding]:
        setting, where = self.setting, job.prover.name
        plan = session_plan(setting.suite, job.variant, new_nonce())
        path = setting.folder.incoming / f"{job.id}.msgpack"
        keyring = setting.folder.keyring()
        try:
            obtain(setting, job, plan, path, lambda *now: report(f"{where}: {now[0]}", *now[1:]), keyring)
            bundle = open_bundle(path, keyring, expected_nonce=plan.nonce)
        except (Error, OSError) as error:
            yield from _no_bundle(as_error(error), where)
            return
        with bundle:
            row = bundle.evidence.rows[0]
            versions = ", ".join(f"{name} {version}" for name, version in sorted(row.facts.versions.items()))
            yield passed(LOADS, where, f"{row.facts.model.name} on {row.facts.gpu or row.facts.device}; {versions}")
            yield _signals(bundle, plan, where)
            yield _repeats(bundle, where)
            self.bundle_bytes = bundle.size
            wall = row.repetitions.wall_seconds
        setting.folder.accept(path, job.id)
        ended[job.id] = Entry(event="finished", job=job.id, wall_seconds=wall)

    def _document(self, ended: dict[str, Entry]) -> Finding:
        if not ended:
            return not_applicable(DOCUMENT, REFERENCE_FILE, _NO_SESSION)
        path = self.setting.folder.path / REFERENCE_FILE
        try:
            write_files(self.setting, ended)
            text = path.read_bytes()
            if problem := first_problem(msgspec.json.decode(text)):
                raise EvidenceError(problem, "see experiment.schema.json")
            with open_experiment(path) as experiment:
                experiment.validate()
        except (Error, OSError) as error:
            return failed(DOCUMENT, REFERENCE_FILE, as_error(error))
        self.document_bytes = len(text) // len(ended)
        return passed(DOCUMENT, REFERENCE_FILE, "validates against experiment.schema.json")


def as_error(error: Error | OSError) -> Error:
    """The system's errors as ours."""
    if isinstance(error, Error):
        return error
    return ReplayError(
        f"{error.filename or 'a file'}: {error.strerror or error}", "is there space, and may it be written?"
    )


def _no_bundle(error: Error, where: str) -> Iterator[Finding]:
    """Evidence that contradicts itself was generated; whatever else went wrong, nothing was."""
    if isinstance(error, EvidenceError) and not isinstance(error, SignatureError):
        yield passed(LOADS, where, "it generated")
        yield failed(SIGNALS, where, error)
    else:
        yield failed(LOADS, where, error)
        yield not_applicable(SIGNALS, where, _NO_SESSION)
    yield not_applicable(REPEATS, where, _NO_SESSION)


def _signals(bundle: VerifiedBundle, plan: SessionPlan, where: str) -> Finding:
    """Opening the bundle compared every tensor's shape with its positions, the model's widths and the top k."""
    row = bundle.evidence.rows[0]
    try:
        bundle.verify_all()
        require_as_asked(bundle, plan)
        require_coherent(bundle, [row])
    except Error as error:
        return failed(SIGNALS, where, error)
    (entry,) = row.traces
    layers = ", ".join(sorted({name.partition("/")[2] for name in entry.prefill} - {""}, key=_depth))
    count = len(entry.prefill) + len(entry.decode)
    model = row.facts.model
    return passed(
        SIGNALS,
        where,
        f"{count} tensors: layers {layers}; hidden states of {model.hidden_size}, keys of {model.key_width}, top {plan.capture.top_k}",
    )


def _depth(layer: str) -> float:
    return float(layer) if layer.isdigit() else math.inf


def _repeats(bundle: VerifiedBundle, where: str) -> Finding:
    repetitions = bundle.evidence.rows[0].repetitions
    if repetitions.bit_identical:
        return passed(REPEATS, where, f"{repetitions.count} of the baseline are equal")
    return failed(
        REPEATS,
        where,
        NondeterminismError(
            f"the baseline's differ at {repetitions.first_divergence}",
            "find the cause: nothing can be compared with it",
        ),
    )
