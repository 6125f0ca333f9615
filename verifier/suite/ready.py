"""Whether a suite is ready to run: the plan's checklist, one finding after the other.

Nothing is skipped silently: what a prover or a replay could not run is named with its reason.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec

from fpforensics.common.config import ExecutionConfig
from fpforensics.common.errors import Error, EvidenceError
from fpforensics.common.keys import Keyring
from fpforensics.prover.session import make_references
from fpforensics.verifier.suite.finding import PROMPTS, REPLAY_OF, SKIPPED, Finding, failed, not_applicable, passed
from fpforensics.verifier.suite.folder import Folder, Settings
from fpforensics.verifier.suite.machines import (
    Probe,
    ask_interpreters,
    broken_interpreters,
    check_interpreters,
    check_ranks,
    probe,
    worker_of,
)
from fpforensics.verifier.suite.model import LOCAL
from fpforensics.verifier.suite.plan import Job, plan_jobs, plan_replays, replay_id, session_plan
from fpforensics.verifier.suite.sessions import Report, Setting
from fpforensics.verifier.suite.skips import Find, finder, known_skips
from fpforensics.verifier.suite.space import check_models, check_outputs
from fpforensics.verifier.suite.trial import Trial, tiny


def check_suite(
    setting: Setting,
    trusted: Keyring,
    report: Report = lambda _stage, _done, _total: None,
    *,
    ask: Probe = probe,
) -> Iterator[Finding]:
    """Check what a run of ``setting`` needs; its folder need not exist, and nothing is left in it.

    ``trusted`` are the remote provers' keys. Where a model is neither here nor has room to be fetched, no session of it
    is tried here.
    """
    suite = setting.suite
    jobs = list(plan_jobs(suite))
    find = finder(setting.models)
    answers = ask_interpreters(setting, jobs, ask)
    broken = broken_interpreters(answers)
    yield from check_interpreters(answers)
    yield from check_ranks(setting, [job for job in jobs if worker_of(job.variant) not in broken], ask)
    # A run fetches a checkpoint before it starts an interpreter, so that one that turns out broken needs the space too.
    models = list(check_models(setting, _loaded_here(setting, jobs, known_skips(setting, find)), find))
    yield from models
    with TemporaryDirectory(prefix="fpforensics-") as place:
        folder, small = Folder(Path(place) / "trial"), tiny(suite)
        folder.create(Settings(suite=small, models=setting.models), trusted)
        trial = Trial(replace(setting, folder=folder, suite=small))
        own = {each.where for each in models if each.status == "failed"}
        yield from trial.run(report, without=own)
        yield from _prompts(setting, jobs, finder(setting.models))  # a model that was fetched is here now
        yield check_outputs(suite, trial, setting.folder.path)
    yield from _skips(setting, known_skips(setting, find, broken))


def _loaded_here(setting: Setting, jobs: list[Job], skipped: Collection[str]) -> Iterator[ExecutionConfig]:
    yield from (job.variant.config for job in jobs if job.prover.endpoint == LOCAL and job.id not in skipped)
    if setting.suite.replay.enabled:
        planned = plan_replays(setting.suite)
        yield from (each.variant.config for each in planned if replay_id(each.name) not in skipped)


def _skips(setting: Setting, known: Mapping[str, str]) -> Iterator[Finding]:
    """What the run would skip, and why, as far as it can be known without loading anything."""
    for experiment in setting.suite.experiments:
        if experiment.skip:
            yield not_applicable(SKIPPED, experiment.name, experiment.skip)
    for name, reason in known.items():
        yield not_applicable(SKIPPED, name.replace(replay_id(""), REPLAY_OF), reason)


def _prompts(setting: Setting, jobs: list[Job], find: Find) -> Iterator[Finding]:
    """The suite's own prompts, made and counted, for each model whose tokenizer is here."""
    size = setting.suite.references.prompt_tokens
    for model, job in {job.variant.config.model: job for job in jobs}.items():
        folder = find(job.variant.config)
        if not isinstance(folder, Path):
            yield not_applicable(PROMPTS, model, "its tokenizer is not on this machine: the prover makes the prompts")
            continue
        try:
            plan = session_plan(setting.suite, job.variant, "")
            lengths = [len(reference.prompt_ids) for reference in make_references(plan, folder)]
            # What surrounds the text is the same around any text: here around a single token of it.
            (short,) = make_references(msgspec.structs.replace(plan, references=1, prompt_tokens=1), folder)
            frame = len(short.prompt_ids) - 1
            if wrong := [length - frame for length in lengths if length - frame != size]:
                raise EvidenceError(
                    f"a prompt has {wrong[0]} tokens of source text, the suite says {size}", "report it"
                )
        except Error as error:
            yield failed(PROMPTS, model, error)
            continue
        yield passed(PROMPTS, model, f"{len(lengths)} of exactly {size} tokens of source text, {frame} around each")
