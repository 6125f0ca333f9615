"""``prover keygen`` and ``verifier keygen``: one command, and the help of each names its own program."""

from __future__ import annotations

from pathlib import Path

import click


def _keygen_of(program: str) -> click.Command:
    @click.command("keygen", help=_HELP.format(program=program))
    @click.argument("path", type=click.Path(path_type=Path))
    def command(path: Path) -> None:
        from fpforensics.common.keys import generate

        public = generate(path)
        click.echo(f"private key  {path}\npublic key   {path}.pub\nkeyid        {public.keyid}")

    return command


_HELP = """Make an Ed25519 key: PATH (private, mode 0600) and PATH.pub (hand this to those who check you).

\b
{program} keygen {program}.key
"""

keygen = _keygen_of("prover")
verifier_keygen = _keygen_of("verifier")
