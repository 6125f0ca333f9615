"""``verifier calibrate``: honest bundles in, a signed profile out."""

from __future__ import annotations

from pathlib import Path

import click

from fpforensics.common.cli import host_options, make_host, progress_bar, quiet_option, require_outputs
from fpforensics.common.cli_specs import SpecCommand, complete_lineup, complete_spec


@click.command(cls=SpecCommand)
@click.argument("bundles", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--key", multiple=True, required=True, type=click.Path(path_type=Path), help="Trusted public key of an honest prover, or a folder of *.pub. Repeatable.")  # fmt: skip
@click.option("--sign", required=True, type=click.Path(path_type=Path), help="Key to sign the profile with (see verifier keygen).")  # fmt: skip
@click.option("--output", "-o", required=True, type=click.Path(path_type=Path), help="Where to write the profile.")
@click.option("--name", default="", help="What verdicts call it. [default: the file's name]")
@click.option("--lineup", multiple=True, metavar="SPEC|FILE", shell_complete=complete_lineup, help="Config to replay beside each row's own, as a change to the first row's (attn=eager), or a TOML file; checks should use the same ones. Repeatable. [default: that of verifier check]")  # fmt: skip
@click.option("--replay", "mode", type=click.Choice(["prefill", "decode"]), default="decode", show_default=True, help="How checks will replay: a profile holds for one mode.")  # fmt: skip
@click.option("--row", default="", metavar="ID", help="Calibrate this row only.")
@click.option("--using", default="", metavar="KEY=VALUE", shell_complete=complete_spec, help="How this verifier computes replays, as checks will: e.g. matmul=fp32-rounded.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the profile as JSON.")
@host_options
@quiet_option
def calibrate(
    bundles: tuple[Path, ...],
    key: tuple[Path, ...],
    sign: Path,
    output: Path,
    name: str,
    lineup: tuple[str, ...],
    mode: str,
    row: str,
    using: str,
    as_json: bool,
    device: str,
    python: str,
    env: tuple[str, ...],
    model_paths: tuple[str, ...],
    quiet: bool,
) -> None:
    """Replay honest BUNDLES and learn what honest evidence measures here: for each config, the hardware that it ran on, and
    this verifier's. To reject at 1 % it takes 299 different prompts for each config; what comes out says if there are fewer.

    \b
    prover run --key prover.key -o honest.msgpack --references 304 --prompt-tokens 64 --prefill-positions 64 \\
        --new-tokens 4 --config attn=sdpa --config attn=eager
    verifier calibrate honest.msgpack --key prover.key.pub --sign verifier.key -o profile.json --replay prefill \\
        --lineup attn=eager --lineup attn=sdpa
    verifier check bundle.msgpack --key prover.key.pub --claim attn=sdpa --replay prefill \\
        --lineup attn=eager --lineup attn=sdpa --profile profile.json --profile-key verifier.key.pub

    What a profile says and what it holds for: docs/calibration.md.
    """
    import msgspec

    from fpforensics.common import envelope
    from fpforensics.common.errors import UsageError
    from fpforensics.common.keys import Keyring, load_private
    from fpforensics.verifier.calibrate import calibrate as measure
    from fpforensics.verifier.cli.check import make_plan, require_judge
    from fpforensics.verifier.measured import MAX_NAME, open_profile, sign_profile
    from fpforensics.verifier.report.profile_text import render_measured

    name = name or output.stem
    if not name.isprintable() or len(name) > MAX_NAME:
        raise UsageError(f"--name of {len(name)} characters", f"1 to {MAX_NAME}, all printable")
    plan = make_plan("", lineup, mode, row, using)
    require_outputs(output, inputs=(*bundles, sign, *key))
    signing_key, provers = load_private(sign), Keyring.from_paths(key)
    require_judge(signing_key, provers)
    host = make_host(device, python, env, model_paths)
    with progress_bar(quiet) as report:
        made = measure(bundles, provers, plan, host, name, report)
    data = envelope.to_json(sign_profile(made.content, made.bundles, signing_key))
    output.write_bytes(data)
    for remark in () if quiet else made.remarks:
        click.echo(remark, err=True)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(made.content)))
    else:
        click.echo(render_measured(open_profile(data, Keyring([signing_key.public])), brief=True))
