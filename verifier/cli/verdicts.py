"""``verifier verdicts list|show|watch|verify``: an auditor's view; needs neither torch nor a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

import click

from fpforensics.common.netcli import AccessOptions, access_options, make_access

if TYPE_CHECKING:
    from fpforensics.common.errors import Error
    from fpforensics.verifier.auditor import AuditorClient
    from fpforensics.verifier.verdict import VerifiedVerdict

F = TypeVar("F", bound=Callable[..., Any])


@click.group()
def verdicts() -> None:
    """Read signed verdicts, as an auditor: every signature is checked with a key that was given out of band.

    \b
    verifier verdicts list --server 127.0.0.1:7342 --key verifier.key.pub
    verifier verdicts show 4f6c2a --server 127.0.0.1:7342 --key verifier.key.pub
    verifier verdicts verify verdict.json --key verifier.key.pub
    """


def _key_option(command: F) -> F:
    return click.option("--key", "keys", multiple=True, required=True, type=click.Path(path_type=Path), help="The verifier's public key, or a folder of *.pub. Repeatable.")(command)  # fmt: skip


def _server_options(command: F) -> F:
    server = click.option("--server", required=True, help="The verifier, host:port.")
    as_json = click.option(
        "--json", "as_json", is_flag=True, help="Print each verdict's statement as one line of JSON."
    )
    return server(_key_option(access_options(as_json(command))))


@verdicts.command("list")
@click.option("--after", default=0, help="Only verdicts after this sequence number.")
@_server_options
def list_verdicts(
    after: int, server: str, keys: tuple[Path, ...], as_json: bool, **access: Unpack[AccessOptions]
) -> None:
    """List verdicts, oldest first."""
    with _auditor(server, keys, access) as auditor:
        for verdict in auditor.list(after):
            click.echo(_line(verdict, as_json))


@verdicts.command("show")
@click.argument("verdict_id")
@_server_options
def show(verdict_id: str, server: str, keys: tuple[Path, ...], as_json: bool, **access: Unpack[AccessOptions]) -> None:
    """Print one verdict whole. The first 6 digits of its id, or more, are enough if no other verdict has them."""
    with _auditor(server, keys, access) as auditor:
        _print(auditor.find(verdict_id), as_json)


@verdicts.command("watch")
@click.option("--after", default=0, help="Begin after this sequence number.")
@click.option("--count", default=0, help="Stop after so many. [default: never]")
@_server_options
def watch(
    after: int, count: int, server: str, keys: tuple[Path, ...], as_json: bool, **access: Unpack[AccessOptions]
) -> None:
    """Print verdicts as they are given, until interrupted. A lost connection is made again, and said on stderr."""
    with _auditor(server, keys, access) as auditor:
        for seen, verdict in enumerate(auditor.follow(after, lost=_say_lost), start=1):
            click.echo(_line(verdict, as_json))
            if seen == count:
                return


@verdicts.command("verify")
@click.argument("path", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the statement as JSON.")
@_key_option
def verify(path: Path, keys: tuple[Path, ...], as_json: bool) -> None:
    """Check a verdict file's signature, say whose it is, and print the verdict. Exit code 4: the signature does not hold."""
    from fpforensics.common.keys import Keyring
    from fpforensics.verifier.verdict import MAX_ENVELOPE_BYTES, open_verdict

    with path.open("rb") as file:
        _print(open_verdict(file.read(MAX_ENVELOPE_BYTES + 1), Keyring.from_paths(keys)), as_json)


@contextmanager
def _auditor(server: str, keys: tuple[Path, ...], access: AccessOptions) -> Iterator[AuditorClient]:
    from fpforensics.common.keys import Keyring
    from fpforensics.verifier.auditor import AuditorClient

    with AuditorClient(server, Keyring.from_paths(keys), make_access(access)) as auditor:
        yield auditor


def _say_lost(error: Error, after: int, seconds: float) -> None:
    click.echo(f"{error.message}; watching again after number {after} in {seconds:.0f} s", err=True)


def _line(verdict: VerifiedVerdict, as_json: bool) -> str:
    import msgspec

    from fpforensics.verifier.report import clean

    if as_json:
        return msgspec.json.encode(verdict.statement).decode()
    said = verdict.predicate
    claim = clean(said.result.claim or "as declared", 40)
    fresh = "fresh" if said.challenged else "unchallenged"
    return (
        f"{said.sequence:>5}  {said.verdict_id}  {said.issued_at}  {said.result.verdict:<12}  {claim:<24}  {fresh:<12}  "
        f"bundle {said.result.bundle_digest[:19]}"
    )


def _print(verdict: VerifiedVerdict, as_json: bool) -> None:
    import msgspec

    from fpforensics.verifier.report import text

    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(verdict.statement)))
        return
    said = verdict.predicate
    click.echo(f"✓ The signature holds: by the verifier's key {verdict.signer.keyid}")
    click.echo(
        f"Verdict {said.verdict_id} of {said.issued_at}; "
        + ("the bundle answered a fresh challenge" if said.challenged else "nobody challenged: the bundle may be old")
    )
    click.echo(text.render(said.result), nl=False)
