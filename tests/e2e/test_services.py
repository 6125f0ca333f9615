"""The whole path as users run it: prover and verifier as processes, a session over gRPC, an auditor without torch."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
SESSION = ("--model", "tiny", "--references", "2", "--prompt-tokens", "64", "--new-tokens", "4", "--repetitions", "2")


def run(program: str, *arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(BIN / program), *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == code, done.stderr + done.stdout
    return done


@contextmanager
def serving(role: str, *arguments: object) -> Iterator[str]:
    """A server process; yields its address. It must end by itself when asked to."""
    command = [str(BIN / role), "serve", "--listen", "127.0.0.1:0", "--device", "cpu", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().split()[2]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    for name in ("prover", "verifier", "stranger"):
        run("prover", "keygen", folder / f"{name}.key")
    return folder


def test_prover_to_auditor(tmp_path: Path, keys: Path, tiny_llama: Path) -> None:
    model = ("--model-path", f"tiny={tiny_llama}")
    trust = ("--trust", keys / "prover.key.pub", "--store", tmp_path / "store")
    with (
        serving("prover", "--key", keys / "prover.key", *model) as prover,
        serving("verifier", "--key", keys / "verifier.key", *trust, *model) as verifier,
    ):
        bundle, verdict = tmp_path / "bundle.msgpack", tmp_path / "verdict.json"
        common = ("--prover", prover, "--key", keys / "prover.key.pub", "--output", bundle, *SESSION)
        server = ("--server", verifier, "--server-key", keys / "verifier.key.pub")
        page, picture = tmp_path / "report.html", tmp_path / "report.png"
        lineup = ("--lineup", "dtype=fp32", "--replay", "prefill")
        done = run(
            "verifier", "session", *common, *server, "--claim", "dtype=bf16", *lineup,
            "--verdict", verdict, "--html", page, "--png", picture, "--json",
        )  # fmt: skip
        assert json.loads(done.stdout)["verdict"] == "CONSISTENT"
        assert page.read_text().startswith("<!doctype html>")
        assert picture.read_bytes().startswith(b"\x89PNG")

        auditor = ("--server", verifier, "--key", keys / "verifier.key.pub")
        (line,) = run("verifier", "verdicts", "list", *auditor).stdout.splitlines()
        assert "CONSISTENT" in line
        assert "fresh" in line
        shown = run("verifier", "verdicts", "show", line.split()[1], *auditor).stdout
        assert "answered a fresh challenge" in shown
        watched = run("verifier", "verdicts", "watch", "--count", "1", *auditor).stdout
        assert watched.strip() == line.strip()
        run("verifier", "verdicts", "verify", verdict, "--key", keys / "verifier.key.pub")
        # Whoever trusts another key believes nothing, here as there.
        refused = run("verifier", "verdicts", "list", "--server", verifier, "--key", keys / "stranger.key.pub", code=4)
        assert refused.stderr.count("\n") == 1
        refused = run("verifier", "verdicts", "verify", verdict, "--key", keys / "stranger.key.pub", code=4)
        assert refused.stderr.count("\n") == 1

        # The same evidence, sent by the prover's side with a false claim.
        done = run("prover", "submit", bundle, *server, "--claim", "dtype=fp16", *lineup, code=1)
        assert "INCONSISTENT" in done.stdout
        assert len(run("verifier", "verdicts", "list", *auditor).stdout.splitlines()) == 2


def test_an_auditor_needs_no_torch(keys: Path, tmp_path: Path) -> None:
    """None of the auditor's commands, nor --help, imports torch."""
    code = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['transformers'] = None\n"  # any import of them fails
        "import fpforensics.verifier.auditor, fpforensics.verifier.cli.verdicts, fpforensics.common.inspect\n"
        "from fpforensics.verifier.cli import main\n"
        "main()\n"
    )
    for arguments in (
        ["--help"],
        ["verdicts", "--help"],
        ["inspect", str(Path(__file__).parents[1] / "assets/golden.msgpack")],
    ):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
