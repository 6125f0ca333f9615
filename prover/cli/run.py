"""``prover run``: prompts to bundle file, no network."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

import click

from fpforensics.common.cli import host_options, make_host, progress_bar, quiet_option, require_outputs
from fpforensics.common.cli_specs import SpecCommand
from fpforensics.prover.cli.plan import PlanOptions, make_session_plan, plan_options


@click.command(cls=SpecCommand)
@click.option("--key", required=True, type=click.Path(path_type=Path), help="Signing key (see prover keygen).")
@click.option("--output", "-o", required=True, type=click.Path(path_type=Path), help="Bundle to write.")
@plan_options
@click.option("--nonce", default="", help="The verifier's challenge, in hex.")
@host_options
@quiet_option
def run(
    key: Path,
    output: Path,
    nonce: str,
    device: str,
    python: str,
    env: tuple[str, ...],
    model_paths: tuple[str, ...],
    quiet: bool,
    **options: Unpack[PlanOptions],
) -> None:
    """Generate under each config, check that repetitions are bit-identical, and write one signed bundle.

    \b
    prover run --key prover.key -o bundle.msgpack
    prover run --key prover.key -o rows.msgpack --config attn=sdpa --config attn=eager --config quant=bnb-nf4
    prover run --key prover.key -o paper.msgpack --prompts paper.pdf --prompt-tokens 2000 --references 3
    """
    from fpforensics.common.keys import load_private
    from fpforensics.prover.session import run_session

    plan = make_session_plan(options, nonce)
    require_outputs(output)
    signing_key = load_private(key)
    host = make_host(device, python, env, model_paths)
    with progress_bar(quiet) as report:
        digest = run_session(plan, host, signing_key, output, lambda p: report(p.stage, p.done, p.total))
    click.echo(f"{output}  {output.stat().st_size} bytes  {digest}")
