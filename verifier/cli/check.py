"""``verifier check``: a bundle and a claim in, matrices and a verdict out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from fpforensics.common.cli import host_options, make_host, progress_bar
from fpforensics.common.cli import require_outputs as require_outputs
from fpforensics.common.cli_specs import SpecCommand, complete_lineup, complete_spec
from fpforensics.common.errors import shorten

if TYPE_CHECKING:
    from fpforensics.common.keys import Keyring, PrivateKey
    from fpforensics.verifier.check import CheckPlan, CheckResult
    from fpforensics.verifier.measured import MeasuredProfile
    from fpforensics.verifier.verdict import VerifiedVerdict

F = TypeVar("F", bound=Callable[..., Any])
MIN_NONCE_DIGITS = 32
EXIT_CODES = {"CONSISTENT": 0, "INCONSISTENT": 1, "INCONCLUSIVE": 3}


def _claimed(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """Nonsense fails before anything is opened; an empty claim that was given is no claim that was left out."""
    from click.core import ParameterSource

    from fpforensics.common.config import parse_claim
    from fpforensics.common.errors import UsageError

    if param.name and ctx.get_parameter_source(param.name) is not ParameterSource.DEFAULT:
        if not value.strip():
            raise UsageError("--claim is empty", "leave it out to check what each row declares, or write quant=none")
        parse_claim(value)
    return value


def claim_options(command: F) -> F:
    """``--claim``, ``--lineup``, ``--replay``, ``--row`` and ``--using``: what is checked against what."""
    for decorate in reversed(
        (
            click.option("--claim", default="", metavar="KEY=VALUE,…", callback=_claimed, shell_complete=complete_spec, help="What is claimed, e.g. quant=awq. [default: what each row declares]"),
            click.option("--lineup", multiple=True, metavar="SPEC|FILE", shell_complete=complete_lineup, help="Config to replay, as a change to the claimed one (attn=eager), or a TOML file. Repeatable. [default: one change each of attention, dtype, quantization]"),
            click.option("--replay", "mode", type=click.Choice(["prefill", "decode"]), default="decode", show_default=True, help="Force tokens one by one through the decode kernels, or all in one forward (fast)."),
            click.option("--row", default="", metavar="ID", help="Check this row only."),
            click.option("--using", default="", metavar="KEY=VALUE", shell_complete=complete_spec, help="How this verifier computes replays, e.g. matmul=fp32-rounded (fast on CPUs without bf16)."),
        )
    ):  # fmt: skip
        command = decorate(command)
    return command


def profile_options(command: F) -> F:
    """``--profile`` and ``--profile-key``: the calibration that decides where it was measured."""
    for decorate in reversed(
        (
            click.option("--profile", type=click.Path(path_type=Path), help="Calibration to decide by, where it covers a row (see verifier calibrate). [default: the built-in one]"),
            click.option("--profile-key", multiple=True, type=click.Path(path_type=Path), help="Public key of whoever calibrated, or a folder of *.pub. Repeatable. [default: that of the key which signs here]"),
        )
    ):  # fmt: skip
        command = decorate(command)
    return command


def read_profile_options(
    path: Path | None,
    keys: tuple[Path, ...],
    own: PrivateKey | None = None,
    *,
    provers: Keyring,
    provers_option: str = "--key",
) -> MeasuredProfile | None:
    """The profile of :func:`profile_options`, before any replay; ``own`` is trusted where no key is named.

    ``provers`` are the keys that evidence is signed with, given by ``provers_option``. Raises :class:`UsageError` if one of them
    is trusted for the profile too: whoever is judged must not say what honest evidence is.
    """
    from fpforensics.common.errors import UsageError
    from fpforensics.common.keys import Keyring
    from fpforensics.verifier.measured import load_profile

    if path is None:
        if keys:
            raise UsageError("--profile-key without --profile", "name the profile that the key is for")
        return None
    if not keys and own is None:
        raise UsageError(
            "--profile without --profile-key",
            "whose calibration do you trust? give the public key that it is signed with",
        )
    trusted = Keyring.from_paths(keys) if keys or own is None else Keyring([own.public])
    for each in trusted:
        if provers.get(each.keyid) is not None:
            source = "--profile-key" if keys else "the key that signs here"
            raise UsageError(
                f"key {each.keyid[:16]}… is a prover's ({provers_option}) and calibrates too ({source})",
                "whoever is judged must not say what honest evidence is: sign profiles with a verifier's key (see verifier keygen)",
            )
    return load_profile(path, trusted)


def require_judge(signing: PrivateKey | None, provers: Keyring, provers_option: str = "--key") -> None:
    """Raise :class:`UsageError` if the key that signs here is one that evidence is signed with: whoever is judged must not judge."""
    from fpforensics.common.errors import UsageError

    if signing is not None and provers.get(signing.public.keyid) is not None:
        raise UsageError(
            f"key {signing.public.keyid[:16]}… is a prover's ({provers_option}) and signs here too",
            "whoever is judged must not judge: sign with a verifier's key (see verifier keygen)",
        )


def output_options(command: F) -> F:
    """``--json``, ``--html``, ``--png`` and ``--verdict``: what is left behind."""
    for decorate in reversed(
        (
            click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
            click.option("--html", type=click.Path(path_type=Path), help="Write a self-contained HTML page."),
            click.option("--png", type=click.Path(path_type=Path), help="Write the heat maps as a picture."),
            click.option("--verdict", "verdict_path", type=click.Path(path_type=Path), help="Where to write the signed verdict. One that is given here, not by a server, needs --sign."),
        )
    ):  # fmt: skip
        command = decorate(command)
    return command


def brief_option(command: F) -> F:
    """``--quiet``, where there is a verdict."""
    return click.option("--quiet", "-q", is_flag=True, help="No progress and no report: the verdict and its reasons, on one line.")(command)  # fmt: skip


@click.command(cls=SpecCommand)
@click.argument("bundle", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--key", "keys", multiple=True, required=True, type=click.Path(path_type=Path), help="Trusted public key, or a folder of *.pub. Repeatable.")  # fmt: skip
@claim_options
@profile_options
@click.option("--nonce", default=None, help="The challenge that this bundle must answer, in hex.")
@output_options
@click.option(
    "--sign",
    type=click.Path(path_type=Path),
    help="Key to sign the verdict with (see verifier keygen); needs --verdict.",
)
@host_options
@brief_option
def check(
    bundle: Path,
    keys: tuple[Path, ...],
    claim: str,
    lineup: tuple[str, ...],
    mode: str,
    row: str,
    using: str,
    profile: Path | None,
    profile_key: tuple[Path, ...],
    nonce: str | None,
    as_json: bool,
    html: Path | None,
    png: Path | None,
    sign: Path | None,
    verdict_path: Path | None,
    device: str,
    python: str,
    env: tuple[str, ...],
    model_paths: tuple[str, ...],
    quiet: bool,
) -> None:
    """Replay BUNDLE's tokens under a lineup of configs and say whether its evidence fits the claim.

    \b
    verifier check bundle.msgpack --key prover.key.pub --claim quant=none
    verifier check bundle.msgpack --key keys/ --claim attn=sdpa --lineup attn=eager --html report.html
    """
    import msgspec

    from fpforensics.common.errors import UsageError
    from fpforensics.common.keys import Keyring
    from fpforensics.verifier.check import check_bundle
    from fpforensics.verifier.intake import open_bundle
    from fpforensics.verifier.verdict import require_signable

    plan = make_plan(claim, lineup, mode, row, using)
    require_outputs(html, png, verdict_path, inputs=(bundle, sign, profile, *keys, *profile_key))
    require_renderers(html, png)
    signing_key = load_signing_key(sign, verdict_path)
    keyring = Keyring.from_paths(keys)
    measured = read_profile_options(profile, profile_key, signing_key, provers=keyring)
    require_judge(signing_key, keyring)
    plan = msgspec.structs.replace(plan, profile=measured)
    if nonce is not None and len(nonce) < MIN_NONCE_DIGITS:
        raise UsageError(f"nonce {shorten(nonce)!r}", f"a challenge has at least {MIN_NONCE_DIGITS} hex digits")
    host = make_host(device, python, env, model_paths)
    with open_bundle(bundle, keyring, expected_nonce=nonce) as verified, progress_bar(quiet) as report:
        if signing_key is not None:
            require_signable(verified.evidence, plan)
        # All of it before any replay: damaged evidence is not worth minutes of computing.
        verified.verify_all(lambda done, total: report("checking digests", done, total))
        result = check_bundle(verified, plan, host, report)
    deliver(result, as_json=as_json, html=html, png=png, sign=signing_key, verdict_path=verdict_path, quiet=quiet)


def make_plan(claim: str, lineup: tuple[str, ...], mode: str, row: str, using: str) -> CheckPlan:
    """The plan that the options of :func:`claim_options` describe; every spec is parsed here so that nonsense fails early."""
    from fpforensics.common.config import parse_claim, parse_config
    from fpforensics.verifier.check import CheckPlan
    from fpforensics.verifier.lineup import read_lineup

    if claim:
        parse_claim(claim)
    read = read_lineup(lineup)
    for spec in (*read.specs, using or read.using):
        parse_config(spec)
    return CheckPlan(claim=claim, lineup=read.specs, mode=mode, row=row, using=using or read.using)  # type: ignore[arg-type]


def deliver(
    result: CheckResult,
    *,
    as_json: bool,
    html: Path | None,
    png: Path | None,
    sign: PrivateKey | None,
    verdict_path: Path | None,
    challenged: bool = False,
    quiet: bool = False,
) -> None:
    """Sign and write what was asked for, print the result and leave with the verdict's exit code."""
    from fpforensics.common import envelope
    from fpforensics.verifier.verdict import sign_verdict

    if sign is not None and verdict_path is not None:
        verdict_path.write_bytes(envelope.to_json(sign_verdict(result, sign, challenged)))
    _show(result, as_json, html, png, quiet)


def load_signing_key(sign: Path | None, verdict_path: Path | None) -> PrivateKey | None:
    """The key to sign a verdict with, if one is asked for: read before the replays, not after them."""
    from fpforensics.common.errors import UsageError
    from fpforensics.common.keys import load_private

    if sign is None and verdict_path is not None:
        raise UsageError("--verdict without --sign", "a verdict is written signed: give a key (see verifier keygen)")
    if sign is not None and verdict_path is None:
        raise UsageError("--sign without --verdict", "name the file that the signed verdict goes to")
    return None if sign is None else load_private(sign)


def require_renderers(html: Path | None, png: Path | None) -> None:
    """Raise :class:`MissingDependencyError` for a page or picture that could not be made: before the replays."""
    from importlib.util import find_spec

    from fpforensics.common.errors import MissingDependencyError

    for path, what, package in ((html, "the HTML page", "jinja2"), (png, "the heat map", "matplotlib")):
        if path is not None and find_spec(package) is None:
            raise MissingDependencyError(what, package, "pip install '.[report]'")


def require_answer(verdict: VerifiedVerdict, bundle_digest: str, plan: CheckPlan) -> None:
    """Raise :class:`EvidenceError` unless a server's signed verdict is about this bundle and this question.

    A verdict is signed for ever; one about something else, however true, is no answer.
    """
    from fpforensics.common.errors import EvidenceError

    result = verdict.predicate.result
    for what, said, asked in (
        ("bundle", result.bundle_digest, bundle_digest),
        ("claim", result.claim, plan.claim),
        ("replay mode", result.mode, plan.mode),
    ):
        if said != asked:
            raise EvidenceError(
                f"the server's verdict is about {what} {shorten(said)!r}, asked was {shorten(asked)!r}",
                "do not rely on it",
            )


def deliver_signed(
    verdict: VerifiedVerdict,
    *,
    as_json: bool,
    html: Path | None,
    png: Path | None,
    verdict_path: Path | None,
    quiet: bool = False,
) -> None:
    """The same for a verdict that a server signed, after :func:`require_answer`."""
    if verdict_path is not None:
        verdict_path.write_bytes(verdict.envelope)
    _show(verdict.predicate.result, as_json, html, png, quiet)


def _show(result: CheckResult, as_json: bool, html: Path | None, png: Path | None, quiet: bool) -> None:
    import msgspec

    from fpforensics.verifier.report import html as html_report
    from fpforensics.verifier.report import text

    if html is not None:
        html.write_text(html_report.render(result), encoding="utf-8")
    if png is not None:
        from fpforensics.verifier.report.heatmap import render_png

        render_png(result, png)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(result)))
    else:
        click.echo(text.one_line(result) if quiet else text.render(result), nl=quiet)
    raise click.exceptions.Exit(EXIT_CODES[result.verdict])
