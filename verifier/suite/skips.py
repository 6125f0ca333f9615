"""What a run is known to skip before anything is loaded, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

from fpforensics.common.config import ExecutionConfig
from fpforensics.common.engines.preflight import check_checkpoint, require_possible, require_runnable
from fpforensics.common.errors import Error
from fpforensics.common.models import resolve_model
from fpforensics.prover.session import check_fit
from fpforensics.verifier.suite.machines import Worker, worker_of
from fpforensics.verifier.suite.model import LOCAL, Variant
from fpforensics.verifier.suite.plan import Job, plan_jobs, plan_replays, replay_id, session_plan
from fpforensics.verifier.suite.sessions import Setting

Find = Callable[[ExecutionConfig], Path | Error]
"""The folder of a config's checkpoint, or why it is not on this machine."""


def finder(models: dict[str, str]) -> Find:
    """Looks for checkpoints on this machine, once for each; fetches none."""

    @cache
    def named(model: str, revision: str) -> Path | Error:
        try:
            return resolve_model(model, revision, models, allow_download=False).path
        except Error as error:
            return error

    return lambda config: named(config.model, config.revision)


def known_skips(setting: Setting, find: Find, broken: Mapping[Worker, str] | None = None) -> dict[str, str]:
    """Why each session, by its job's id, and each replay, by :func:`replay_id`, will be skipped; no others.

    The reasons are those that the run will give, but for interpreters that are ``broken``: of these what their trial showed.
    """
    broken = broken or {}
    found = {job.id: _no_session(setting, job, find, broken) for job in plan_jobs(setting.suite)}
    if setting.suite.replay.enabled:
        planned = plan_replays(setting.suite)
        found |= {replay_id(each.name): _no_replay(setting, each.variant, find, broken) for each in planned}
    return {name: reason for name, reason in found.items() if reason}


def _no_session(setting: Setting, job: Job, find: Find, broken: Mapping[Worker, str]) -> str:
    if job.skip:
        return job.skip
    config = job.variant.config
    try:
        if job.prover.endpoint != LOCAL:
            require_possible(config)
            return ""
        require_runnable([config], setting.session_host(job.prover, job.variant))
        if isinstance(folder := find(config), Path):
            check_fit(session_plan(setting.suite, job.variant, ""), folder)
    except Error as error:
        return error.diagnostics()
    return broken.get(worker_of(job.variant), "")


def _no_replay(setting: Setting, variant: Variant, find: Find, broken: Mapping[Worker, str]) -> str:
    try:
        require_runnable([variant.config], setting.replay_host(variant))
        if isinstance(folder := find(variant.config), Path):
            check_checkpoint(variant.config, folder)
    except Error as error:
        return error.diagnostics()
    return broken.get(worker_of(variant), "")
