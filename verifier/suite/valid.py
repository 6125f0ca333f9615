"""What can be told of a suite file without running anything: what makes no sense anywhere, or not with the models that are here."""

from __future__ import annotations

from pathlib import Path

from fpforensics.common import embedded
from fpforensics.common.cache import local_path
from fpforensics.common.config import ExecutionConfig
from fpforensics.common.engines.preflight import check_checkpoint
from fpforensics.common.errors import Error, UsageError
from fpforensics.common.models import num_layers, resolve_model
from fpforensics.common.words import counted
from fpforensics.prover.session import require_depth
from fpforensics.verifier.suite.model import Suite
from fpforensics.verifier.suite.plan import model_loads, plan_jobs, session_plan
from fpforensics.verifier.suite.reading import find_suite


def validate_suite(name: str) -> str:
    """What a built-in suite, or the one in a file, would run, in a line. Raises :class:`UsageError` for one that no run takes."""
    suite = find_suite(name)
    jobs = plan_jobs(suite)
    unknown: dict[str, None] = {}
    for job in jobs:
        try:
            session_plan(suite, job.variant, "")
            if not _fits(suite, job.variant.config) and suite.layers_named:
                unknown[job.variant.config.model] = None
        except UsageError as error:
            raise UsageError(f"suite {name}: {error.message}", error.hint) from None
    said = f"valid: {suite.name}, {counted(len(jobs), 'config')}, {counted(model_loads(jobs), 'model load')}"
    return f"{said}; layers not compared with {', '.join(unknown)}: not on this machine" if unknown else said


def _fits(suite: Suite, config: ExecutionConfig) -> bool:
    """False where nobody here knows. Raises :class:`UsageError` for what the checkpoint is not, and for a layer that it has not."""
    folder = _on_this_machine(config)
    if folder is not None:
        check_checkpoint(config, folder)
        if suite.layers_named:
            require_depth(suite.capture.layers, num_layers(folder), f"the model {config.model}")
    return folder is not None


def _on_this_machine(config: ExecutionConfig) -> Path | None:
    """The folder of the checkpoint; nothing is fetched, and the embedded model is not converted for this."""
    if config.model == embedded.SMOLLM2:
        return embedded.converted_checkpoint()
    own = local_path(config.model)
    if own is not None and own.is_dir():
        return resolve_model(config.model).path
    try:
        return resolve_model(config.model, config.revision, allow_download=False).path
    except Error:
        return None
