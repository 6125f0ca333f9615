"""``prover inspect`` and ``verifier inspect``: what a bundle holds, without torch."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("bundle", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--key", "keys", multiple=True, type=click.Path(path_type=Path), help="Trusted public key or folder of *.pub."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--header-only", is_flag=True, help="Read the signed manifest, not the tensors.")
def inspect(bundle: Path, keys: tuple[Path, ...], as_json: bool, header_only: bool) -> None:
    """Show what BUNDLE holds; with --key, also who signed it. Damage, or a signature that --key does not trust, is exit code 4.

    \b
    prover inspect bundle.msgpack
    verifier inspect bundle.msgpack --key prover.key.pub --json
    """
    from fpforensics.common.errors import EvidenceError
    from fpforensics.common.inspect import render_json, render_text, summarize
    from fpforensics.common.keys import Keyring

    summary = summarize(bundle, Keyring.from_paths(keys) if keys else None, header_only)
    click.echo(render_json(summary) if as_json else render_text(summary))
    if summary.blobs.intact is False or summary.signature.state == "not trusted":
        raise click.exceptions.Exit(EvidenceError.exit_code)
