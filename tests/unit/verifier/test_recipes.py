"""The recipe for a calibration: one in the documents and in ``--help``, and every command of it parses."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest

from fpforensics.prover.cli import cli as prover
from fpforensics.prover.cli.plan import make_session_plan
from fpforensics.prover.session import check_plan
from fpforensics.verifier.cli import cli as verifier
from fpforensics.verifier.cli.calibrate import calibrate
from fpforensics.verifier.cli.check import make_plan

ROOT = Path(__file__).parents[3]
STEPS = ("prover run", "verifier calibrate", "verifier check")


def recipe(text: str) -> list[list[str]]:
    """The words of each step's command; options may stand in any order."""
    joined = re.sub(r"\s*\\\n\s*", " ", text)
    lines = [line.strip().removeprefix("$ ") for line in joined.splitlines()]
    return [shlex.split(next(line for line in lines if line.startswith(step)), comments=True) for step in STEPS]


DOCUMENTED = recipe((ROOT / "docs" / "calibration.md").read_text("utf-8"))


def test_help_shows_the_documented_recipe() -> None:
    shown = recipe(calibrate.get_help(click.Context(calibrate, max_content_width=200)))
    assert [sorted(words) for words in shown] == [sorted(words) for words in DOCUMENTED]


@pytest.mark.parametrize("words", DOCUMENTED, ids=STEPS)
def test_the_recipe_parses(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("honest.msgpack", "bundle.msgpack"):
        Path(name).touch()
    program, name, *arguments = words
    group = {"prover": prover, "verifier": verifier}[program]
    command = group.get_command(click.Context(group), name)
    assert command is not None
    values: dict[str, Any] = command.make_context(name, arguments).params
    if program == "prover":
        plan = make_session_plan(values, "")  # type: ignore[arg-type]
        check_plan(plan)
        assert plan.references >= 299
    else:
        made = make_plan("", values["lineup"], values["mode"], values["row"], values["using"])
        assert (made.lineup, made.mode) == (("attn=eager", "attn=sdpa"), "prefill")
