"""Options of commands that listen or dial: TLS files and bearer tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

import click

if TYPE_CHECKING:
    from fpforensics.common.access import Access, Listen
    from fpforensics.common.serving import RunningServer

F = TypeVar("F", bound=Callable[..., Any])
_FILE = click.Path(path_type=Path)


class ListenOptions(TypedDict):
    """The values of :func:`listen_options`."""

    listen: str
    tls_cert: Path | None
    tls_key: Path | None
    client_ca: Path | None
    token_file: Path | None


class AccessOptions(TypedDict):
    """The values of :func:`access_options`."""

    tls_roots: Path | None
    tls_cert: Path | None
    tls_key: Path | None
    token_file: Path | None


def listen_options(port: int) -> Callable[[F], F]:
    """``--listen`` and what guards it; anything but loopback needs TLS and a token or client certificates."""

    def add(command: F) -> F:
        for decorate in reversed(
            (
                click.option(
                    "--listen", default=f"127.0.0.1:{port}", show_default=True, help="host:port; port 0 for any."
                ),
                click.option("--tls-cert", type=_FILE, help="Server certificate chain, PEM."),
                click.option("--tls-key", type=_FILE, help="Its private key, PEM."),
                click.option("--client-ca", type=_FILE, help="Ask for client certificates of this authority."),
                click.option("--token-file", type=_FILE, help="Ask for this bearer token (file mode 0600)."),
            )
        ):
            command = decorate(command)
        return command

    return add


def access_options(command: F) -> F:
    """How to reach a server: trusted certificates and own proof of identity."""
    for decorate in reversed(
        (
            click.option("--tls-roots", type=_FILE, help="Trusted certificates, PEM. [default: the system's]"),
            click.option("--tls-cert", type=_FILE, help="Own client certificate, PEM."),
            click.option("--tls-key", type=_FILE, help="Its private key, PEM."),
            click.option("--token-file", type=_FILE, help="Bearer token to show (file mode 0600)."),
        )
    ):
        command = decorate(command)
    return command


def make_listen(options: ListenOptions) -> Listen:
    """The :class:`Listen` that the options describe."""
    from fpforensics.common.access import Listen

    return Listen(
        address=options["listen"],
        tls_cert=options["tls_cert"],
        tls_key=options["tls_key"],
        client_ca=options["client_ca"],
        token_file=options["token_file"],
    )


def make_access(options: AccessOptions) -> Access:
    """The :class:`Access` that the options describe."""
    from fpforensics.common.access import Access

    return Access(
        tls_roots=options["tls_roots"],
        tls_cert=options["tls_cert"],
        tls_key=options["tls_key"],
        token_file=options["token_file"],
    )


def max_seconds_option(what: str) -> Callable[[F], F]:
    """``--max-seconds``: how long one ``what`` may run."""
    return click.option(
        "--max-seconds",
        type=click.IntRange(min=1),
        default=6 * 3600,
        show_default=True,
        help=f"Stop a {what} that runs longer.",
    )


def serve_until_stopped(server: RunningServer, address: str) -> None:
    """Say where the server really listens, then serve until SIGTERM or SIGINT and say so."""
    server.wait(
        ready=lambda: click.echo(f"listening on {address.rpartition(':')[0]}:{server.port}"),
        stopping=lambda: click.echo("stopping", err=True),
    )
