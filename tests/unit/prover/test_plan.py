"""The command line's options for full logits reach the plan, for ``prover run`` and for a verifier's session."""

from __future__ import annotations

from typing import Any

import click
import pytest
from click.testing import CliRunner

from fpforensics.prover.cli.plan import make_session_plan, plan_options
from fpforensics.prover.cli.run import run
from fpforensics.verifier.cli.session import session


def capture_of(*arguments: str) -> Any:
    @click.command()
    @plan_options
    def command(**options: Any) -> Any:
        return make_session_plan(options, "").capture  # type: ignore[arg-type]

    return command.main(list(arguments), standalone_mode=False)


def test_full_logits_of_a_whole_prompt() -> None:
    capture = capture_of("--full-logits", "--prefill-positions", "1000", "--decode-positions", "0")
    assert (capture.full_logits, capture.prefill_positions, capture.decode_positions) == (True, 1000, 0)
    assert not capture_of().full_logits


@pytest.mark.parametrize("command", [run, session], ids=["prover run", "verifier session"])
def test_help_says_what_they_are_for(command: click.Command) -> None:
    text = " ".join(CliRunner().invoke(command, ["--help"], terminal_width=200).output.split())
    assert "--full-logits Keep the logits of the whole vocabulary too, for verifier compare" in text
    assert "all of a prompt that has no more" in text
