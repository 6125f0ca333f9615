"""What both command lines share: lazy subcommands, one place where errors become exit codes, progress, host options."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from fpforensics.common.errors import Error, UsageError, did_you_mean, shorten

if TYPE_CHECKING:
    from fpforensics.common.engines.base import Host

DEVICES = ("auto", "cpu", "cuda")
F = TypeVar("F", bound=Callable[..., Any])
Report = Callable[[str, int, int], None]
"""Called with (what is happening, done, total)."""


class LazyGroup(click.Group):
    """A group whose subcommands are imported when they are run: ``--help`` stays fast.

    ``lazy`` maps a command's name to its ``module:attribute`` and the line that ``--help`` shows.
    """

    def __init__(self, *args: Any, lazy: Mapping[str, tuple[str, str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lazy = lazy

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of the table, which is the order of use."""
        return list(self.lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command's module and return the command."""
        if cmd_name not in self.lazy:
            return None
        module, _, attribute = self.lazy[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        if ctx.auto_envvar_prefix:
            _name_variables(command, f"{ctx.auto_envvar_prefix}_{cmd_name}")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Like click's, but a near miss is offered."""
        if args and args[0] not in self.lazy and not args[0].startswith("-") and not ctx.resilient_parsing:
            hint = did_you_mean(args[0], self.lazy)
            raise click.UsageError(f"no command {shorten(args[0])!r} ({hint})", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The table's own lines, so that nothing is imported for ``--help``."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in self.lazy.items()])


def run(group: click.Group, program: str) -> None:
    """The console script: run ``group`` and turn errors into one line on stderr and an exit code."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its C core prints what becomes an error of ours
    if os.environ.get(f"_{program.upper()}_COMPLETE"):
        from fpforensics.common.cli_specs import install_completion

        install_completion()
    try:
        code = group.main(prog_name=program, standalone_mode=False, auto_envvar_prefix=program.upper())
        sys.exit(code if isinstance(code, int) else 0)
    except Error as error:
        fail(error)
    except click.ClickException as error:
        error.show()
        sys.exit(UsageError.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(130)
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            name = f"{error.filename}: " if error.filename else ""
            fail(UsageError(f"{name}{error.strerror or error}", "is the path right, and is there space?"))
        # The reader of our output went away (`| head`): nothing to say, and nobody to say it to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def variables_help(program: str, command: str) -> str:
    """The line of ``--help`` on environment variables, with ``command --key`` of ``program`` as its example."""
    return (
        f"Every option has an environment variable: {program.upper()}_{command.upper()}_KEY is `{program} {command} --key`. "
        "Of a repeatable one it holds several values: files with ':' between them, all else with spaces."
    )


def _name_variables(command: click.Command, prefix: str) -> None:
    """Let ``--some-flag`` be read from ``PREFIX_SOME_FLAG``: click's own names come from the function's parameters."""
    for option in command.params:
        if isinstance(option, click.Option):
            flag = max(option.opts, key=len).lstrip("-")
            option.envvar = f"{prefix}_{flag}".upper().replace("-", "_")
    for name, each in (command.commands if isinstance(command, click.Group) else {}).items():
        _name_variables(each, f"{prefix}_{name}")


def fail(error: Error) -> None:
    """One line on stderr, then exit with the error's code."""
    say(error)
    sys.exit(error.exit_code)


def say(error: Error) -> None:
    """One line on stderr."""
    label = click.style("error", fg="red", bold=True) if colour(sys.stderr) else "error"
    click.echo(f"{label}: {error.diagnostics()}", err=True)


def colour(stream: Any) -> bool:
    """Whether to colour: only on a terminal, and never when NO_COLOR is set."""
    return not os.environ.get("NO_COLOR") and hasattr(stream, "isatty") and bool(stream.isatty())


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Report]:
    """Progress on stderr once something has taken over two seconds: a bar on a terminal, else a line now and then."""
    if quiet:
        yield lambda _stage, _done, _total: None
        return
    from fpforensics.common import progress

    if not sys.stderr.isatty():
        with progress.lines() as report:
            yield report
        return
    from rich.console import Console

    with progress.bar(Console(stderr=True, no_color=not colour(sys.stderr))) as report:
        yield report


def host_options(command: F) -> F:
    """``--device``, ``--python``, ``--env`` and ``--model-path``: where and how workers run."""
    for decorate in reversed(
        (
            click.option(
                "--device",
                type=click.Choice(DEVICES),
                default="auto",
                show_default=True,
                help="Where engines run.",
            ),
            click.option(
                "--python",
                "python",
                default="",
                metavar="PATH",
                help="Another interpreter for engines, with fpforensics installed (another torch or CUDA version).",
            ),
            click.option(
                "--env",
                "env",
                multiple=True,
                metavar="NAME=VALUE",
                help="Environment variable for engines, e.g. OMP_NUM_THREADS=1. Repeatable.",
            ),
            click.option(
                "--model-path",
                "model_paths",
                multiple=True,
                metavar="NAME=PATH",
                help="Checkpoint folder (or Hugging Face id) for a model name. Repeatable.",
            ),
        )
    ):
        command = decorate(command)
    return command


def make_host(device: str, python: str, env: Sequence[str], model_paths: Sequence[str]) -> Host:
    """The :class:`Host` that the options of :func:`host_options` describe.

    Raises :class:`UsageError` for an interpreter that is not there, and
    :class:`~fpforensics.common.errors.ReplayError` for a GPU that is not.
    """
    from fpforensics.common.engines.base import Host
    from fpforensics.common.engines.preflight import require_host

    host = Host(
        device=device,
        python=python,
        env=_pairs(env, "--env", "OMP_NUM_THREADS=1"),
        models=_pairs(model_paths, "--model-path", "mymodel=/path/to/checkpoint"),
    )
    require_host(host)
    return host


def require_outputs(*paths: Path | None, inputs: Sequence[Path | None] = ()) -> None:
    """Raise :class:`UsageError` for a file that could not be written, or is one of ``inputs``: before the work, not after it."""
    for path in paths:
        if path is None:
            continue
        if path.exists() and any(each is not None and each.exists() and path.samefile(each) for each in inputs):
            raise UsageError(f"{path} is an input: writing it would destroy it", "name another file for the output")
        if path.is_dir():
            raise UsageError(f"cannot write {path}: it is a folder", "name a file in it")
        if not path.parent.is_dir():
            raise UsageError(f"cannot write {path}: there is no folder {path.parent}", "make it, or name another one")
        place = path if path.exists() and not path.is_file() else path.parent  # a device is written to, not replaced
        if not os.access(place, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
            raise UsageError(f"cannot write {path}: permission denied", "name a file that you can write")


def _pairs(items: Sequence[str], option: str, example: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise UsageError(f"{option} {shorten(item)!r} is not NAME=VALUE", f"e.g. {option} {example}")
        pairs[name] = value
    return pairs


def completion_command(program: str) -> click.Command:
    """``completion SHELL``: print the script that a shell sources."""

    @click.command("completion", help=f"Print a completion script: source <({program} completion bash)")
    @click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
    @click.pass_context
    def completion(ctx: click.Context, shell: str) -> None:
        from click.shell_completion import get_completion_class

        from fpforensics.common.cli_specs import install_completion

        install_completion()
        kind = get_completion_class(shell)
        assert kind is not None
        root = ctx.find_root().command
        click.echo(kind(root, {}, program, f"_{program.upper()}_COMPLETE").source())

    return completion


def quiet_option(command: F) -> F:
    """``--quiet``."""
    return click.option("--quiet", "-q", is_flag=True, help="No progress, results only.")(command)
