"""Disk space that a suite will take: models that are not on this machine, and what its run leaves."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from fpforensics.common.config import ExecutionConfig
from fpforensics.common.errors import ReplayError, UsageError, shorten
from fpforensics.common.models import download_bytes
from fpforensics.verifier.suite.finding import (
    MODELS_SPACE,
    OUTPUTS_SPACE,
    Finding,
    failed,
    not_applicable,
    passed,
)
from fpforensics.verifier.suite.model import References, Suite
from fpforensics.verifier.suite.plan import plan_jobs, plan_replays
from fpforensics.verifier.suite.sessions import Setting
from fpforensics.verifier.suite.skips import Find
from fpforensics.verifier.suite.trial import Trial

_DISTANCE_BYTES = 120  # one distance of a replay's file: its cell's names and the number
_HINT = "free space, or choose another place"


def check_models(setting: Setting, configs: Iterable[ExecutionConfig], find: Find) -> Iterator[Finding]:
    """Whether the checkpoints that workers of this machine load are here, or have room to be fetched."""
    wanted = {(config.model, config.revision): config for config in configs}
    if not wanted:
        yield not_applicable(MODELS_SPACE, "", "no model is loaded on this machine")
    missing = 0
    for (name, revision), config in wanted.items():
        found = find(config)
        if isinstance(found, Path):
            yield passed(MODELS_SPACE, name, f"in {found}")
            continue
        size = download_bytes(name, revision, setting.models)
        if size is None:
            folder = f"name its folder: --model-path {shorten(name)}=/path/to/checkpoint"
            yield failed(MODELS_SPACE, name, UsageError(found.message, f"{found.hint}; or {folder}"))
            continue
        missing += size
        yield _enough(MODELS_SPACE, name, missing, _hub_cache(), "to be fetched, with those above")


def check_outputs(suite: Suite, trial: Trial, output: Path) -> Finding:
    """Whether ``output`` has room for bundles, files and replays, by the size of what the tiny session left."""
    if not trial.document_bytes:
        return not_applicable(OUTPUTS_SPACE, str(output), "the tiny session, from which it is reckoned, did not run")
    place = _existing(output)
    if not os.access(place, os.W_OK):
        return failed(OUTPUTS_SPACE, str(output), UsageError(f"{place} cannot be written to", "choose another folder"))
    return _enough(OUTPUTS_SPACE, str(output), output_bytes(suite, trial), place, "for bundles, files and replays")


def output_bytes(suite: Suite, trial: Trial) -> int:
    """About how many bytes a run leaves, by the capture plan and the bytes of the tiny session's bundle and JSON."""
    tiny, jobs = trial.setting.suite.references, plan_jobs(suite)
    bundle = trial.bundle_bytes * _positions(suite, suite.references) // _positions(suite, tiny)
    # A step of the JSON shows three positions, whether they were stored once or not.
    steps = suite.references.count * suite.references.new_tokens / (tiny.count * tiny.new_tokens)
    document = int(trial.document_bytes * max(steps, 1.0))
    shown = sum(1 + len(each.variants) for each in suite.experiments if not each.skip) + 1
    cells = 2 * (1 + 2 * len(suite.capture.layers))
    pairs = sum(len(each.jobs) for each in plan_replays(suite)) if suite.replay.enabled else 0
    bundles = bundle * sum(1 for job in jobs if not job.skip)
    beside = bundle * max((job.loads for job in jobs), default=1)  # repetitions in workers of their own, until compared
    replays = pairs * suite.references.count * cells * _DISTANCE_BYTES
    return bundles + beside + document * shown * len(suite.provers) + replays


def _positions(suite: Suite, references: References) -> int:
    """How many positions a bundle with these references holds."""
    capture, fed = suite.capture, references.new_tokens - 1
    decode = min(capture.decode_positions, fed) if capture.decode_positions else fed
    return max(1, references.count * (min(capture.prefill_positions, references.prompt_tokens) + decode))


def _enough(check: str, where: str, needed: int, place: Path, purpose: str) -> Finding:
    free = shutil.disk_usage(_existing(place)).free
    if free < needed:
        return failed(check, where, ReplayError(f"{_size(free)} free, about {_size(needed)} {purpose}", _HINT))
    return passed(check, where, f"about {_size(needed)} {purpose}, {_size(free)} free")


def _existing(path: Path) -> Path:
    return next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())


def _hub_cache() -> Path:
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError:
        return Path.home()
    return Path(HF_HUB_CACHE)


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 10**9 else f"{max(count, 10**5) / 1e6:.1f} MB"
