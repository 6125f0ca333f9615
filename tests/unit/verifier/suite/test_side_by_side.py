"""Provers of one run work side by side: they overlap, one's failure loses nothing of another, and Ctrl-C ends all."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from fake_engine import fake_engine
from suite_world import CLOCK, FINISHED, TOML, make, opened, results, run

from fpforensics.common.access import Listen
from fpforensics.common.engines.base import Host
from fpforensics.common.errors import CancelledError, UnavailableError
from fpforensics.common.keys import Keyring, PrivateKey
from fpforensics.prover.service import ProverConfig, serve_prover
from fpforensics.prover.session import SessionPlan, run_session
from fpforensics.verifier.suite import run as running
from fpforensics.verifier.suite.journal import Entry, Journal, read_journal
from fpforensics.verifier.suite.left import Left, seconds_left
from fpforensics.verifier.suite.plan import lanes_of, plan_jobs, plan_replays
from fpforensics.verifier.suite.reading import parse_suite
from fpforensics.verifier.suite.run import StoppedError
from fpforensics.verifier.suite.stop import Stop
from fpforensics.verifier.suite.suite import run_suite

KEY = PrivateKey.from_seed(b"k" * 32)
PATIENCE = 60.0
Before = Callable[[SessionPlan, Callable[[], bool]], None]


@contextmanager
def provers(tiny: Path, **before: Before) -> Iterator[str]:
    """Provers by name, and the TOML of a suite that uses them; each session first does what ``before`` says."""
    tables = []
    with ExitStack() as stack:
        for name, act in before.items():

            def session(
                plan: SessionPlan,
                host: Any,
                key: PrivateKey,
                output: Path,
                progress: Any = None,
                cancelled: Any = None,
                act: Before = act,
            ) -> str:
                act(plan, cancelled)
                return run_session(plan, host, key, output, progress, cancelled, fake_engine)

            host = Host(models={"tiny": str(tiny)})
            config = ProverConfig(
                key=KEY, listen=Listen(address="127.0.0.1:0"), host=host, models=("tiny",), run=session
            )
            server = stack.enter_context(serve_prover(config))
            tables.append(f"[[prover]]\nname = '{name}'\nendpoint = '127.0.0.1:{server.port}'\n")
        yield TOML.replace("[references]", "".join([*tables, "[references]"]))


def finished(folder: Path) -> list[str]:
    return [each.job for each in read_journal(folder / "journal.jsonl") if each.event == "finished"]


def nothing(*_: Any) -> None:
    pass


def test_sessions_overlap(tiny: Path, tmp_path: Path) -> None:
    both = threading.Barrier(2)

    def meet(*_: Any) -> None:
        both.wait(PATIENCE)  # broken, and an error, unless the other prover works at the same time

    with provers(tiny, a=meet, b=meet) as toml:
        run(make(tmp_path / "run", tiny, toml, Keyring([KEY.public])))
    done = [name for name in finished(tmp_path / "run") if not name.startswith("replay:")]
    assert sorted(done) == sorted(f"{prover}.{name.partition('.')[2]}" for name in FINISHED for prover in "ab")
    assert not both.broken


def test_a_failure_loses_nothing_of_the_other(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    over, gone = threading.Event(), {"is": True}
    real = running._Run.lane

    def lane(self: Any, jobs: Any) -> None:
        real(self, jobs)
        if self.failures:
            over.set()

    def fail(*_: Any) -> None:
        if gone["is"]:
            raise UnavailableError("the machine is gone", "start it")

    def outlast(*_: Any) -> None:
        assert over.wait(PATIENCE)

    monkeypatch.setattr(running._Run, "lane", lane)
    folder = tmp_path / "run"
    with provers(tiny, a=outlast, b=fail) as toml:
        with pytest.raises(StoppedError, match=r"stopped at b\.baseline: the machine is gone"):
            run(make(folder, tiny, toml, Keyring([KEY.public])))
        assert finished(folder) == ["a.baseline"]  # what was under way is kept, and was the last
        kept = (folder / "bundles" / "a.baseline.msgpack").read_bytes()
        gone["is"] = False
        run(opened(folder))
    assert (folder / "bundles" / "a.baseline.msgpack").read_bytes() == kept
    with provers(tiny, a=nothing, b=nothing) as toml:
        run(make(tmp_path / "calm", tiny, toml, Keyring([KEY.public])))
    assert results(folder) == results(tmp_path / "calm")


def test_interrupted(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_work, ended = threading.Barrier(3), threading.Barrier(3)

    def work(_plan: SessionPlan, cancelled: Callable[[], bool]) -> None:
        at_work.wait(PATIENCE)
        while not cancelled():
            threading.Event().wait(0.01)
        ended.wait(PATIENCE)
        raise CancelledError("cancelled")

    def interrupt(_futures: Any) -> None:
        at_work.wait(PATIENCE)
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "wait", interrupt)
    with provers(tiny, a=work, b=work) as toml:
        setting = make(tmp_path / "run", tiny, toml, Keyring([KEY.public]))
        with pytest.raises(KeyboardInterrupt):
            run(setting)
        ended.wait(PATIENCE)  # both provers were told
    assert finished(tmp_path / "run") == []
    monkeypatch.undo()
    with Journal(setting.folder.journal):
        pass  # nobody holds it any more


def test_waiting_ends_with_the_run() -> None:
    stop, closed = Stop(), []
    with stop.closing(lambda: closed.append("before")):
        threading.Timer(0, stop.set).start()
        stop.wait(PATIENCE)
    assert stop()
    with stop.closing(lambda: closed.append("after")):
        pass
    assert closed[-1] == "after"


def test_provers_of_one_machine_wait_for_each_other() -> None:
    toml = "".join(
        f"[[prover]]\nname = '{name}'\nendpoint = '{endpoint}'\n"
        for name, endpoint in (
            ("a", "local"),
            ("b", "10.0.0.5:1"),
            ("c", "local"),
            ("d", "10.0.0.6:1"),
            ("e", "10.0.0.5:1"),
        )
    )
    jobs = plan_jobs(parse_suite(TOML.replace("[references]", f"{toml}[references]"), "x"))
    assert [list(dict.fromkeys(job.prover.name for job in lane)) for lane in lanes_of(jobs)] == [
        ["a", "c"],
        ["b", "e"],
        ["d"],
    ]


def test_journal_of_many_threads(tmp_path: Path) -> None:
    def bytewise(file: int, data: bytes) -> int:
        return os.write(file, data[:7])

    path = tmp_path / "journal.jsonl"
    with Journal(path, write=bytewise) as journal, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: journal.add(Entry(event="finished", job=f"job{number}")), range(200)))
        in_order = list(journal.latest())
    assert [each.job for each in read_journal(path)] == in_order
    assert len(in_order) == 200


def test_time_left() -> None:
    suite = parse_suite(TOML, "x")
    jobs = [job.id for job in plan_jobs(suite)]
    refused = "local.ep=2"
    assert jobs == [*FINISHED[:3], refused, FINISHED[3]]
    assert seconds_left(suite, {}) is None

    def done(job: str, seconds: float, *wall: float) -> Entry:
        return Entry(event="finished", job=job, seconds=seconds, wall_seconds=wall)

    ended = {jobs[0]: done(jobs[0], 10, 3, 5)}
    # Four sessions of 10 s; then five replays of 2 s to load, and 4 s for each bundle.
    sizes = [len(each.jobs) for each in plan_replays(suite)]
    assert seconds_left(suite, ended) == 4 * 10 + 5 * 2 + 4 * sum(sizes)
    # What is known to be skipped takes no time: neither its session, nor its replay, nor that of its bundle.
    known = {each.name: len(set(each.jobs) - {refused}) for each in plan_replays(suite) if each.name != "ep=2"}
    assert seconds_left(suite, ended, [refused, "replay:ep=2"]) == 3 * 10 + 4 * 2 + 4 * sum(known.values())
    ended |= {job: done(job, 10, 3, 5) for job in FINISHED[1:]}
    ended |= {refused: Entry(event="skipped", job=refused)}
    fewer = {each.name: len([job for job in each.jobs if job != refused]) for each in plan_replays(suite)}
    assert sum(fewer.values()) < sum(sizes)
    assert seconds_left(suite, ended) == 5 * 2 + 4 * sum(fewer.values())
    first, *others = fewer
    ended |= {f"replay:{first}": done(f"replay:{first}", 8.0 * (1 + fewer[first]))}
    ended |= {f"replay:{others[0]}": Entry(event="skipped", job=f"replay:{others[0]}")}
    assert seconds_left(suite, ended) == pytest.approx(sum(8.0 * (1 + fewer[name]) for name in others[1:]))


def test_time_left_of_provers_side_by_side() -> None:
    two = "".join(f"[[prover]]\nname = '{name}'\nendpoint = '10.0.0.5:{port}'\n" for port, name in enumerate("ab", 1))
    toml = TOML.replace("[references]", f"{two}[replay]\nenabled = false\n[references]")
    suite = parse_suite(toml, "x")
    ended = {
        name: Entry(event="finished", job=name, seconds=seconds)
        for name, seconds in (("a.baseline", 10.0), ("b.baseline", 100.0), ("b.attn=eager", 100.0))
    }
    assert seconds_left(suite, ended) == 300.0  # the slower one's three; the other's four take 40 s


def test_what_is_known_to_be_skipped_is_looked_up(tiny: Path, tmp_path: Path) -> None:
    setting = make(tmp_path / "run", tiny)
    with Journal(setting.folder.journal) as journal:
        left = Left(setting, journal)
        assert str(left) == ""
        ended = Entry(event="finished", job="local.baseline", seconds=1000, wall_seconds=(1, 1))
        journal.add(ended)
        counted = seconds_left(setting.suite, {ended.job: ended}, ["local.ep=2", "replay:ep=2"])
        assert counted is not None
        assert str(left) == f", about {counted / 60:.0f} min left"
        assert counted < (seconds_left(setting.suite, {ended.job: ended}) or 0.0) - 1000


def test_progress_says_what_and_how_long(tiny: Path, tmp_path: Path) -> None:
    said: list[str] = []
    run_suite(make(tmp_path / "run", tiny), lambda stage, _done, _total: said.append(stage), clock=CLOCK)
    assert any(each.startswith("attention: local.attn=eager (session 2 of 5, about ") for each in said)
    replays = [each for each in said if "(replay " in each]
    assert any(each.startswith("attention: attn=eager (replay 2 of 5, about ") for each in replays)
    assert all(" left): " in each for each in replays)
