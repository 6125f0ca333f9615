"""Changing one thing in an experiment document, and what reading it then complains about."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lab_documents import Json, Layout, make_document

from fpforensics.common.errors import EvidenceError
from fpforensics.common.lab.reader import open_experiment

SMALL = Layout(references=("ref_0", "ref_1"), layers=(1, 12), positions=(-2, -1))


def problem_of(path: Path) -> str:
    """What reading everything complains about, checked to be one line."""
    with pytest.raises(EvidenceError) as error, open_experiment(path) as experiment:
        experiment.validate()
    line = error.value.diagnostics()
    assert line.isprintable(), "one line, without control characters"
    assert len(line) < 500
    return error.value.message


def read_everything(path: Path) -> None:
    with open_experiment(path) as experiment:
        experiment.validate()


def changed(change: Callable[[Json], None], layout: Layout = SMALL) -> Json:
    document = make_document(layout)
    change(document)
    return document


def set_at(*path: str | int, to: Any) -> Callable[[Json], None]:
    def change(document: Json) -> None:
        holder: Any = document
        for step in path[:-1]:
            holder = holder[step]
        holder[path[-1]] = to

    return change


def rename(*path: str | int, to: str) -> Callable[[Json], None]:
    def change(document: Json) -> None:
        holder: Any = document
        for step in path[:-1]:
            holder = holder[step]
        holder[to] = holder.pop(path[-1])

    return change
