"""``verifier check``: what cannot work is said before the replays, and what is printed after them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rpc_world

from fpforensics.common.engines.base import Host
from fpforensics.common.errors import MissingDependencyError, UsageError
from fpforensics.common.keys import Keyring, generate
from fpforensics.verifier import check as checking
from fpforensics.verifier.check import CheckPlan, check_bundle
from fpforensics.verifier.cli import main
from fpforensics.verifier.intake import open_bundle

Run = Callable[..., tuple[object, str, str]]


@pytest.fixture
def verifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs ``verifier check`` on a small bundle; returns exit code, stdout and stderr."""
    rpc_world.write_bundle(tmp_path / "bundle.msgpack")
    (tmp_path / "prover.key.pub").write_bytes(rpc_world.PROVER_KEY.public.pem())
    generate(tmp_path / "verifier.key")
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[object, str, str]:
        given = ["bundle.msgpack", "--key", "prover.key.pub", *arguments]
        monkeypatch.setattr(sys, "argv", ["verifier", "check", *given])
        with pytest.raises(SystemExit) as left:
            main()
        said = capsys.readouterr()
        return left.value.code, said.out, said.err

    return run


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("replays were begun")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--claim", ""], "--claim is empty (leave it out to check what each row declares"),
        (["--claim", " "], "--claim is empty"),
        (["--claim", "quant=awqq"], "did you mean 'awq'?"),
        (["--lineup", "attn=eagre"], "did you mean 'eager'?"),
        (["--using", "matmul=x"], "unknown matmul 'x'"),
        (["--verdict", "v.json"], "--verdict without --sign"),
        (["--sign", "verifier.key"], "--sign without --verdict"),
        (["--verdict", "v.json", "--sign", "nosuch.key"], "private key nosuch.key does not exist"),
        (["--verdict", "v.json", "--sign", "verifier.key.pub"], "verifier.key.pub is a public key"),
        (
            ["--verdict", "v.json", "--sign", "verifier.key", "--key", "verifier.key.pub"],
            "is a prover's (--key) and signs",
        ),
        (["--verdict", "/nosuch/v.json", "--sign", "verifier.key"], "there is no folder /nosuch"),
        (["--html", "/nosuch/x.html"], "cannot write /nosuch/x.html"),
        (["--png", "."], "cannot write .: it is a folder"),
        (["--python", "/nosuch"], "--python /nosuch: no such interpreter"),
    ],
)
def test_what_cannot_work_is_said_before_the_replays(
    verifier: Run, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.setattr(checking, "check_bundle", refuse)
    code, out, error = verifier(*arguments)
    assert (code, out) == (2, "")
    assert said in error
    assert error.count("\n") == 1


def test_a_page_that_could_not_be_made_is_refused_before_the_replays(
    verifier: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checking, "check_bundle", refuse)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    code, _, error = verifier("--html", "x.html")
    assert code == 5
    assert "the HTML page needs jinja2" in error and "pip install '.[report]'" in error


def test_an_unset_claim_is_no_empty_claim(verifier: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "check_bundle", rpc_world.quick_check)
    assert verifier()[0] == 0


def test_quiet_prints_the_verdict_and_its_reasons(verifier: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "check_bundle", rpc_world.quick_check)
    assert verifier("-q") == (0, "✓ CONSISTENT: because; by fixed limits: no error rate is known\n", "")
    code, out, _ = verifier()
    assert code == 0
    assert out.splitlines()[-1] == "✓ CONSISTENT" and "  - because" in out
    code, out, _ = verifier("-q", "--json")
    assert out.startswith("{")


def test_a_verdict_is_signed_with_the_key_that_was_read(verifier: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from fpforensics.verifier.verdict import open_verdict

    monkeypatch.setattr(checking, "check_bundle", rpc_world.quick_check)
    assert verifier("--sign", "verifier.key", "--verdict", "v.json")[0] == 0
    keyring = Keyring.from_paths([Path("verifier.key.pub")])
    assert open_verdict(Path("v.json").read_bytes(), keyring).predicate.result.verdict == "CONSISTENT"


def test_help_says_that_verdict_and_sign_go_together(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["verifier", "check", "--help"])
    with pytest.raises(SystemExit):
        main()
    shown = " ".join(capsys.readouterr().out.split())
    assert "needs --sign" in shown and "needs --verdict" in shown


@pytest.mark.parametrize(
    ("plan", "kind", "said"),
    [
        (CheckPlan(lineup=("tp=2",)), UsageError, "or emulate_tp=2"),
        (CheckPlan(claim="backend=vllm,dtype=fp64"), UsageError, "backend vllm does not compute in fp64"),
        (CheckPlan(lineup=("quant=torchao-int8",)), MissingDependencyError, "needs torchao"),
    ],
)
def test_a_config_that_cannot_run_is_refused_before_weights_are_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: CheckPlan, kind: type[Exception], said: str
) -> None:
    monkeypatch.setattr(checking, "weights_digest", refuse)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "torchao" else object())
    rpc_world.write_bundle(tmp_path / "bundle.msgpack")
    keyring = Keyring([rpc_world.PROVER_KEY.public])
    with open_bundle(tmp_path / "bundle.msgpack", keyring) as bundle, pytest.raises(kind) as refused:
        check_bundle(bundle, plan, Host(device="cpu"), start=refuse)
    assert said in refused.value.diagnostics()  # type: ignore[attr-defined]
