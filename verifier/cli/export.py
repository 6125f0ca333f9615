"""``verifier export``: a bundle as uniform experiment JSON."""

from __future__ import annotations

from pathlib import Path

import click

from fpforensics.common.cli import progress_bar, quiet_option, require_outputs


@click.command()
@click.argument("bundle", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--key", "keys", multiple=True, required=True, type=click.Path(path_type=Path), help="Trusted public key, or a folder of *.pub. Repeatable.")  # fmt: skip
@click.option("--output", "-o", required=True, type=click.Path(path_type=Path), help="File to write; gzip if it ends in .gz.")  # fmt: skip
@click.option("--variable", default="", metavar="KEY", help="What the experiment is about, e.g. attn. [default: the key in which the rows differ]")  # fmt: skip
@quiet_option
def export(bundle: Path, keys: tuple[Path, ...], output: Path, variable: str, quiet: bool) -> None:
    """Write BUNDLE's signals as uniform experiment JSON, for verifier analyze and for other people's tools.

    \b
    verifier export bundle.msgpack --key prover.key.pub -o attention_experiment.json
    verifier export bundle.msgpack --key prover.key.pub -o attention_experiment.json.gz --variable attn
    """
    from fpforensics.common.keys import Keyring
    from fpforensics.verifier.export import export_bundle
    from fpforensics.verifier.intake import open_bundle

    require_outputs(output, inputs=(bundle, *keys))
    with open_bundle(bundle, Keyring.from_paths(keys)) as verified, progress_bar(quiet) as report:
        verified.verify_all(lambda done, total: report("checking digests", done, total))
        export_bundle(verified, output, variable)
    click.echo(f"{output}  {output.stat().st_size} bytes")
