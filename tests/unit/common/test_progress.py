"""Long work speaks up in time, on a terminal and without one; quick work and quiet commands say nothing."""

from __future__ import annotations

import io
import queue
import sys
import threading
from typing import Any

import click
import pytest
from rich.console import Console

from fpforensics.common import progress
from fpforensics.common.cli import progress_bar

LATER = 3600.0


def test_a_line_for_each_stage_with_the_newest_count() -> None:
    said: queue.Queue[str] = queue.Queue()
    with progress.lines(said.put, after=0, every=0) as report:
        assert said.get(timeout=60).endswith("s] starting")  # without any report
        report("loading", 0, 0)
        assert said.get(timeout=60).endswith("s] loading")
        for done in range(50):
            report("loading", done, 50)
        report("replay", 3, 9)
        assert said.get(timeout=60).endswith("s] replay (3 of 9)")
    assert said.empty()


def test_quick_work_prints_no_line() -> None:
    said: list[str] = []
    with progress.lines(said.append, after=LATER) as report:
        report("loading", 0, 1)
    assert said == []


def test_lines_are_rare() -> None:
    said: queue.Queue[str] = queue.Queue()
    with progress.lines(said.put, after=0, every=LATER) as report:
        report("loading", 0, 100)
        while not said.get(timeout=60).endswith("] loading (0 of 100)"):
            pass  # the thread may have begun before the first report
        for number in range(100):
            report(f"stage {number}", number, 100)
    assert said.empty()


def test_after_a_while_only_the_newest_stage_is_said() -> None:
    said: queue.Queue[str] = queue.Queue()
    with progress.lines(said.put, after=0.2, every=LATER) as report:
        for number in range(100):
            report(f"stage {number}", number, 100)
        assert said.get(timeout=60).endswith("] stage 99 (99 of 100)")


def test_what_another_machine_calls_its_stage_is_made_printable_and_cut() -> None:
    said: queue.Queue[str] = queue.Queue()
    with progress.lines(said.put, after=0, every=0) as report:
        said.get(timeout=60)
        report("\x1b[2Jgone\n" + "x" * 10_000, 0, 0)
        line = said.get(timeout=60)
    assert line.isprintable()
    assert len(line) < 200


def test_an_error_passes_and_ends_the_thread() -> None:
    said: list[str] = []
    with pytest.raises(ZeroDivisionError), progress.lines(said.append, after=LATER):
        _ = 1 / 0
    assert said == []


def terminal() -> tuple[Console, io.StringIO]:
    written = io.StringIO()
    return Console(file=written, force_terminal=True, width=100), written


def test_a_bar_appears_without_a_report_and_then_shows_what_happens() -> None:
    console, written = terminal()
    with progress.bar(console, after=0) as report:
        _until(written, "starting")
        report("[bold]replay[/]", 3, 9)  # no markup: it may come from another machine
        _until(written, "[bold]replay[/]")
        _until(written, "3/9")


def test_quick_work_shows_no_bar() -> None:
    console, written = terminal()
    with progress.bar(console, after=LATER) as report:
        report("loading", 0, 1)
    assert written.getvalue() == ""


def _until(written: io.StringIO, text: str) -> None:
    """The bar is drawn by a thread of its own, ten times a second."""
    assert any(text in written.getvalue() or threading.Event().wait(0.02) for _ in range(500)), written.getvalue()


def test_without_a_terminal_stderr_gets_lines_and_quiet_means_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: queue.Queue[str] = queue.Queue()
    echo = click.echo

    def heard(line: str, **options: Any) -> None:
        echo(line, **options)
        waited.put(line)

    monkeypatch.setattr(click, "echo", heard)
    monkeypatch.setattr(progress, "AFTER_SECONDS", 0.0)
    monkeypatch.setenv(progress.EVERY_VARIABLE, "0")
    assert not sys.stderr.isatty()
    with progress_bar(quiet=False) as report:
        waited.get(timeout=60)
        report("loading", 0, 1)
        waited.get(timeout=60)
    said = capsys.readouterr()
    assert said.out == ""
    assert [line.split("] ")[1] for line in said.err.splitlines()] == ["starting", "loading (0 of 1)"]
    with progress_bar(quiet=True) as report:
        report("loading", 0, 1)
    assert capsys.readouterr() == ("", "")
