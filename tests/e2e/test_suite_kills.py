"""bench/suite_kills.py with real workers: a suite that is killed and resumed leaves the files of an unbroken run."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench_modules import bench_module
from small_suite import write_suite


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_and_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench, kills = bench_module("suite"), bench_module("suite_kills")
    toml, model = write_suite(tmp_path)
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    wall = bench.timed_run(bench.command(str(toml), unbroken, [f"tiny={model}"]))
    words = bench.command(str(toml), killed, [f"tiny={model}"])
    assert kills.run_killed(words, killed, kills.moments(wall, 2, seed=0)) == 2
    capsys.readouterr()
    assert kills.report(unbroken, killed) == 0
    assert "2 bundles of them tensor by tensor" in capsys.readouterr().out
