"""``prover make-checkpoint``: a small model in the formats that providers serve, made on a CPU."""

from __future__ import annotations

from pathlib import Path

import click

from fpforensics.common.cli import progress_bar, quiet_option

FORMATS = ("none", "awq", "gptq", "w4a16", "w8a8-int8", "fp8-dynamic", "torchao-int8", "bnb-nf4")


@click.command("make-checkpoint")
@click.option("--model", default="smollm2-135m", show_default=True, help="Embedded model, Hugging Face id or folder.")
@click.option("--revision", default="", help="Branch, tag or commit of a Hugging Face id.")
@click.option("--format", "format_name", required=True, metavar="FORMAT", help=f"One of {', '.join(FORMATS)}.")
@click.option(
    "--group-size",
    type=click.IntRange(min=1),
    default=None,
    help="Inputs that share a scale, for awq, gptq and w4a16. [default: the largest of 128, 64, 32 that divides]",
)
@click.option(
    "--pad",
    default="",
    metavar="KEY=N,…",
    help="Make the model larger with zeros, its function the same: hidden=, heads=, kv_heads=, mlp=.",
)
@click.option(
    "--output", "-o", default=None, type=click.Path(path_type=Path), help="New folder. [default: in the user's cache]"
)
@quiet_option
def make_checkpoint(
    model: str,
    revision: str,
    format_name: str,
    group_size: int | None,
    pad: str,
    output: Path | None,
    quiet: bool,
) -> None:
    """Round a model's weights to nearest in FORMAT; prints the checkpoint's folder and its weights' digest.

    The same call makes the same weights. docs/checkpoints.md says which engine loads which format.

    \b
    prover make-checkpoint --format gptq
    prover make-checkpoint --format awq --group-size 128 --pad hidden=768,heads=12,kv_heads=4 -o smollm2-awq
    """
    from fpforensics.prover.checkpoint.make import make_checkpoint as make

    with progress_bar(quiet) as report:
        made = make(
            model, format_name, revision=revision, group_size=group_size, pad=pad, output=output, progress=report
        )
    click.echo(f"{made.path}  {made.weights_digest}")
