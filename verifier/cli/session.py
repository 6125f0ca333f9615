"""``verifier session``: challenge a prover, fetch its bundle, check it here or on a verifier's server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import click

from fpforensics.common.cli import host_options, make_host, progress_bar, require_outputs
from fpforensics.common.cli_specs import SpecCommand
from fpforensics.common.netcli import AccessOptions, access_options, make_access
from fpforensics.prover.cli.plan import PlanOptions, make_session_plan, plan_options
from fpforensics.verifier.cli.check import (
    brief_option,
    claim_options,
    deliver,
    deliver_signed,
    load_signing_key,
    make_plan,
    output_options,
    profile_options,
    read_profile_options,
    require_answer,
    require_judge,
    require_renderers,
)

if TYPE_CHECKING:
    from fpforensics.common.engines.base import Host
    from fpforensics.prover.session import SessionPlan
    from fpforensics.verifier.intake import VerifiedBundle


class SessionOptions(PlanOptions, AccessOptions):
    """What click passes on unnamed."""


@click.command(cls=SpecCommand)
@click.option("--prover", required=True, help="The prover, host:port.")
@click.option("--key", "keys", multiple=True, required=True, type=click.Path(path_type=Path), help="The prover's public key, or a folder of *.pub. Repeatable.")  # fmt: skip
@click.option("--server", default="", help="Have a verifier's server check the bundle. [default: check here]")
@click.option("--server-key", "server_keys", multiple=True, type=click.Path(path_type=Path), help="Public key that the server's verdicts are signed with. Repeatable.")  # fmt: skip
@click.option("--output", "-o", required=True, type=click.Path(path_type=Path), help="Where to keep the bundle.")
@claim_options
@profile_options
@output_options
@click.option(
    "--sign", type=click.Path(path_type=Path), help="Key to sign a verdict given here with (see verifier keygen)."
)
@click.option(
    "--fresh/--same-prompts",
    default=True,
    help="Cut prompts from the built-in corpus at places that the challenge chooses, or the same ones each time.  [default: fresh]",
)
@plan_options
@access_options
@host_options
@brief_option
def session(
    prover: str,
    keys: tuple[Path, ...],
    server: str,
    server_keys: tuple[Path, ...],
    output: Path,
    claim: str,
    lineup: tuple[str, ...],
    mode: str,
    row: str,
    using: str,
    profile: Path | None,
    profile_key: tuple[Path, ...],
    fresh: bool,
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
    **options: Unpack[SessionOptions],
) -> None:
    """Send a prover a fresh challenge, fetch the bundle that answers it, and check the claim.

    \b
    verifier session --prover 127.0.0.1:7341 --key prover.key.pub -o bundle.msgpack --claim attn=sdpa
    verifier session --prover 127.0.0.1:7341 --key prover.key.pub -o bundle.msgpack --claim quant=none \\
        --server 127.0.0.1:7342 --server-key verifier.key.pub
    """
    import secrets

    import msgspec

    from fpforensics.common.errors import UsageError
    from fpforensics.common.keys import Keyring
    from fpforensics.prover.client import ProverClient, require_known_signer
    from fpforensics.verifier.answer import require_as_asked
    from fpforensics.verifier.check import check_bundle
    from fpforensics.verifier.client import VerifierClient
    from fpforensics.verifier.fresh import require_prompts, with_texts
    from fpforensics.verifier.intake import open_bundle
    from fpforensics.verifier.verdict import open_verdict, require_signable

    plan = make_plan(claim, lineup, mode, row, using)
    keyring, server_keyring = Keyring.from_paths(keys), Keyring.from_paths(server_keys)
    if server and not server_keys:
        raise UsageError("--server without --server-key", "whose verdicts do you trust? give the server's public key")
    access = make_access(
        AccessOptions(
            tls_roots=options["tls_roots"],
            tls_cert=options["tls_cert"],
            tls_key=options["tls_key"],
            token_file=options["token_file"],
        )
    )
    host = make_host(device, python, env, model_paths)
    require_outputs(output, html, png, verdict_path, inputs=(profile, *profile_key, *keys, *server_keys, sign))
    require_renderers(html, png)
    if server and plan.using:
        raise UsageError("--using with --server", "the server's operator chooses how replays run")
    if server and (profile or profile_key):
        raise UsageError("--profile with --server", "the server's operator chooses what it decides by")
    signing_key = None if server else load_signing_key(sign, verdict_path)
    measured = read_profile_options(profile, profile_key, signing_key, provers=keyring)
    require_judge(signing_key, keyring)
    plan = msgspec.structs.replace(plan, profile=measured)
    with_texts(
        make_session_plan(options, "00"), fresh=fresh
    )  # what makes no sense is said before the prover is asked anything
    with progress_bar(quiet) as report, ProverClient(prover, access) as proving:
        require_known_signer(proving.describe(), keyring, prover)
        if not server:
            asked = with_texts(make_session_plan(options, secrets.token_hex(32)), fresh=fresh)
            proving.run_session(asked, output, report=report)
            with open_bundle(output, keyring, expected_nonce=asked.nonce) as bundle:
                bundle.verify_all()
                require_as_asked(bundle, asked)
                require_prompts(bundle, asked, _checkpoint(asked, host))
                if signing_key is not None:
                    require_signable(bundle.evidence, plan)
                result = check_bundle(bundle, plan, host, report)
        else:
            with VerifierClient(server, access) as verifying:
                asked = with_texts(make_session_plan(options, verifying.request_nonce()), fresh=fresh)
                proving.run_session(asked, output, report=report)
                # Ours to look at before it is passed on: a bundle that we would refuse is not worth a server's time.
                with open_bundle(output, keyring, expected_nonce=asked.nonce) as bundle:
                    require_as_asked(bundle, asked)
                    _compare_prompts(bundle, asked, host)
                    digest = bundle.digest
                verifying.submit_bundle(output, report)
                verdict = open_verdict(verifying.check(digest, plan, report), server_keyring)
            require_answer(verdict, digest, plan)
    if server:
        deliver_signed(verdict, as_json=as_json, html=html, png=png, verdict_path=verdict_path, quiet=quiet)
    else:
        deliver(
            result,
            as_json=as_json,
            html=html,
            png=png,
            sign=signing_key,
            verdict_path=verdict_path,
            challenged=True,
            quiet=quiet,
        )


def _compare_prompts(bundle: VerifiedBundle, asked: SessionPlan, host: Host) -> None:
    """Where the checks run elsewhere, this side may lack the tokenizer, and nothing is fetched for it: that is said."""
    from fpforensics.common.config import DEFAULT_MODEL
    from fpforensics.common.errors import MissingDependencyError
    from fpforensics.verifier.fresh import require_prompts

    model = asked.configs[0].model
    missing = f"no checkpoint was named: --model-path {model}=FOLDER"
    if model == DEFAULT_MODEL or model in host.models:
        try:
            require_prompts(bundle, asked, _checkpoint(asked, host))
            return
        except MissingDependencyError as error:
            missing = error.diagnostics()
    click.echo(f"prompts not compared with those that were asked for ({missing})", err=True)


def _checkpoint(asked: SessionPlan, host: Host) -> Path:
    from fpforensics.common.models import resolve_model

    config = asked.configs[0]
    return resolve_model(config.model, config.revision, host.models).path
