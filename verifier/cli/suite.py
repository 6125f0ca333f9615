"""``verifier suite``: ablation experiments as prover sessions; ``list``, ``show``, ``validate``, ``check``, ``run``, ``resume``,
``replay``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

import click

from fpforensics.common.cli import DEVICES, progress_bar, quiet_option, say
from fpforensics.common.errors import UsageError, shorten
from fpforensics.common.netcli import AccessOptions, access_options, make_access

if TYPE_CHECKING:
    from fpforensics.common.access import Access
    from fpforensics.common.engines.base import ReplayMode
    from fpforensics.common.keys import Keyring
    from fpforensics.verifier.suite.folder import Settings
    from fpforensics.verifier.suite.model import ProverSpec

F = TypeVar("F", bound=Callable[..., Any])


@click.group()
def suite() -> None:
    """Run ablation experiments on one or more provers, replay them here, and leave files that can be published.

    \b
    verifier suite list
    verifier suite run megaplan-smollm2 -o results/
    verifier suite resume results/
    """


@suite.command("list")
def list_suites() -> None:
    """Name the built-in suites."""
    from fpforensics.verifier.suite.reading import BUILTIN, find_suite

    for name in BUILTIN:
        click.echo(f"{name:<18} {find_suite(name).title}")


@suite.command()
@click.argument("name", metavar="NAME|FILE")
@click.option("--toml", is_flag=True, help="Print a built-in suite's file, to start one's own from.")
def show(name: str, toml: bool) -> None:
    """Print what a suite runs, in which order, with how many model loads."""
    from fpforensics.verifier.suite.plan import describe
    from fpforensics.verifier.suite.reading import BUILTIN, builtin_text, find_suite

    found = find_suite(name)
    if toml and name not in BUILTIN:
        raise UsageError(f"--toml with {shorten(name)}", "it prints built-in suites; this one is a file already")
    click.echo(builtin_text(name) if toml else describe(found), nl=False)


@suite.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME|FILE…")
def validate(names: tuple[str, ...]) -> None:
    """Check suites, built-in ones by name or one's own files, without running anything. Exit code 2: one or more are wrong."""
    from fpforensics.verifier.suite.valid import validate_suite

    wrong = 0
    for name in names:
        try:
            click.echo(f"{name}: {validate_suite(name)}")
        except UsageError as error:
            say(error)
            wrong = error.exit_code
    if wrong:
        raise click.exceptions.Exit(wrong)


class RunOptions(AccessOptions):
    """The values of :func:`run_options`."""

    name: str
    provers: tuple[str, ...]
    keys: tuple[Path, ...]
    model_paths: tuple[str, ...]
    no_replay: bool
    device: str | None
    quiet: bool


def run_options(command: F) -> F:
    """Which suite, on what it runs, and what is done here: as for ``run``, so for ``check``."""
    for decorate in reversed(
        (
            click.argument("name", metavar="NAME|FILE"),
            click.option("--prover", "provers", multiple=True, metavar="HOST:PORT[,LABEL=VALUE…]", help="Use these provers, not those of the suite; e.g. 10.0.0.5:7341,gpu=A100. Repeatable."),
            click.option("--key", "keys", multiple=True, type=click.Path(path_type=Path), help="Public key of a remote prover, or a folder of *.pub. Repeatable."),
            click.option("--model-path", "model_paths", multiple=True, metavar="NAME=PATH", help="Where a model's checkpoint lies here. Repeatable."),
            click.option("--no-replay", is_flag=True, help="Collect evidence only."),
            click.option("--device", type=click.Choice(DEVICES), help="Where replays run. [default: the suite's]"),
            access_options,
            quiet_option,
        )
    ):  # fmt: skip
        command = decorate(command)
    return command


@suite.command()
@click.option("--output", "-o", default=".", type=click.Path(path_type=Path), help="Where the run's folder is to be: its disk is looked at. [default: here]")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="The findings as JSON.")
@run_options
def check(output: Path, as_json: bool, **options: Unpack[RunOptions]) -> None:
    """Check what a run needs, with a tiny session on each prover: ✓, ✗ with the way out, – where there is nothing to check or a run would skip it.

    Exit code 0: nothing failed; 5: something did.

    \b
    verifier suite check megaplan-smollm2 -o results/
    verifier suite check megaplan --prover 10.0.0.5:7341,gpu=A100 --key keys/ --json
    """
    import msgspec

    from fpforensics.common.errors import ReplayError
    from fpforensics.verifier.suite.finding import Finding, is_ready, joined, render_finding
    from fpforensics.verifier.suite.folder import Folder
    from fpforensics.verifier.suite.ready import check_suite
    from fpforensics.verifier.suite.sessions import Setting

    asked, keyring = _asked(options)
    setting = Setting(folder=Folder(output), suite=asked.suite, models=asked.models, access=make_access(options))
    findings: list[Finding] = []
    with progress_bar(options["quiet"]) as report:
        found = check_suite(setting, keyring, report)
        for each in found if as_json else joined(found):
            findings.append(each)
            if not as_json:
                click.echo(render_finding(each))
    if as_json:
        said = msgspec.json.encode({"suite": asked.suite.name, "ready": is_ready(findings), "findings": findings})
        click.echo(msgspec.json.format(said).decode())
    if not is_ready(findings):
        click.get_current_context().exit(ReplayError.exit_code)


@suite.command()
@click.option("--output", "-o", required=True, type=click.Path(path_type=Path), help="New folder for everything that the run leaves.")  # fmt: skip
@run_options
def run(output: Path, **options: Unpack[RunOptions]) -> None:
    """Run a suite: every config once on each prover, each a signed bundle, then replays and files. Exit code 5: not finished, resume it.

    \b
    verifier suite run megaplan-smollm2 -o results/
    verifier suite run megaplan -o results/ --prover 10.0.0.5:7341,gpu=A100 --prover 10.0.0.6:7341,gpu=H100 --key keys/
    """
    from fpforensics.verifier.suite.folder import Folder

    Folder(output).create(*_asked(options))
    _go(output, make_access(options), options["quiet"], again=False)


@suite.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--again", is_flag=True, help="Try what was skipped too.")
@access_options
@quiet_option
def resume(folder: Path, again: bool, quiet: bool, **access: Unpack[AccessOptions]) -> None:
    """Go on where a run ended, however it ended: what is finished is not repeated."""
    _go(folder, make_access(access), quiet, again=again)


@suite.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--device", type=click.Choice(DEVICES), help="Where replays run. [default: the suite's]")
@click.option("--mode", type=click.Choice(["decode", "prefill"]), help="[default: the suite's]")
@click.option("--using", metavar="CONFIG", help="As in verifier check --using. [default: the suite's]")
@click.option("--model-path", "model_paths", multiple=True, metavar="NAME=PATH", help="Where a model's checkpoint lies here. Repeatable.")  # fmt: skip
@quiet_option
def replay(
    folder: Path,
    device: str | None,
    mode: ReplayMode | None,
    using: str | None,
    model_paths: tuple[str, ...],
    quiet: bool,
) -> None:
    """Replay here what was collected elsewhere (run --no-replay, its folder copied), and write the files anew.

    No session is begun; replays that were skipped are tried again. The folder says whose bundles count: keys/ and local.key.pub; the private local.key need not travel.

    \b
    verifier suite run examples/suites/one-gpu.toml -o results/ --no-replay     # on a pod
    verifier suite replay results/ --device cpu                                # at home
    """
    import msgspec

    from fpforensics.common.cli import make_host
    from fpforensics.verifier.suite.folder import Folder
    from fpforensics.verifier.suite.journal import Journal

    models = make_host(device or "auto", "", (), model_paths).models
    changes = {"enabled": True, "device": device, "mode": mode, "using": using}
    given: dict[str, Any] = {key: value for key, value in changes.items() if value is not None}
    with Journal(Folder(folder).journal):  # nobody else is at work here
        settings = Folder(folder).load()
        Folder(folder).replay_as(settings, msgspec.structs.replace(settings.suite.replay, **given), models)
    _go(folder, None, quiet, again=True, sessions=False)


def _asked(options: RunOptions) -> tuple[Settings, Keyring]:
    """The suite with the provers of the command line, each of its sessions possible by its plan, and whose bundles are trusted."""
    import msgspec

    from fpforensics.common.cli import make_host
    from fpforensics.common.keys import Keyring
    from fpforensics.verifier.suite.folder import Settings
    from fpforensics.verifier.suite.model import LOCAL
    from fpforensics.verifier.suite.plan import plan_jobs, session_plan
    from fpforensics.verifier.suite.reading import find_suite

    found = find_suite(options["name"])
    if options["provers"]:
        named = tuple(_prover(text, index) for index, text in enumerate(options["provers"], start=1))
        found = msgspec.structs.replace(found, provers=named)
    if options["no_replay"]:
        found = msgspec.structs.replace(found, replay=msgspec.structs.replace(found.replay, enabled=False))
    if options["device"]:
        found = msgspec.structs.replace(found, replay=msgspec.structs.replace(found.replay, device=options["device"]))
    if any(each.endpoint != LOCAL for each in found.provers) and not options["keys"]:
        raise UsageError("a remote prover without --key", "whose bundles do you trust? give the prover's public key")
    for job in plan_jobs(found):
        session_plan(found, job.variant, "")
    models = make_host("auto", "", (), options["model_paths"]).models
    return Settings(suite=found, models=models), Keyring.from_paths(options["keys"])


def _go(path: Path, access: Access | None, quiet: bool, *, again: bool, sessions: bool = True) -> None:
    from fpforensics.verifier.report.analysis_text import render_summary
    from fpforensics.verifier.suite.folder import Folder
    from fpforensics.verifier.suite.sessions import Setting
    from fpforensics.verifier.suite.suite import render_states, run_suite

    folder = Folder(path)
    settings = folder.load()
    setting = Setting(folder=folder, suite=settings.suite, models=settings.models, access=access)
    with progress_bar(quiet) as report:
        written = run_suite(setting, report, again=again, sessions=sessions)
    click.echo(render_summary(written.summary), nl=False)
    click.echo()
    click.echo(render_states(written), nl=False)
    click.echo(f"{path}: report.html, summary.json and {len(list(folder.bundles.glob('*.msgpack')))} signed bundles")


def _prover(text: str, index: int) -> ProverSpec:
    from fpforensics.common.access import split_address
    from fpforensics.verifier.suite.model import LOCAL, ProverSpec

    endpoint, *labels = (part.strip() for part in text.split(","))
    if endpoint != LOCAL:
        split_address(endpoint)
    pairs = [label.partition("=") for label in labels]
    for key, equals, value in pairs:
        if not (key and equals and value):
            raise UsageError(f"--prover {shorten(text)!r}", "write HOST:PORT,LABEL=VALUE, e.g. 10.0.0.5:7341,gpu=A100")
    return ProverSpec(name=f"prover{index}", endpoint=endpoint, labels={key: value for key, _, value in pairs})
