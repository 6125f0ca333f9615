"""``verifier calibrate``, ``--profile`` and ``verifier profile``: what cannot work is said before the replays."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rpc_world
from small_profile import profile_bytes

from fpforensics.common.keys import generate, load_private
from fpforensics.verifier import calibrate as calibrating
from fpforensics.verifier import check as checking
from fpforensics.verifier.check import CheckPlan
from fpforensics.verifier.cli import main

Run = Callable[..., tuple[object, str, str]]
PROVERS = f"key {rpc_world.PROVER_KEY.keyid[:16]}… is a prover's"
SIGNED = ("--key", "prover.key.pub", "--sign", "verifier.key", "-o", "profile.json")


@pytest.fixture
def verifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line beside a small bundle and a profile; returns exit code, stdout and stderr."""
    rpc_world.write_bundle(tmp_path / "bundle.msgpack")
    (tmp_path / "prover.key.pub").write_bytes(rpc_world.PROVER_KEY.public.pem())
    for name in ("verifier", "stranger"):
        generate(tmp_path / f"{name}.key")
    (tmp_path / "made.json").write_bytes(profile_bytes(load_private(tmp_path / "verifier.key")))
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["verifier", *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        said = capsys.readouterr()
        return left.value.code, said.out, said.err

    return run


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("replays were begun")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["bundle.msgpack", *SIGNED[:4]], 2, "--output"),
        (["bundle.msgpack", *SIGNED, "--sign", "nosuch.key"], 2, "private key nosuch.key does not exist"),
        (["bundle.msgpack", *SIGNED, "--sign", "verifier.key.pub"], 2, "verifier.key.pub is a public key"),
        (["bundle.msgpack", *SIGNED, "--key", "verifier.key.pub"], 2, "is a prover's (--key) and signs here too"),
        (["bundle.msgpack", *SIGNED, "-o", "/nosuch/p.json"], 2, "there is no folder /nosuch"),
        (["bundle.msgpack", *SIGNED, "-o", "bundle.msgpack"], 2, "bundle.msgpack is an input"),
        (["bundle.msgpack", *SIGNED, "-o", "."], 2, "it is a folder"),
        (["bundle.msgpack", *SIGNED, "--lineup", "attn=eagre"], 2, "did you mean 'eager'?"),
        (["bundle.msgpack", *SIGNED, "--name", "x" * 101], 2, "--name of 101 characters"),
        (["bundle.msgpack", *SIGNED, "--name", "a\x1bb"], 2, "--name of 3 characters"),
        (
            ["bundle.msgpack", *SIGNED],
            2,
            "row attn=sdpa,dtype=bf16 of bundle.msgpack lacks hidden_states/2, key_vectors/2, key_vectors/4",
        ),
        (["bundle.msgpack", *SIGNED, "--key", "stranger.key.pub"], 2, "lacks"),
        (["bundle.msgpack", "--key", "stranger.key.pub", *SIGNED[2:]], 4, "no trusted key signed this"),
    ],
)
def test_calibrate_refuses_before_it_replays(
    verifier: Run, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, said: str
) -> None:
    monkeypatch.setattr(calibrating, "replay_bundle", refuse)
    assert said in (answer := verifier("calibrate", *arguments))[2], answer
    assert answer[:2] == (code, "")
    assert not Path("profile.json").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--profile", "made.json"], 2, "--profile without --profile-key (whose calibration do you trust?"),
        (["--profile-key", "verifier.key.pub"], 2, "--profile-key without --profile"),
        (["--profile", "nosuch.json", "--profile-key", "verifier.key.pub"], 2, "no profile nosuch.json"),
        (["--profile", "made.json", "--profile-key", "stranger.key.pub"], 4, "profile made.json: no trusted key"),
        (
            ["--profile", "made.json", "--profile-key", "prover.key.pub"],
            2,
            f"{PROVERS} (--key) and calibrates too (--profile-key)",
        ),
        (["--profile", "made.json", "--profile-key", "verifier.key.pub", "--profile-key", "."], 2, PROVERS),
        (
            ["--profile", "made.json", "--key", "verifier.key.pub", "--sign", "verifier.key", "--verdict", "v.json"],
            2,
            "calibrates too (the key that signs here)",
        ),
        (["--profile", "bundle.msgpack", "--profile-key", "verifier.key.pub"], 4, "profile bundle.msgpack: "),
        (["--profile", "made.json", "--profile-key", "verifier.key.pub", "--html", "made.json"], 2, "is an input"),
        (["--profile", "made.json", "--sign", "stranger.key", "--verdict", "v.json"], 4, "no trusted key"),
    ],
)
def test_check_refuses_a_profile_that_it_cannot_believe(
    verifier: Run, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, said: str
) -> None:
    monkeypatch.setattr(checking, "check_bundle", refuse)
    found, out, error = verifier("check", "bundle.msgpack", "--key", "prover.key.pub", *arguments)
    assert (found, out) == (code, "")
    assert said in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "trusted", [["--profile-key", "verifier.key.pub"], ["--sign", "verifier.key", "--verdict", "verdict.json"]]
)
def test_check_decides_by_the_profile_that_was_given(
    verifier: Run, monkeypatch: pytest.MonkeyPatch, trusted: list[str]
) -> None:
    plans: list[CheckPlan] = []

    def remember(bundle: Any, plan: CheckPlan, *rest: Any) -> Any:
        plans.append(plan)
        return rpc_world.quick_check(bundle, plan, *rest)

    monkeypatch.setattr(checking, "check_bundle", remember)
    assert verifier("check", "bundle.msgpack", "--key", "prover.key.pub", "--profile", "made.json", *trusted)[0] == 0
    assert plans[0].profile is not None and plans[0].profile.content.name == "lab"


def test_a_session_that_a_server_checks_takes_no_profile(verifier: Run) -> None:
    code, _, error = verifier(
        "session", "--prover", "127.0.0.1:1", "--key", "prover.key.pub", "--server", "127.0.0.1:1", "--server-key",
        "verifier.key.pub", "-o", "b.msgpack", "--profile", "made.json",
    )  # fmt: skip
    assert code == 2 and "--profile with --server" in error


def test_serve_trusts_its_own_calibration(verifier: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from fpforensics.verifier import service
    from fpforensics.verifier.cli import serve

    configs: list[service.VerifierConfig] = []
    monkeypatch.setattr(service, "serve_verifier", configs.append)
    monkeypatch.setattr(serve, "serve_until_stopped", lambda *_: None)
    common = ("serve", "--trust", "prover.key.pub", "--store", "store", "--profile", "made.json")
    assert verifier(*common, "--key", "verifier.key")[0] == 0
    assert configs[0].profile is not None and configs[0].profile.content.name == "lab"
    code, _, error = verifier(*common, "--key", "stranger.key")
    assert code == 4 and "profile made.json: no trusted key" in error


def test_a_prover_may_not_calibrate_for_sessions_and_servers_either(verifier: Run) -> None:
    profile = ("--profile", "made.json", "--profile-key", "prover.key.pub")
    for command, option in (
        (("session", "--prover", "127.0.0.1:1", "--key", "prover.key.pub", "-o", "b.msgpack"), "--key"),
        (("serve", "--key", "verifier.key", "--trust", "prover.key.pub", "--store", "store"), "--trust"),
    ):
        code, _, error = verifier(*command, *profile)
        assert code == 2 and f"{PROVERS} ({option})" in error and "sign profiles with a verifier's key" in error


def test_a_prover_may_not_judge_in_sessions_and_on_servers_either(verifier: Run) -> None:
    signed = ("--verdict", "v.json", "--sign", "verifier.key")
    for command, option in (
        (("session", "--prover", "127.0.0.1:1", "--key", "verifier.key.pub", "-o", "b.msgpack", *signed), "--key"),
        (("serve", "--key", "verifier.key", "--trust", "verifier.key.pub", "--store", "store"), "--trust"),
    ):
        code, _, error = verifier(*command)
        assert code == 2 and f"is a prover's ({option}) and signs here too" in error
    assert not Path("store").exists()


def test_profile_shows_what_it_holds(verifier: Run) -> None:
    code, out, _ = verifier("profile", "made.json", "--key", "verifier.key.pub")
    assert code == 0 and "decode/hidden_states/1" in out and "3 calibration prompts: p cannot go below 0.25" in out
    code, out, _ = verifier("profile", "made.json", "--key", "verifier.key.pub", "--json")
    assert code == 0 and out.startswith("{")
    code, out, _ = verifier("profile")
    assert code == 0 and "SmolLM2-135M, H100 and x86 CPU: built in" in out
    assert verifier("profile", "made.json")[0] == 2
    assert verifier("profile", "made.json", "--key", "stranger.key.pub")[0] == 4


def test_options_come_from_the_environment_too(verifier: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERIFIER_CHECK_PROFILE", "nosuch.json")
    monkeypatch.setenv("VERIFIER_CHECK_PROFILE_KEY", "verifier.key.pub")
    assert "no profile nosuch.json" in verifier("check", "bundle.msgpack", "--key", "prover.key.pub")[2]
    monkeypatch.setenv("VERIFIER_CALIBRATE_KEY", "prover.key.pub")
    monkeypatch.setenv("VERIFIER_CALIBRATE_SIGN", "nosuch.key")
    assert "nosuch.key does not exist" in verifier("calibrate", "bundle.msgpack", "-o", "profile.json")[2]
    monkeypatch.setenv("VERIFIER_PROFILE_KEY", "verifier.key.pub")
    assert verifier("profile", "made.json")[0] == 0


def test_help_has_examples(verifier: Run) -> None:
    for command in ("calibrate", "profile"):
        code, out, _ = verifier(command, "--help")
        assert code == 0 and f"verifier {command} " in out
    assert "299 different prompts" in " ".join(verifier("calibrate", "--help")[1].split())
    assert "--profile-key" in verifier("check", "--help")[1]
