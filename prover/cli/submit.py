"""``prover submit``: send a bundle to a verifier and have a claim checked."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

import click

from fpforensics.common.cli import progress_bar, require_outputs
from fpforensics.common.cli_specs import SpecCommand
from fpforensics.common.netcli import AccessOptions, access_options, make_access
from fpforensics.verifier.cli.check import (
    brief_option,
    claim_options,
    deliver_signed,
    make_plan,
    output_options,
    require_answer,
    require_renderers,
)


@click.command(cls=SpecCommand)
@click.argument("bundle", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--server", required=True, help="The verifier, host:port.")
@click.option("--server-key", "server_keys", multiple=True, required=True, type=click.Path(path_type=Path), help="Public key that its verdicts are signed with. Repeatable.")  # fmt: skip
@claim_options
@output_options
@access_options
@brief_option
def submit(
    bundle: Path,
    server: str,
    server_keys: tuple[Path, ...],
    claim: str,
    lineup: tuple[str, ...],
    mode: str,
    row: str,
    using: str,
    as_json: bool,
    html: Path | None,
    png: Path | None,
    verdict_path: Path | None,
    quiet: bool,
    **access: Unpack[AccessOptions],
) -> None:
    """Send BUNDLE to a verifier, have the claim checked there, and print its signed verdict.

    \b
    prover submit bundle.msgpack --server 127.0.0.1:7342 --server-key verifier.key.pub --claim quant=none
    """
    from fpforensics.common.inspect import summarize
    from fpforensics.common.keys import Keyring
    from fpforensics.verifier.client import VerifierClient
    from fpforensics.verifier.verdict import open_verdict

    plan = make_plan(claim, lineup, mode, row, using)
    keyring = Keyring.from_paths(server_keys)
    require_outputs(html, png, verdict_path)
    require_renderers(html, png)
    digest = summarize(bundle, None, header_only=True).digest
    with VerifierClient(server, make_access(access)) as client, progress_bar(quiet) as report:
        client.submit_bundle(bundle, report)
        verdict = open_verdict(client.check(digest, plan, report), keyring)
    require_answer(verdict, digest, plan)
    deliver_signed(verdict, as_json=as_json, html=html, png=png, verdict_path=verdict_path, quiet=quiet)
