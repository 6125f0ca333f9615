"""``verifier serve``: take bundles, check claims, publish signed verdicts over gRPC."""

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
from fpforensics.verifier.cli.check import profile_options, read_profile_options, require_judge


@click.command()
@click.option(
    "--key", required=True, type=click.Path(path_type=Path), help="Key that signs verdicts (see verifier keygen)."
)
@click.option("--trust", multiple=True, required=True, type=click.Path(path_type=Path), help="Public key of a prover, or a folder of *.pub. Repeatable.")  # fmt: skip
@click.option("--store", required=True, type=click.Path(path_type=Path), help="Folder for bundles and verdicts.")
@click.option(
    "--using", default="", metavar="KEY=VALUE", help="How replays are computed here, e.g. matmul=fp32-rounded."
)
@click.option(
    "--require-challenge", is_flag=True, help="Take only bundles that answer this verifier's own fresh challenge."
)
@profile_options
@max_seconds_option("check")
@listen_options(7342)
@host_options
def serve(
    key: Path,
    trust: tuple[Path, ...],
    store: Path,
    using: str,
    require_challenge: bool,
    profile: Path | None,
    profile_key: tuple[Path, ...],
    max_seconds: int,
    device: str,
    python: str,
    env: tuple[str, ...],
    model_paths: tuple[str, ...],
    **listen: Unpack[ListenOptions],
) -> None:
    """Take bundles from provers, check claims on this hardware, and show signed verdicts to auditors. Each submission and
    each check is logged to stderr in a line.

    \b
    verifier serve --key verifier.key --trust prover.key.pub --store store/
    """
    from fpforensics.common.config import parse_config
    from fpforensics.common.journal import log_to_stderr
    from fpforensics.common.keys import Keyring, load_private
    from fpforensics.verifier.service import VerifierConfig, serve_verifier

    parse_config(using)
    signing_key, provers = load_private(key), Keyring.from_paths(trust)
    config = VerifierConfig(
        key=signing_key,
        keyring=provers,
        store=store,
        listen=make_listen(listen),
        host=make_host(device, python, env, model_paths),
        using=using,
        profile=read_profile_options(profile, profile_key, signing_key, provers=provers, provers_option="--trust"),
        require_challenge=require_challenge,
        max_seconds=max_seconds,
    )
    require_judge(signing_key, provers, "--trust")
    log_to_stderr()
    serve_until_stopped(serve_verifier(config), listen["listen"])
