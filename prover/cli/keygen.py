"""``prover keygen`` and ``verifier keygen``."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
def keygen(path: Path) -> None:
    """Make an Ed25519 key: PATH (private, mode 0600) and PATH.pub (hand this to those who check you).

    \b
    prover keygen prover.key
    """
    from fpforensics.common.keys import generate

    public = generate(path)
    click.echo(f"private key  {path}\npublic key   {path}.pub\nkeyid        {public.keyid}")
