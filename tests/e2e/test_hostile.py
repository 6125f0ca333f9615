"""Hostile bundles at both doors, the command line and the service: one clear line, the right code, nothing written."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from synthetic import NONCE, TEST_KEY

from fpforensics.common.errors import EvidenceError
from fpforensics.common.keys import Keyring, PrivateKey
from fpforensics.verifier.cli import main
from fpforensics.verifier.client import VerifierClient
from fpforensics.verifier.service import VerifierConfig, serve_verifier

ASSETS = Path(__file__).parents[1] / "assets"
GOLDEN = ASSETS / "golden.msgpack"
INDEX = json.loads((ASSETS / "index.json").read_text())


def run_check(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["verifier", "check", "-q", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, said.out, said.err


def require_refusal(code: int, out: str, err: str) -> None:
    assert code == 4, err
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    assert err.strip().isprintable()


@pytest.fixture(scope="module")
def trusted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "prover.pub"
    path.write_bytes(TEST_KEY.public.pem())
    return path


@pytest.mark.parametrize("name", [name for name, expected in INDEX.items() if expected["error"]])
def test_the_command_line_refuses(
    name: str, trusted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "report.html"
    arguments = [str(ASSETS / "hostile" / f"{name}.msgpack"), "--key", str(trusted), "--html", str(page)]
    if name == "replayed-nonce":
        arguments += ["--nonce", NONCE]
    code, out, err = run_check(arguments, monkeypatch, capsys)
    require_refusal(code, out, err)
    assert INDEX[name]["message"] in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("percent", range(0, 100, 7))
def test_the_command_line_refuses_a_truncated_bundle(
    percent: int, trusted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = GOLDEN.read_bytes()
    cut = tmp_path / "cut.msgpack"
    cut.write_bytes(whole[: len(whole) * percent // 100])
    require_refusal(*run_check([str(cut), "--key", str(trusted)], monkeypatch, capsys))


def test_a_model_that_the_verifier_lacks(
    trusted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run_check([str(GOLDEN), "--key", str(trusted)], monkeypatch, capsys)
    require_refusal(code, out, err)
    assert "--model-path" in err


@pytest.mark.parametrize("claim", ["x" * 200, "quant=awqq", "\x1b[31m=1", "quant", "tp=-1", ",,,", "a=" * 100])
def test_claim_nonsense_is_a_usage_error_in_one_line(
    claim: str, trusted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run_check([str(GOLDEN), "--key", str(trusted), "--claim", claim], monkeypatch, capsys)
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.strip().isprintable()


def test_the_service_refuses_them_all_and_stays_up(tmp_path: Path) -> None:
    """One server meets the whole corpus; a good bundle is still taken afterwards, and nothing else was kept."""
    store = tmp_path / "store"
    config = VerifierConfig(
        key=PrivateKey.fresh(),
        keyring=Keyring([TEST_KEY.public]),
        store=store,
    )
    with serve_verifier(config) as server, VerifierClient(f"127.0.0.1:{server.port}") as client:
        for name, expected in INDEX.items():
            if not expected["error"] or name == "replayed-nonce":  # a nonce is judged by those who sent one
                continue
            with pytest.raises(EvidenceError):
                client.submit_bundle(ASSETS / "hostile" / f"{name}.msgpack")
        assert client.submit_bundle(GOLDEN).bundle_digest
    kept = [path for path in store.rglob("*") if path.is_file() and path.suffix == ".msgpack"]
    assert len(kept) == 1
