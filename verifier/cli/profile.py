"""``verifier profile``: what a calibration says, without torch."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("file", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--key", multiple=True, type=click.Path(path_type=Path), help="Public key of whoever calibrated, or a folder of *.pub. Repeatable.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def profile(file: Path | None, key: tuple[Path, ...], as_json: bool) -> None:
    """Show what the profile in FILE was measured on and what it found; without FILE, the built-in one.

    \b
    verifier profile profile.json --key verifier.key.pub
    verifier profile
    """
    import msgspec

    from fpforensics.common.errors import UsageError
    from fpforensics.common.keys import Keyring
    from fpforensics.verifier.measured import load_profile
    from fpforensics.verifier.profile import built_in_profile
    from fpforensics.verifier.report.profile_text import render_built_in, render_measured

    if file is None:
        shown = built_in_profile()
        click.echo(msgspec.json.format(msgspec.json.encode(shown)) if as_json else render_built_in(shown))
        return
    if not key:
        raise UsageError(f"whose calibration is {file}?", "give the public key that it is signed with: --key FILE.pub")
    found = load_profile(file, Keyring.from_paths(key), option="--key")
    click.echo(msgspec.json.format(msgspec.json.encode(found.content)) if as_json else render_measured(found))
