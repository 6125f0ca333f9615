"""What disturbs a run: lost connections, full disks, configs that differ from themselves, provers that lie."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_engine import drifting_engine, fake_engine
from rpc_world import STRANGER_KEY
from suite_world import CLOCK, FINISHED, TOML, Starts, make, opened, results, run

from fpforensics.common.errors import EvidenceError, ReplayError, UnavailableError, UsageError
from fpforensics.common.keys import Keyring, PrivateKey
from fpforensics.prover.service import ProverConfig, serve_prover
from fpforensics.prover.session import SessionPlan, run_session
from fpforensics.verifier.suite import run as running
from fpforensics.verifier.suite import sessions
from fpforensics.verifier.suite.folder import Folder
from fpforensics.verifier.suite.journal import Entry, Journal, read_journal
from fpforensics.verifier.suite.run import StoppedError
from fpforensics.verifier.suite.suite import run_suite

KEY = PrivateKey.from_seed(b"k" * 32)


def states(folder: Path) -> dict[str, tuple[str, str]]:
    return {each.job: (each.event, each.reason) for each in read_journal(folder / "journal.jsonl")}


def test_sigkill_and_resume(unbroken: Path, tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    make(folder, tiny)
    script = (
        "import os, signal, sys; from pathlib import Path; from suite_world import Starts, opened, run\n"
        "run(opened(Path(sys.argv[1]), start=Starts(3, lambda: os.kill(os.getpid(), signal.SIGKILL))))"
    )
    path = os.pathsep.join([str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, str(folder)], env={**os.environ, "PYTHONPATH": path}, capture_output=True
    )
    assert done.returncode == -signal.SIGKILL
    finished = [each.job for each in read_journal(folder / "journal.jsonl") if each.event == "finished"]
    assert finished == ["local.baseline", "local.attn=eager"]
    run(opened(folder))
    finished = [each.job for each in read_journal(folder / "journal.jsonl") if each.event == "finished"]
    assert len(finished) == len(set(finished))
    assert results(folder) == results(unbroken)


def test_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.add(Entry(event="finished", job="a"))
    with path.open("ab") as file:
        file.write(b'{"event":"fini')
    with Journal(path) as journal:
        assert list(journal.latest()) == ["a"]
        journal.add(Entry(event="finished", job="b"))
    assert [each.job for each in read_journal(path)] == ["a", "b"]


def test_changed_journal(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_text('{"event":"finished","job":"a"}\nnonsense\n')
    with pytest.raises(EvidenceError, match="line 2"):
        Journal(tmp_path / "journal.jsonl")


def test_one_run_at_a_time(tiny: Path, tmp_path: Path) -> None:
    setting = make(tmp_path / "run", tiny)
    with Journal(setting.folder.journal), pytest.raises(Exception, match="in use by another run"):
        run(setting)


def test_journal_on_a_full_disk(tmp_path: Path) -> None:
    def half(file: int, data: bytes) -> int:
        if len(data) > 10:
            return os.write(file, data[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.add(Entry(event="finished", job="a"))
    before = path.read_bytes()
    with Journal(path, write=half) as journal, pytest.raises(OSError, match="No space"):
        journal.add(Entry(event="finished", job="b" * 12))
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["accept", "replay"])
def test_full_disk(unbroken: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = tmp_path / "run"
    setting = make(folder, tiny)
    monkeypatch.setattr(Folder, name, full)
    with pytest.raises(StoppedError) as caught:
        run(setting)
    assert "verifier suite resume" in caught.value.hint
    assert "No space left" in caught.value.message
    monkeypatch.undo()
    assert not list((folder / ".incoming").iterdir())
    assert all(path.stem in FINISHED for path in (folder / "bundles").iterdir())
    run(opened(folder))
    assert results(folder) == results(unbroken)


def test_a_bundle_that_cannot_be_written_is_no_skip(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> str:
        raise UsageError(f"cannot write bundle: {os.strerror(errno.ENOSPC)}", "free space or choose another folder")

    monkeypatch.setattr(sessions, "run_session", full)
    with pytest.raises(StoppedError):
        run(make(tmp_path / "run", tiny))
    assert states(tmp_path / "run")["local.baseline"][0] == "started"


def test_lost_connection_is_tried_again_then_stops(
    unbroken: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    lost = {"left": 2}
    real = running.fetch

    def flaky(*arguments: Any) -> Any:
        if lost["left"]:
            lost["left"] -= 1
            raise UnavailableError("the prover is gone", "is it running?")
        return real(*arguments)

    monkeypatch.setattr(running, "fetch", flaky)
    setting = make(tmp_path / "run", tiny)
    clock = running.Clock(wait=waits.append)
    run_suite(setting, clock=clock)
    assert waits == [2.0, 4.0]
    assert results(tmp_path / "run") == results(unbroken)

    lost["left"] = 1000
    second = make(tmp_path / "second", tiny)
    waits.clear()
    with pytest.raises(StoppedError, match="the prover is gone"):
        run_suite(second, clock=clock)
    assert len(waits) == running.RETRIES
    monkeypatch.undo()
    run(opened(tmp_path / "second"))
    assert results(tmp_path / "second") == results(unbroken)


@pytest.mark.parametrize("reload", ["", "reload = true\n"])
def test_bit_exact_gate(tiny: Path, tmp_path: Path, reload: str) -> None:
    toml = TOML.replace('values = ["attn=eager"]', f'{reload}values = ["attn=eager", "attn=sdpa_math"]')
    run(make(tmp_path / "run", tiny, toml, start=Starts(engine=drifting_engine)))
    found = states(tmp_path / "run")
    event, reason = found["local.attn=eager"]
    assert event == "stopped"
    assert "differs from the first at ref_0, prefill, position" in reason
    assert found["local.attn=sdpa_math"] == ("blocked", f"attention stopped: {reason}")
    assert found["local.emulate_tp=2"][0] == "finished"  # other experiments go on


def test_known_to_be_nondeterministic(tiny: Path, tmp_path: Path) -> None:
    toml = TOML.replace('values = ["attn=eager"]', 'nondeterministic = true\nvalues = ["attn=eager"]')
    run(make(tmp_path / "run", tiny, toml, start=Starts(engine=drifting_engine)))
    assert states(tmp_path / "run")["local.attn=eager"][0] == "finished"
    runs = json.loads((tmp_path / "run" / "attention_experiment.json").read_text())["runs"]
    said = {each["config_id"]: each["repetitions"]["bit_identical"] for each in runs}
    assert said == {"local_baseline": True, "local_attn=eager": False}


def test_failing_work_is_tried_again_at_resume(tiny: Path, tmp_path: Path) -> None:
    def start(config: Any, host: Any, cancelled: Callable[[], bool]) -> Any:
        if config.attention == "eager":
            raise ReplayError("out of memory", "use a larger machine")
        return fake_engine(config, host, cancelled)

    folder = tmp_path / "run"
    run(make(folder, tiny, start=Starts(engine=start)))
    assert states(folder)["local.attn=eager"] == ("skipped", "out of memory (use a larger machine)")
    assert "out of memory" in (folder / "report.html").read_text()
    run(opened(folder))
    assert states(folder)["local.attn=eager"][0] == "skipped"
    run(opened(folder), again=True)
    assert states(folder)["local.attn=eager"][0] == "finished"


def test_without_its_baseline_nothing_runs(tiny: Path, tmp_path: Path) -> None:
    def start(config: Any, host: Any, cancelled: Callable[[], bool]) -> Any:
        raise ReplayError("no such device", "")

    run(make(tmp_path / "run", tiny, start=Starts(engine=start)))
    found = states(tmp_path / "run")
    assert found["local.baseline"] == ("skipped", "no such device")
    assert found["local.attn=eager"] == ("blocked", "the baseline of attention did not run: no such device")
    before = (tmp_path / "run" / "journal.jsonl").read_bytes()
    run(opened(tmp_path / "run"))
    assert (tmp_path / "run" / "journal.jsonl").read_bytes() == before
    run(opened(tmp_path / "run"), again=True)  # what waited for the baseline runs with it
    assert {name for name, (event, _) in states(tmp_path / "run").items() if event == "finished"} >= set(FINISHED)


def session(
    plan: SessionPlan, host: Any, key: PrivateKey, output: Path, progress: Any = None, cancelled: Any = lambda: False
) -> str:
    return run_session(plan, host, key, output, progress, cancelled, fake_engine)


def test_remote_prover(unbroken: Path, tiny: Path, tmp_path: Path) -> None:
    from fpforensics.common.access import Listen
    from fpforensics.common.engines.base import Host

    config = ProverConfig(
        key=KEY,
        listen=Listen(address="127.0.0.1:0"),
        host=Host(models={"tiny": str(tiny)}),
        models=("tiny",),
        run=session,
    )
    with serve_prover(config) as server:
        toml = TOML.replace(
            "[references]", f"[[prover]]\nname = 'local'\nendpoint = '127.0.0.1:{server.port}'\n[references]"
        )
        run(make(tmp_path / "run", tiny, toml, Keyring([KEY.public])))
        with pytest.raises(EvidenceError, match="not trusted"):
            run(make(tmp_path / "other", tiny, toml, Keyring([STRANGER_KEY.public])))
    assert not list((tmp_path / "other" / "bundles").iterdir())
    ours, theirs = results(tmp_path / "run"), results(unbroken)
    assert ours == theirs
    assert CLOCK.now() > 0
