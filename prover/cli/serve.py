"""``prover serve``: answer verifiers' sessions over gRPC."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

import click

from fpforensics.common.cli import host_options, make_host
from fpforensics.common.netcli import (
    ListenOptions,
    listen_options,
    make_listen,
    max_seconds_option,
    serve_until_stopped,
)


@click.command()
@click.option("--key", required=True, type=click.Path(path_type=Path), help="Signing key (see prover keygen).")
@click.option("--offer", multiple=True, help="Model that sessions may name, beside those of --model-path. Repeatable. [default: the embedded one]")  # fmt: skip
@max_seconds_option("session")
@listen_options(7341)
@host_options
def serve(
    key: Path,
    offer: tuple[str, ...],
    max_seconds: int,
    device: str,
    python: str,
    env: tuple[str, ...],
    model_paths: tuple[str, ...],
    **listen: Unpack[ListenOptions],
) -> None:
    """Run sessions for verifiers, one at a time, and send back signed bundles. Each is logged to stderr in a line.

    \b
    prover serve --key prover.key
    prover serve --key prover.key --listen 0.0.0.0:7341 --tls-cert cert.pem --tls-key key.pem --token-file token
    """
    from fpforensics.common.config import DEFAULT_MODEL
    from fpforensics.common.journal import log_to_stderr
    from fpforensics.common.keys import load_private
    from fpforensics.prover.service import ProverConfig, serve_prover

    host = make_host(device, python, env, model_paths)
    config = ProverConfig(
        key=load_private(key),
        listen=make_listen(listen),
        host=host,
        models=tuple(dict.fromkeys((*(offer or (DEFAULT_MODEL,)), *host.models))),
        max_seconds=max_seconds,
    )
    log_to_stderr()
    serve_until_stopped(serve_prover(config), listen["listen"])
