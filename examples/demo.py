"""The main job for real: two provers, a verifier and an auditor, as separate processes over gRPC.

The provers run on other kernels than the verifier, with SmolLM2-135M-Instruct. Both sign that they ran unquantized weights.
One is honest. The other lies (examples/lying_prover.py): it ran 4-bit weights, and nothing in its signed bundle says so. The
verifier replays both; an auditor, who holds only the verifier's public key, reads the verdicts. Leaves bundles, verdicts, heat
maps and HTML pages in demo-out/.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fpforensics.common.config import ExecutionConfig, parse_config
from fpforensics.common.engines.base import Host
from fpforensics.common.engines.remote import start_engine
from fpforensics.common.errors import Error
from fpforensics.common.evidence import Evidence
from fpforensics.common.keys import Keyring
from fpforensics.common.models import load_tokenizer, resolve_model
from fpforensics.common.prompts import build_references, read_documents
from fpforensics.common.signals import CapturePlan, Sampling
from fpforensics.verifier.intake import open_bundle
from fpforensics.verifier.replay import fingerprint

BIN = Path(sys.executable).parent
LIAR = Path(__file__).resolve().parent / "lying_prover.py"
OUT = Path("demo-out")
# Most different first. A CPU without AVX-512 ignores nothing here: it still has AVX2 to give up.
OTHER_KERNELS: tuple[dict[str, str], ...] = (
    {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    {"OMP_NUM_THREADS": "1"},
)
EACH_STAGE = {"FPFORENSICS_PROGRESS_SECONDS": "0"}


@dataclass(frozen=True)
class Scene:
    """Who runs where, and how each computes."""

    prover: Host
    verifier: Host
    matmul: str
    said: str


def main() -> int:
    """Run the demo; 0 if the honest prover's claim is CONSISTENT and the lying one's INCONSISTENT."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--references", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=160)
    parser.add_argument("--new-tokens", type=int, default=12)
    args = parser.parse_args()
    started = time.monotonic()
    say("this takes 4 to 6 minutes on two cores; what is happening is said as it happens")
    # Several processes share these cores: threads that spin while they wait would starve each other. No bit depends on it.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    say("keys: one for the provider, who runs both provers, and one for the verifier")
    for name in ("prover", "verifier"):
        run("prover", "keygen", OUT / f"{name}.key")
    say("looking for two sets of kernels that round differently")
    scene = set_scene()
    say(scene.said)
    options = (
        "--references", args.references, "--prompt-tokens", args.prompt_tokens, "--new-tokens", args.new_tokens,
        "--lineup", "attn=eager", "--lineup", "attn=sdpa", "--lineup", "quant=bnb-nf4",
    )  # fmt: skip
    with serving("verifier", [BIN / "verifier", "serve"], scene.verifier, verifier_options(scene.matmul)) as verifier:
        say("\n1 of 2, honest: unquantized weights run, and the signed bundle says so")
        with serving("prover", [BIN / "prover", "serve"], scene.prover) as prover:
            honest = ask(prover, verifier, "honest", f"matmul={scene.matmul}", *options)
        say("\n2 of 2, a lie: 4-bit weights run, and the signed bundle says that they were not quantized")
        with serving("lying-prover", [sys.executable, LIAR], scene.prover) as prover:
            lie = ask(prover, verifier, "lie", f"matmul={scene.matmul}", *options)
        say("\nthe auditor, who trusts the verifier's public key and nothing else:")
        say(run("verifier", "verdicts", "list", "--server", verifier, "--key", OUT / "verifier.key.pub"))
    ok = honest == "CONSISTENT" and lie == "INCONSISTENT"
    seconds = time.monotonic() - started
    say(f"\n{'done' if ok else 'NOT AS EXPECTED'} in {seconds:.0f} s: see {OUT}/honest.html, {OUT}/lie.html, …")
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
def serving(role: str, command: list[object], host: Host, options: tuple[object, ...] = ()) -> Iterator[str]:
    """A server process of our own on a free loopback port; yields its address."""
    key = OUT / ("verifier.key" if role == "verifier" else "prover.key")
    command = [*command, "--key", key, "--listen", "127.0.0.1:0", "--device", host.device, *options]
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


def verifier_options(matmul: str) -> tuple[object, ...]:
    """How the verifier computes its replays, what it keeps where, and whom it trusts."""
    return ("--using", f"matmul={matmul}", "--store", OUT / "store", "--trust", OUT / "prover.key.pub")


def ask(prover: str, verifier: str, name: str, config: str, *options: object) -> str:
    """One session through both services; prints what was signed and the verdict, and returns its outcome."""
    said = run(
        "verifier", "session", "--prover", prover, "--server", verifier, "--server-key", OUT / "verifier.key.pub",
        "--key", OUT / "prover.key.pub", "--same-prompts", "--config", config, "--claim", "quant=none", "--replay", "prefill",
        "--output", OUT / f"{name}.msgpack", "--verdict", OUT / f"{name}.verdict.json",
        "--html", OUT / f"{name}.html", "--png", OUT / f"{name}.png", "--json", *options,
        accepted=(0, 1, 3),
    )  # fmt: skip
    result = json.loads(said)
    with open_bundle(OUT / f"{name}.msgpack", Keyring.from_paths([OUT / "prover.key.pub"])) as bundle:
        say(f"the bundle, signed by the provider: {what_it_says(bundle.evidence)}")
    row = result["rows"][0]
    say(f"the verdict on quant=none: {result['verdict']}")
    for reason in row["reasons"]:
        say(f"  - {reason}")
    for score in row["scores"]:
        floors = "no usable noise floor" if score["floors"] is None else f"{score['floors']:10.2f} noise floors"
        say(f"  {score['id']:<40} {floors}  {'claim true' if score['fits'] else 'claim false'}")
    return str(result["verdict"])


def what_it_says(evidence: Evidence) -> str:
    """What the manifest declares about quantization and weights."""
    (row,) = evidence.rows
    kernel = row.facts.quantization_kernel or "none"
    weights = row.facts.model.weights_digest[:19]
    return f"quant={row.config.quantization}, kernel for quantized weights: {kernel}, weights {weights}…"


def run(program: str, *args: object, accepted: tuple[int, ...] = (0,)) -> str:
    """Run one of our commands as a user would; what it says on stderr is passed on as it comes. Returns its output."""
    with tempfile.TemporaryFile("w+") as output:
        with subprocess.Popen(
            [BIN / program, *map(str, args)],
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | EACH_STAGE,
        ) as process:
            assert process.stderr is not None
            for line in process.stderr:
                say(f"  {line.rstrip()}")
        if process.returncode not in accepted:
            raise SystemExit(f"{program} {args[0]} ended with {process.returncode}")
        output.seek(0)
        return output.read().rstrip()


def say(text: str) -> None:
    """A line at once, also into a pipe."""
    print(text, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Error as error:
        sys.exit(f"error: {error.diagnostics()}")
