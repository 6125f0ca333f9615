"""What both command lines share: environment variables are named after the flags that people write."""

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from fpforensics.common.cli import LazyGroup
from fpforensics.prover.cli import cli as prover
from fpforensics.verifier.cli import cli as verifier


def commands(program: click.Group, name: str) -> dict[str, click.Command]:
    """Every command of a program by the prefix of its variables, groups' own commands included."""
    context = click.Context(program, info_name=name, auto_envvar_prefix=name.upper())
    found: dict[str, click.Command] = {}
    for each in program.list_commands(context):
        command = program.get_command(context, each)
        assert command is not None
        nested = command.commands if isinstance(command, click.Group) else {"": command}
        found |= {
            f"{name}_{each}_{inner}".rstrip("_").upper().replace("-", "_"): every for inner, every in nested.items()
        }
    return found


@pytest.mark.parametrize(("program", "name"), [(prover, "prover"), (verifier, "verifier")])
def test_every_option_is_read_from_the_variable_that_its_flag_names(program: LazyGroup, name: str) -> None:
    for prefix, command in commands(program, name).items():
        options = [each for each in command.params if isinstance(each, click.Option)]
        for option in options:
            flag = max(option.opts, key=len).lstrip("-").upper().replace("-", "_")
            assert option.envvar == f"{prefix}_{flag}"
            # Click's own names keep working: none may be another option's.
            assert all(each is option or option.envvar != f"{prefix}_{str(each.name).upper()}" for each in options)


@pytest.mark.parametrize("variable", ["VERIFIER_CHECK_KEY", "VERIFIER_CHECK_KEYS"])
def test_the_variable_that_help_names_gives_every_key(variable: str, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle.msgpack"
    bundle.write_bytes(b"nothing")
    one, other = tmp_path / "one.pub", tmp_path / "other.pub"
    done = CliRunner().invoke(
        verifier, ["check", str(bundle)], env={variable: f"{one}:{other}"}, auto_envvar_prefix="VERIFIER"
    )
    assert str(one) in str(done.exception)
    assert "Missing option" not in done.output


@pytest.mark.parametrize(("program", "named"), [(prover, "PROVER_RUN_KEY"), (verifier, "VERIFIER_CHECK_KEY")])
def test_help_names_a_variable_that_works(program: LazyGroup, named: str) -> None:
    assert f"{named} is" in " ".join(CliRunner().invoke(program, ["--help"]).output.split())
