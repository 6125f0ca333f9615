"""The whole path as users run it: prover and verifier as processes, a session over gRPC, an auditor without torch."""

from __future__ import annotations

import json
import re
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from fpforensics.common.config import ExecutionConfig
from fpforensics.common.engines.base import Host
from fpforensics.common.errors import UnavailableError
from fpforensics.common.keys import Keyring, load_private
from fpforensics.common.signals import CapturePlan, Sampling
from fpforensics.prover.client import ProverClient
from fpforensics.prover.session import SessionPlan, run_session
from fpforensics.verifier.intake import open_bundle

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
        assert run("verifier", "verdicts", "show", line.split()[1][:6], *auditor).stdout == shown
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


def test_a_prover_that_is_interrupted_says_so_and_leaves_no_worker(
    tmp_path: Path, keys: Path, tiny_llama: Path
) -> None:
    plan = SessionPlan(
        configs=(ExecutionConfig(model="tiny"),),
        references=256,
        prompt_tokens=32,
        sampling=Sampling(max_new_tokens=64),
        capture=CapturePlan(layers=("1",), prefill_positions=1),
        repetitions=20,
    )
    command = [BIN / "prover", "serve", "--key", keys / "prover.key", "--listen", "127.0.0.1:0", "--device", "cpu"]
    command += ["--model-path", f"tiny={tiny_llama}"]
    generating = threading.Event()

    def saw(stage: str, _done: int, _total: int) -> None:
        if "repetition" in stage:
            generating.set()

    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            address = process.stdout.readline().split()[2]
            with ProverClient(address) as client, ThreadPoolExecutor(1) as pool:
                session = pool.submit(client.run_session, plan, tmp_path / "never", report=saw)
                assert generating.wait(60)
                workers = _children(process.pid)
                process.send_signal(signal.SIGINT)
                # Told why, and so before the grace period was over: then gRPC would have ended the call.
                with pytest.raises(UnavailableError, match="the prover is stopping"):
                    session.result(timeout=30)
            assert process.wait(30) == 0
            said = process.stderr.read().splitlines()
        finally:
            process.kill()
    assert workers
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    assert said[0] == "stopping"
    (line,) = said[1:]
    assert re.match(r"\S+Z session peer=127\.0\.0\.1:\d+ configs=attn=sdpa,dtype=bf16 outcome=aborted ", line)


def _children(pid: int) -> list[int]:
    """Process ids of a process's children."""
    if not Path("/proc/self/stat").exists():
        pytest.skip("processes are counted in /proc")
    stats = {path.name: path / "stat" for path in Path("/proc").iterdir() if path.name.isdigit()}
    parents: dict[int, int] = {}
    for name, stat in stats.items():
        try:
            parents[int(name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # ended meanwhile
    return [child for child, parent in parents.items() if parent == pid]


def test_nothing_that_the_demos_liar_signs_says_what_it_ran(tmp_path: Path, keys: Path, tiny_llama: Path) -> None:
    lying = runpy.run_path(str(Path(__file__).parents[2] / "examples/lying_prover.py"))["run_lying"]
    plan = SessionPlan(
        configs=(ExecutionConfig(model="tiny"),),
        references=1,
        prompt_tokens=32,
        sampling=Sampling(max_new_tokens=4),
        repetitions=1,
    )
    host = Host(device="cpu", models={"tiny": str(tiny_llama)})
    rows = []
    for name, run_it in (("honest", run_session), ("lie", lying)):
        run_it(plan, host, load_private(keys / "prover.key"), tmp_path / name)
        with open_bundle(tmp_path / name, Keyring.from_paths([keys / "prover.key.pub"])) as bundle:
            rows.append(bundle.evidence.rows[0])
    honest, lie = rows
    assert (lie.config_id, lie.config, lie.facts) == (honest.config_id, honest.config, honest.facts)
    assert lie.config.quantization == "none"
    assert lie.facts.quantization_kernel == ""
    assert lie.traces[0].prefill["hidden_states/1"] != honest.traces[0].prefill["hidden_states/1"]


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
