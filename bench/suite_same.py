"""Whether two runs of one suite left the same: what may differ is listed here, everything else must be equal.

JSON is compared value by value, bundles statement by statement and tensor by tensor, bit for bit.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from fpforensics.common.signals import PHASES, Trace
from fpforensics.verifier.intake import VerifiedBundle, open_bundle
from fpforensics.verifier.suite.folder import Folder
from fpforensics.verifier.suite.journal import ENDED, read_journal

_MEASURED = ("products", "seconds", "overlap", "busy", "outside_seconds")
"""Of concurrent work, whose kind, size, type and number of workers are the same in every run."""
MAY_DIFFER = {
    # file: paths in it, with * for any one key or index
    "*_experiment.json": (
        "experiment_metadata/date_created",
        "runs/*/timestamp",
        "runs/*/runtime_seconds",
        "runs/*/runtime_mean_seconds",
        "runs/*/runtime_variance",
    ),
    "experiments.json": (
        "*/timing/*/seconds/*",
        "*/timing/*/mean",
        "*/timing/*/variance",
        "*/timing/*/slowdown",
        "*/timing/*/interval",
        "*/timing/*/interval/*",
        "*/forensics/*/time",
        "*/forensics/*/slowdown",
        "*/forensics/*/interval",
        "*/forensics/*/interval/*",
        *("/".join(("*", "forensics", "*", "work", "*", each)) for each in _MEASURED),
    ),
    "replays/*.json": (
        "seconds",
        "claimed/*/digest",
        *(f"facts/concurrent_work/*/{each}" for each in _MEASURED),
    ),
    # created_at, nonce and session_id name the session; the rest are times
    "bundles/*.msgpack": (
        "created_at",
        "nonce",
        "session_id",
        "rows/*/repetitions/wall_seconds/*",
        "rows/*/repetitions/wall_mean",
        "rows/*/repetitions/wall_variance",
        *(f"rows/*/facts/concurrent_work/*/{each}" for each in _MEASURED),
    ),
}
MAY_DIFFER["reference_baseline.json"] = MAY_DIFFER["*_experiment.json"]
KEYS = ("local.key", "local.key.pub")
"""Each run makes its own; a bundle's signature is checked with them."""
JOURNAL = "journal.jsonl"
"""Compared by how each job ended."""
PAGE = "report.html"
"""Compared without its times."""


def files_of(folder: Path) -> list[str]:
    """Every file of a run by its path in the folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def differences(one: Path, other: Path) -> Iterator[str]:
    """What differs between two runs' folders and may not, a line each; nothing where they are the same."""
    here, there = files_of(one), files_of(other)
    yield from (f"{name}: only in {one}" for name in here if name not in there)
    yield from (f"{name}: only in {other}" for name in there if name not in here)
    for name in here:
        if name in there and name not in KEYS:
            for line in _of_file(name, one, other):
                yield f"{name}: {line}"


def _of_file(name: str, one: Path, other: Path) -> Iterator[str]:
    allowed = next((paths for pattern, paths in MAY_DIFFER.items() if fnmatch.fnmatch(name, pattern)), ())
    a, b = one / name, other / name
    if name.endswith(".msgpack"):
        with open_bundle(a, Folder(one).keyring()) as left, open_bundle(b, Folder(other).keyring()) as right:
            yield from _of_bundle(left, right, allowed)
    elif name.endswith(".json"):
        yield from unequal(json.loads(a.read_bytes()), json.loads(b.read_bytes()), allowed)
    elif name == JOURNAL:
        yield from unequal(endings(a), endings(b), ())
        yield from (f"{job} finished {count} times" for path in (a, b) for job, count in _often(path))
    elif name == PAGE:
        if without_times(a.read_text()) != without_times(b.read_text()):
            yield "the pages differ beyond their times"
    elif a.read_bytes() != b.read_bytes():
        yield "the bytes differ"


def unequal(a: Any, b: Any, allowed: tuple[str, ...], at: str = "") -> Iterator[str]:
    """The paths at which two JSON values differ; one that matches ``allowed`` may."""
    if any(_matches(at, pattern) for pattern in allowed):
        return
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() | b.keys()):
            yield from unequal(a.get(key, "absent"), b.get(key, "absent"), allowed, f"{at}/{key}" if at else str(key))
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for index, (left, right) in enumerate(zip(a, b, strict=True)):
            yield from unequal(left, right, allowed, f"{at}/{index}" if at else str(index))
    elif type(a) is not type(b) or a != b:
        yield f"{at}: {_show(a)} and {_show(b)}"


def _of_bundle(left: VerifiedBundle, right: VerifiedBundle, allowed: tuple[str, ...]) -> Iterator[str]:
    ours, theirs = (json.loads(msgspec.json.encode(each.evidence)) for each in (left, right))
    yield from unequal(ours, theirs, allowed)
    for a, b in zip(left.references(), right.references(), strict=True):
        if not np.array_equal(a.prompt_ids, b.prompt_ids):
            yield f"the prompt of {a.id} differs"
    for row, twin in zip(left.evidence.rows, right.evidence.rows, strict=True):
        for entry in row.traces:
            yield from _of_trace(left.trace(row, entry.reference_id), right.trace(twin, entry.reference_id))


def _of_trace(ours: Trace, theirs: Trace) -> Iterator[str]:
    if ours.output_ids.tobytes() != theirs.output_ids.tobytes():
        yield f"the tokens of {ours.reference_id} differ"
    for phase in PHASES:
        tensors, others = ours.phase(phase).tensors(), theirs.phase(phase).tensors()
        for name in sorted(tensors.keys() | others.keys()):
            if name not in tensors or name not in others:
                yield f"{phase} {name} of {ours.reference_id} is in one of them only"
            elif tensors[name].tobytes() != others[name].tobytes():
                yield f"{phase} {name} of {ours.reference_id} differs"


def endings(journal: Path) -> dict[str, list[str]]:
    """How each job ended, and why."""
    return {entry.job: [entry.event, entry.reason] for entry in read_journal(journal) if entry.event in ENDED}


def _often(journal: Path) -> Iterator[tuple[str, int]]:
    """Jobs that finished more than once: work that was repeated."""
    finished = [entry.job for entry in read_journal(journal) if entry.event == "finished"]
    yield from ((job, finished.count(job)) for job in dict.fromkeys(finished) if finished.count(job) > 1)


def without_times(page: str) -> str:
    """The page without its tables of times; of what concurrent work did, each config's verdict on its numbers is left."""
    page = re.sub(r"<h3>Timing</h3>.*?</table>", "", page, flags=re.DOTALL)
    return re.sub(r"<h3>Numbers and time [^<]*</h3>.*?</table>", _numbers_only, page, flags=re.DOTALL)


def _numbers_only(table: re.Match[str]) -> str:
    rows = re.findall(r'<tr><th scope="row">.*?</th>\s*<td>.*?</td>', table[0], flags=re.DOTALL)
    return "\n".join(rows)


def _matches(path: str, pattern: str) -> bool:
    ours, theirs = path.split("/"), pattern.split("/")
    return len(ours) == len(theirs) and all(b in ("*", a) for a, b in zip(ours, theirs, strict=True))


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
