"""A suite killed at random moments and resumed leaves what an unbroken run leaves.

    python bench/suite_kills.py [megaplan-smollm2 | FILE.toml] -o FOLDER [--kills 5] [--seed 0] [--model-path NAME=PATH]

Runs the suite once without disturbance (FOLDER/unbroken; one that is there and has its page is taken as it is, with --wall), then
once more (FOLDER/killed), where SIGKILL ends the whole process group at seeded random moments of the unbroken run's time and
`verifier suite resume` goes on. Prints what was compared, what may differ, and each difference. Exit code 1: something differs, or
fewer kills than asked for came in time.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from suite import PROGRAM, STDERR, command, timed_run
from suite_same import KEYS, MAY_DIFFER, differences, files_of

from fpforensics.verifier.suite.folder import Folder
from fpforensics.verifier.suite.journal import read_journal

LATEST = 0.95
"""Kills come before this share of the unbroken run's time: what they undo is done again, so that the run is not over by then."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", nargs="?", default="megaplan-smollm2")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--wall", type=float, help="how long the unbroken run took, in seconds, where it is there")
    parser.add_argument("--model-path", action="append", default=[])
    options = parser.parse_args()
    unbroken, killed = options.output / "unbroken", options.output / "killed"
    if (unbroken / "report.html").exists() != (options.wall is not None):
        parser.error(f"--wall goes with a finished run in {unbroken}, and is for no other")
    wall = options.wall or timed_run(command(options.suite, unbroken, options.model_path))
    print(f"unbroken: {wall:.1f} s", flush=True)
    delivered = run_killed(
        command(options.suite, killed, options.model_path), killed, moments(wall, options.kills, options.seed)
    )
    found = report(unbroken, killed)
    print(f"{delivered} of {options.kills} kills (seed {options.seed}), {found} differences")
    sys.exit(1 if found or delivered < options.kills else 0)


def moments(wall: float, kills: int, seed: int) -> list[float]:
    """How long each start may run before it is killed, in seconds: together at most ``LATEST`` of ``wall``."""
    drawn = random.Random(seed)
    times = sorted(drawn.uniform(0, LATEST * wall) for _ in range(kills))
    return [after - before for before, after in zip([0.0, *times], times, strict=False)]


def run_killed(first: list[str], folder: Path, waits: list[float]) -> int:
    """Run, kill after each of ``waits`` and resume, then to the end; how many kills came in time."""
    delivered = 0
    for number, seconds in enumerate(waits, start=1):
        if not ended_within(_words(first, folder), seconds):
            delivered += 1
            entries = read_journal(Folder(folder).journal)
            done = sum(entry.event == "finished" for entry in entries)
            last = entries[-1].job if entries else "the start"
            print(f"kill {number} after {seconds:.1f} s, {done} jobs finished, last heard of {last}", flush=True)
    timed_run(_words(first, folder))
    return delivered


def ended_within(words: list[str], seconds: float) -> bool:
    """Whether it ended by itself in that time; what did not is killed with its whole process group.

    Its workers are in groups of their own and end with the connection that they inherited. It must not fail by itself.
    """
    process = subprocess.Popen(words, stdout=STDERR, env=os.environ, start_new_session=True)
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return False
    if status:
        sys.exit(f"the suite ended by itself with {status}")
    return True


def _words(first: list[str], folder: Path) -> list[str]:
    """Resume what has begun. A run that was killed before its settings were whole begins anew."""
    if Folder(folder).settings.exists():
        return [sys.executable, "-P", "-c", PROGRAM, "suite", "resume", str(folder), "-q"]
    if folder.exists():
        folder.rename(folder.with_name(f"{folder.name}.{time.time_ns()}"))
    return first


def report(unbroken: Path, killed: Path) -> int:
    """Print what is compared and what differs; how many differences."""
    names = files_of(unbroken)
    bundles = sum(name.endswith(".msgpack") for name in names)
    replays = sum(name.startswith("replays/") for name in names)
    print(
        f"compared: {len(names)} files, {bundles} bundles of them tensor by tensor, {replays} replays; not {', '.join(KEYS)}"
    )
    for pattern, paths in MAY_DIFFER.items():
        print(f"  may differ in {pattern}: {', '.join(paths)}")
    found = list(differences(unbroken, killed))
    for line in found:
        print(f"✗ {line}")
    return len(found)


if __name__ == "__main__":
    main()
