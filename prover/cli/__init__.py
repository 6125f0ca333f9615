"""The ``prover`` command: one file per subcommand, imported when it is run."""

from __future__ import annotations

import click

from fpforensics.common.cli import LazyGroup, completion_command, variables_help
from fpforensics.common.cli import run as run_program  # `run` is a module of this package

COMMANDS = {
    "keygen": ("fpforensics.prover.cli.keygen:keygen", "Make the key that signs bundles."),
    "run": ("fpforensics.prover.cli.run:run", "Generate, capture and write a signed bundle; no network."),
    "serve": ("fpforensics.prover.cli.serve:serve", "Answer verifiers' sessions over gRPC."),
    "submit": ("fpforensics.prover.cli.submit:submit", "Send a bundle to a verifier and have a claim checked."),
    "make-checkpoint": (
        "fpforensics.prover.cli.make_checkpoint:make_checkpoint",
        "Quantize a small model into a format that providers serve.",
    ),
    "inspect": ("fpforensics.prover.cli.inspect:inspect", "Show what a bundle holds."),
    "completion": ("fpforensics.prover.cli:completion", "Print a shell completion script."),
}

completion = completion_command("prover")


@click.group(
    cls=LazyGroup,
    lazy=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=variables_help("prover", "run"),
)
@click.version_option(package_name="fpforensics", prog_name="prover")
def cli() -> None:
    """Show how a model was really run: generate on this hardware and sign what the arithmetic left behind.

    \b
    prover keygen prover.key
    prover run --key prover.key --config attn=sdpa -o bundle.msgpack
    prover serve --key prover.key --listen 127.0.0.1:7341
    """


def main() -> None:
    """Console script."""
    run_program(cli, "prover")
