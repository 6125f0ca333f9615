"""The main job for real: two provers' claims, a verifier and an auditor, as separate processes over gRPC.

A prover on other kernels than the verifier's generates with SmolLM2-135M-Instruct. One claim is honest and one is not: the second
run used 4-bit weights, and its provider claims that it did not. The verifier replays both; an auditor, who holds only the verifier's public key, reads
the verdicts. Leaves bundles, verdicts, a heat map and an HTML page in demo-out/.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fpforensics.common.config import ExecutionConfig, parse_config
from fpforensics.common.engines.base import Host
from fpforensics.common.engines.remote import start_engine
from fpforensics.common.errors import Error
from fpforensics.common.models import load_tokenizer, resolve_model
from fpforensics.common.prompts import build_references, read_documents
from fpforensics.common.signals import CapturePlan, Sampling
from fpforensics.verifier.replay import fingerprint

BIN = Path(sys.executable).parent
OUT = Path("demo-out")
# Most different first. A CPU without AVX-512 ignores nothing here: it still has AVX2 to give up.
OTHER_KERNELS: tuple[dict[str, str], ...] = (
    {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    {"OMP_NUM_THREADS": "1"},
)


@dataclass(frozen=True)
class Scene:
    """Who runs where, and how each computes."""

    prover: Host
    verifier: Host
    matmul: str
    said: str


def main() -> int:
    """Run the demo; 0 if the honest claim is CONSISTENT and the false one INCONSISTENT."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--references", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=160)
    parser.add_argument("--new-tokens", type=int, default=12)
    args = parser.parse_args()
    started = time.monotonic()
    # Several processes share these cores: threads that spin while they wait would starve each other. No bit depends on it.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    say("keys: one for the prover, one for the verifier")
    for name in ("prover", "verifier"):
        run("prover", "keygen", OUT / f"{name}.key")
    scene = set_scene()
    say(scene.said)
    with (
        serving("prover", scene.prover, scene.matmul) as prover,
        serving("verifier", scene.verifier, scene.matmul) as verifier,
    ):
        session = (
            "--references",
            args.references,
            "--prompt-tokens",
            args.prompt_tokens,
            "--new-tokens",
            args.new_tokens,
        )
        common = (*session, "--lineup", "attn=eager", "--lineup", "attn=sdpa", "--lineup", "quant=bnb-nf4")
        say("\nhonest: bf16 weights, claimed as such")
        honest = ask(prover, verifier, "honest", f"matmul={scene.matmul}", *common)
        say("\nfalse: 4-bit weights, claimed to be unquantized")
        false = ask(prover, verifier, "false", "quant=bnb-nf4", *common)
        say("\nthe auditor, who trusts the verifier's public key and nothing else:")
        print(run("verifier", "verdicts", "list", "--server", verifier, "--key", OUT / "verifier.key.pub").stdout)
    ok = honest == "CONSISTENT" and false == "INCONSISTENT"
    say(
        f"{'done' if ok else 'NOT AS EXPECTED'} in {time.monotonic() - started:.0f} s: {OUT}/honest.html, {OUT}/honest.png, …"
    )
    return 0 if ok else 1


def set_scene() -> Scene:
    """GPU against CPU where there is a GPU; else find, by measuring, CPU kernels that round differently."""
    import torch

    if torch.cuda.is_available():
        said = f"prover on {torch.cuda.get_device_name(0)}, verifier on the CPU: different hardware"
        return Scene(Host(device="cuda"), Host(device="cpu"), "native", said)
    ours = probe({})
    for env in OTHER_KERNELS:
        theirs = probe(env)
        named = ", ".join(f"{name}={value}" for name, value in env.items())
        if theirs[0] != ours[0]:
            said = (
                f"one CPU, two sets of kernels: the verifier's {ours[1]}, the prover's {theirs[1]} ({named}).\n"
                f"measured: the same config on the same prompt gives other bits ({ours[0][:12]}… and {theirs[0][:12]}…)"
            )
            return Scene(Host(device="cpu", env=env), Host(device="cpu"), "fp32-rounded", said)
        say(f"{named}: same bits as without, looking further")
    raise SystemExit("no setting changes this CPU's bits: prover and verifier would share their rounding")


def probe(env: Mapping[str, str]) -> tuple[str, str]:
    """(fingerprint of a short trace, instruction set) under ``env``."""
    config = parse_config("matmul=fp32-rounded", ExecutionConfig())
    tokenizer = load_tokenizer(resolve_model(config.model).path)
    references = build_references(read_documents(["builtin"]), tokenizer, count=1, prompt_tokens=64)
    with start_engine(config, Host(device="cpu", env=dict(env))) as engine:
        traces = engine.generate(references, Sampling(max_new_tokens=4), CapturePlan())
        numerics = engine.facts().numerics
    return fingerprint(traces), numerics.get("cpu_capability", "?")


@contextmanager
def serving(role: str, host: Host, matmul: str) -> Iterator[str]:
    """A server process of our own on a free loopback port; yields its address."""
    command = [BIN / role, "serve", "--key", OUT / f"{role}.key", "--listen", "127.0.0.1:0", "--device", host.device]
    if role == "verifier":
        command += ["--using", f"matmul={matmul}"]
        command += ["--store", OUT / "store", "--trust", OUT / "prover.key.pub"]
    for name, value in host.env.items():
        command += ["--env", f"{name}={value}"]
    with (OUT / f"{role}.log").open("w") as log:
        process = subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ | host.env
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("listening on "):
            raise SystemExit(f"{role} did not start, see {OUT}/{role}.log: {line}")
        address = line.split()[2]
        say(f"{role} serves on {address} (pid {process.pid})")
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def ask(prover: str, verifier: str, name: str, config: str, *options: object) -> str:
    """One session through both services; prints the verdict and returns its outcome."""
    done = run(
        "verifier", "session", "--prover", prover, "--server", verifier, "--server-key", OUT / "verifier.key.pub",
        "--key", OUT / "prover.key.pub", "--config", config, "--claim", "quant=none", "--replay", "prefill",
        "--output", OUT / f"{name}.msgpack", "--verdict", OUT / f"{name}.verdict.json",
        "--html", OUT / f"{name}.html", "--png", OUT / f"{name}.png", "--json", *options,
        accepted=(0, 1, 3),
    )  # fmt: skip
    result = json.loads(done.stdout)
    row = result["rows"][0]
    print(f"claim quant=none: {result['verdict']}")
    for reason in row["reasons"]:
        print(f"  - {reason}")
    for score in row["scores"]:
        print(f"  {score['id']:<40} {score['floors']:10.2f} noise floors  {'fits' if score['fits'] else 'contradicts'}")
    return str(result["verdict"])


def run(program: str, *args: object, accepted: tuple[int, ...] = (0,)) -> subprocess.CompletedProcess[str]:
    """Run one of our commands as a user would."""
    done = subprocess.run([BIN / program, *map(str, args)], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in accepted:
        raise SystemExit(f"{program} {args[0]} ended with {done.returncode}")
    return done


def say(text: str) -> None:
    """A line at once, also into a pipe."""
    print(text, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Error as error:
        sys.exit(f"error: {error.diagnostics()}")
