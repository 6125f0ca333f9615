"""Config specs on the command line: ``--help`` lists what the parser takes, and shells complete it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.shell_completion import ZshComplete
from click.testing import CliRunner

from fpforensics.common.cli_specs import complete_lineup, complete_spec
from fpforensics.common.config import KEYS, choices_of, describe_keys, parse_config
from fpforensics.common.errors import UsageError
from fpforensics.prover.cli import cli as prover
from fpforensics.prover.cli.run import run
from fpforensics.verifier.cli import cli as verifier
from fpforensics.verifier.cli.check import check

BIN = Path(sys.executable).parent


@pytest.mark.parametrize("command", [run, check], ids=["prover run", "verifier check"])
def test_help_lists_every_key_and_value(command: click.Command) -> None:
    shown = " ".join(CliRunner().invoke(command, ["--help"], terminal_width=200).output.split())
    for key in KEYS:
        assert f" {key} " in shown
        assert all(value in shown for value in choices_of(key))
    assert "attn eager, sdpa, sdpa_math" in shown
    assert "docs/lineup.md" in shown


def test_what_is_listed_is_what_is_parsed() -> None:
    for key in KEYS:
        for value in choices_of(key):
            parse_config(f"{key}={value}")
        if choices_of(key):
            assert describe_keys()[key] == ", ".join(choices_of(key))
    assert choices_of("concurrent") == ("true", "false")


def test_a_value_that_does_not_exist_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="unknown backend 'vlm'") as refused:
        parse_config("backend=vlm")
    assert "'vllm'" in refused.value.hint


def completed(incomplete: str) -> list[str]:
    context = click.Context(click.Command("x"))
    return [str(item.value) for item in complete_spec(context, click.Option(["--config"]), incomplete)]


@pytest.mark.parametrize(
    ("incomplete", "expected"),
    [
        ("", [f"{key}=" for key in KEYS]),
        ("t", ["tp="]),
        ("c", ["compile=", "concurrent=", "chunk="]),
        ("quant=bnb", ["quant=bnb-int8", "quant=bnb-nf4", "quant=bnb-fp4"]),
        ("d", ["dtype=bf16", "dtype=fp16", "dtype=fp32", "dtype=fp64"]),  # one key begins so: its values at once
        ("quant=none,comp", ["quant=none,compile=true", "quant=none,compile=false"]),
        ("quant=none,qua", []),  # given already
        ("quant=none,attn=fl", ["quant=none,attn=flex", "quant=none,attn=flash_attention_2"]),
        ("tp=", []),
        ("nosuch=", []),
    ],
)
def test_completion_of_specs(incomplete: str, expected: list[str]) -> None:
    assert completed(incomplete) == expected


def test_lineups_are_files_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("mine.toml", "mine.txt", "deep/other.toml"):
        (tmp_path / name).write_text("")
    monkeypatch.chdir(tmp_path)
    context, option = click.Context(click.Command("x")), click.Option(["--lineup"])

    def names(incomplete: str) -> list[str]:
        return [str(item.value) for item in complete_lineup(context, option, incomplete)]

    assert names("mi") == ["mine.toml"]
    assert names("deep/") == ["deep/other.toml"]
    assert names("nosuch/") == []
    assert "attn=" in names("") and "mine.toml" in names("")


@pytest.mark.parametrize(
    ("group", "words", "incomplete", "expected"),
    [
        (prover, ["run", "--config"], "attn=sdpa_m", ["attn=sdpa_math"]),
        (verifier, ["check", "--claim"], "quant=aw", ["quant=awq", "quant=awq_marlin"]),
        (verifier, ["check", "--lineup"], "dtype=bf16,em", ["dtype=bf16,emulate_tp="]),
        (verifier, ["session", "--config"], "quant=gp", ["quant=gptq", "quant=gptq_marlin"]),
    ],
)
def test_options_that_take_specs_complete_them(
    group: click.Group, words: list[str], incomplete: str, expected: list[str]
) -> None:
    found = ZshComplete(group, {}, "program", "_PROGRAM_COMPLETE").get_completions(words, incomplete)
    assert [item.value for item in found] == expected


def bash_completes(program: str, line: str) -> list[str]:
    """What bash would offer at the end of ``line``."""
    script = f"""
source <({program} completion bash)
COMP_LINE={line!r} COMP_POINT={len(line)}
_{program}_completion {program}
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "--norc", "-c", script], capture_output=True, text=True, env=environment)
    return done.stdout.split("\n")[:-1]


@pytest.mark.skipif(
    shutil.which("bash") is None or not (BIN / "prover").exists(), reason="needs bash and the console scripts"
)
def test_bash_completes_words_that_hold_an_equals_sign() -> None:
    """An ``=`` ends a word there: what is offered is only what follows it."""
    assert bash_completes("prover", "prover run --config quant=bnb-n") == ["bnb-nf4"]
    assert bash_completes("prover", "prover run --config=quant=bnb-n") == ["bnb-nf4"]
    assert bash_completes("prover", "prover run --config quant=none,matm") == [
        "none,matmul=native",
        "none,matmul=fp32-rounded",
    ]
    assert bash_completes("verifier", "verifier check --claim emu") == ["emulate_tp="]
    assert bash_completes("verifier", "verifier ch") == ["check"]
