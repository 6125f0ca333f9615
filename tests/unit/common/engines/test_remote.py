"""Workers: the same results as in process, and every way to die comes back as one clear error with nothing left behind."""

from __future__ import annotations

import os
import select
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from engine_runs import differences, forcings, references

from fpforensics.common.config import parse_config
from fpforensics.common.engines import open_engine, remote
from fpforensics.common.engines.base import Host
from fpforensics.common.engines.remote import start_engine
from fpforensics.common.errors import CancelledError, MissingDependencyError, ReplayError, UsageError
from fpforensics.common.signals import CapturePlan, Sampling

pytest.importorskip("transformers", reason="pip install '.[hf]'")

CONFIG = parse_config("model=tiny")
PLAN = CapturePlan(layers=("1", "last"), prefill_positions=3, top_k=5)
SHORT, LONG = Sampling(max_new_tokens=4), Sampling(max_new_tokens=4000)


@pytest.fixture
def host(tiny_llama: Path) -> Host:
    return Host(device="cpu", models={"tiny": str(tiny_llama)}, env={"OMP_NUM_THREADS": "1"})


def interpreter(folder: Path, script: str) -> str:
    """Another interpreter: a script that does something and becomes ours, or does not."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def gone(pid: int) -> bool:
    """Whether the process ends within ten seconds (or has)."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([handle], [], [], 10)[0])
    finally:
        os.close(handle)


def test_a_worker_does_what_the_engine_does_in_process(host: Host) -> None:
    import torch

    given = references()
    seen: list[tuple[int, int]] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        inside = open_engine(CONFIG, host).generate(given, SHORT, PLAN)
    finally:
        torch.set_num_threads(threads)
    with start_engine(CONFIG, host) as engine:
        traces = engine.generate(given, SHORT, PLAN, lambda done, total: seen.append((done, total)))
        assert differences(traces, inside) == []
        assert differences(traces, engine.teacher_force(forcings(given, traces), PLAN, "decode")) == []
        assert engine.facts().numerics["threads"] == "1"
        assert engine.config.weights_digest.startswith("sha256:")
        # an error of ours crosses as itself and leaves the worker usable
        with pytest.raises(UsageError, match="top_k=0"):
            engine.generate(given, SHORT, CapturePlan(top_k=0))
        assert differences(traces, engine.generate(given, SHORT, PLAN)) == []
        pid = engine.pid
    assert engine._process.returncode == 0  # it was asked, not killed
    assert seen == [(1, 2), (2, 2)]
    assert gone(pid)
    engine.close()
    with pytest.raises(ReplayError, match="has ended"):
        engine.facts()


def test_a_worker_that_hangs_is_killed_on_close(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_CLOSE_SECONDS", 0.2)
    engine = start_engine(CONFIG, host)
    os.kill(engine.pid, signal.SIGSTOP)
    engine.close()
    assert gone(engine.pid)
    engine.close()


def test_errors_while_loading_come_from_start_engine(host: Host) -> None:
    with pytest.raises(UsageError, match="tp=2"):
        start_engine(parse_config("model=tiny,tp=2"), host)
    with pytest.raises(UsageError, match="attn=sdpa is not one of backend vllm's"):
        start_engine(parse_config("model=tiny,backend=vllm,attn=sdpa"), host)


def test_a_worker_killed_in_the_middle_names_the_signal(host: Host) -> None:
    engine = start_engine(CONFIG, host)
    with pytest.raises(ReplayError, match="killed by SIGKILL"):
        engine.generate(
            references(9), Sampling(max_new_tokens=64), PLAN, lambda *_: os.kill(engine.pid, signal.SIGKILL)
        )
    assert gone(engine.pid)
    engine.close()


def test_a_worker_that_ends_by_itself_is_quoted(tmp_path: Path, host: Host) -> None:
    python = interpreter(tmp_path, "echo 'the dog ate my driver' >&2; exit 3")
    with pytest.raises(ReplayError) as failed:
        start_engine(CONFIG, Host(device="cpu", python=python, models=host.models))
    assert failed.value.message == "the engine's worker ended with status 3"
    assert "the dog ate my driver" in failed.value.hint


def test_an_interpreter_that_is_not_there(host: Host) -> None:
    with pytest.raises(ReplayError, match="cannot start the interpreter '/nonexistent/python'") as failed:
        start_engine(CONFIG, Host(python="/nonexistent/python"))
    assert "--python" in failed.value.hint


def test_an_interpreter_without_fpforensics_is_told_how_to_get_it(tmp_path: Path) -> None:
    # -S leaves out site-packages: a bare interpreter
    python = interpreter(tmp_path, f'exec "{sys.executable}" -S "$@"')
    with pytest.raises(MissingDependencyError, match="fpforensics") as failed:
        start_engine(CONFIG, Host(python=python))
    assert "pip install '.[hf]'" in failed.value.hint


def test_running_out_of_memory_says_so(tmp_path: Path, host: Host) -> None:
    python = interpreter(tmp_path, f'ulimit -v 8000000\nexec "{sys.executable}" "$@"')
    limited = Host(device="cpu", python=python, models=host.models, env=host.env)
    with (
        start_engine(parse_config("model=tiny,attn=eager,batch=100,dtype=fp32"), limited) as engine,
        pytest.raises(ReplayError, match="out of memory on cpu"),
    ):
        engine.generate(references(1, length=2000), SHORT, PLAN)


def test_cancelling_a_run_kills_the_worker(host: Host) -> None:
    cancel: list[bool] = []
    engine = start_engine(CONFIG, host, lambda: bool(cancel))
    first, second = references(2)
    with pytest.raises(CancelledError):
        # the second reference would take minutes
        engine.generate([first], SHORT, PLAN, lambda *_: cancel.append(True))
        engine.generate([second], LONG, PLAN)
    assert gone(engine.pid)
    with pytest.raises(ReplayError, match="has ended"):
        engine.facts()


def test_cancelling_while_loading(host: Host) -> None:
    with pytest.raises(CancelledError):
        start_engine(CONFIG, host, lambda: True)


def test_an_error_in_the_callers_progress_ends_the_worker(host: Host) -> None:
    def fail(*_: int) -> None:
        raise KeyboardInterrupt

    engine = start_engine(CONFIG, host)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(references(), SHORT, PLAN, fail)
    assert gone(engine.pid)


def test_a_worker_does_not_outlive_its_parent(tiny_llama: Path) -> None:
    """The parent dies in the middle of a run, without a chance to say goodbye."""
    script = f"""
import os, threading
from engine_runs import references
from fpforensics.common.config import parse_config
from fpforensics.common.engines.base import Host
from fpforensics.common.engines.remote import start_engine
from fpforensics.common.signals import CapturePlan, Sampling
engine = start_engine(parse_config("model=tiny"), Host(device="cpu", models={{"tiny": {str(tiny_llama)!r}}}))
def die(done, total):
    print(engine.pid, flush=True)
    os._exit(0)
engine.generate(references(2), Sampling(max_new_tokens=300), CapturePlan(), die)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert gone(int(done.stdout))


def test_the_folder_one_stands_in_shadows_nothing(tmp_path: Path, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "msgspec.py").write_text("raise SystemExit('imported from the current folder')")
    monkeypatch.chdir(tmp_path)
    with start_engine(CONFIG, host) as engine:
        assert engine.facts().device == "cpu"
