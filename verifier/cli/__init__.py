"""The ``verifier`` command: one file per subcommand, imported when it is run."""

from __future__ import annotations

import click

from fpforensics.common.cli import LazyGroup, completion_command, run, variables_help

COMMANDS = {
    "keygen": ("fpforensics.prover.cli.keygen:verifier_keygen", "Make the key that signs verdicts."),
    "check": ("fpforensics.verifier.cli.check:check", "Replay a bundle under a lineup and give a verdict."),
    "calibrate": (
        "fpforensics.verifier.cli.calibrate:calibrate",
        "Learn from honest bundles what honest evidence measures.",
    ),
    "profile": ("fpforensics.verifier.cli.profile:profile", "Show what a calibration says."),
    "compare": ("fpforensics.verifier.cli.compare:compare", "Compare the full logits of two bundles."),
    "serve": ("fpforensics.verifier.cli.serve:serve", "Take bundles, check claims, publish signed verdicts over gRPC."),
    "session": ("fpforensics.verifier.cli.session:session", "Challenge a prover, fetch its bundle and check it."),
    "verdicts": ("fpforensics.verifier.cli.verdicts:verdicts", "Read signed verdicts, as an auditor."),
    "analyze": ("fpforensics.verifier.cli.analyze:analyze", "Redo a published study's tables from its numbers."),
    "export": ("fpforensics.verifier.cli.export:export", "Write a bundle as uniform experiment JSON."),
    "suite": ("fpforensics.verifier.cli.suite:suite", "Run ablation experiments on provers and publish their results."),
    "inspect": ("fpforensics.prover.cli.inspect:inspect", "Show what a bundle holds."),
    "completion": ("fpforensics.verifier.cli:completion", "Print a shell completion script."),
}

completion = completion_command("verifier")


@click.group(
    cls=LazyGroup,
    lazy=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 CONSISTENT, 1 INCONSISTENT, 3 INCONCLUSIVE, 2 usage, 4 untrusted or malformed evidence, "
    f"5 the replay failed. {variables_help('verifier', 'check')}",
)
@click.version_option(package_name="fpforensics", prog_name="verifier")
def cli() -> None:
    """Check how a model was really run: replay signed evidence on this hardware and say which configs it fits.

    \b
    verifier check bundle.msgpack --key prover.key.pub --claim quant=none
    verifier session --prover 127.0.0.1:7341 --key prover.key.pub -o bundle.msgpack --claim attn=sdpa
    verifier verdicts list --server 127.0.0.1:7342 --key verifier.key.pub
    """


def main() -> None:
    """Console script."""
    run(cli, "verifier")
