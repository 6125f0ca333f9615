"""What a suite's run costs beyond its parts: model loads against the least possible, and time against generation, loading and replays.

    python bench/suite.py [megaplan-smollm2 | FILE.toml] [-o FOLDER] [--model-path NAME=PATH]
    python bench/suite.py --read FOLDER --wall SECONDS

Runs `verifier suite run` as anyone does, and reads what the run's journal says: workers started, seconds that they took to load,
seconds of each repetition and of each replay (its load included). Goal: at most 5 % of the run's time is in none of them.
Loads are counted where workers start, so those of remote provers are not among them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from machine import describe

from fpforensics.verifier.suite.folder import Folder
from fpforensics.verifier.suite.journal import ENDED, Entry, read_journal
from fpforensics.verifier.suite.model import LOCAL, Suite
from fpforensics.verifier.suite.plan import plan_jobs, plan_replays, replay_id

PROGRAM = "from fpforensics.verifier.cli import main; main()"
STDERR = 2


@dataclass(frozen=True)
class Part:
    """Sessions or replays: how many finished, workers started for them, the least that were needed, and seconds.

    ``refused`` are workers started for what did not finish, and what they took is in both seconds. ``seconds`` includes
    ``load_seconds``.
    """

    finished: int
    loads: int
    least: int
    refused: int
    seconds: float
    load_seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", nargs="?", default="megaplan-smollm2")
    parser.add_argument("-o", "--output", type=Path, help="keep the run there")
    parser.add_argument("--model-path", action="append", default=[])
    parser.add_argument("--read", type=Path, help="a finished run's folder, instead of running")
    parser.add_argument("--wall", type=float, help="how long that run took, in seconds")
    options = parser.parse_args()
    if (options.read is None) != (options.wall is None):
        parser.error("--read and --wall go together")
    if options.read is not None:
        show(options.read, options.wall)
        return
    with TemporaryDirectory() as place:
        folder = options.output or Path(place) / "run"
        show(folder, timed_run(command(options.suite, folder, options.model_path)))


def command(suite: str, folder: Path, model_paths: Iterable[str]) -> list[str]:
    """The command line that runs ``suite`` into ``folder``."""
    paths = [word for each in model_paths for word in ("--model-path", each)]
    return [sys.executable, "-P", "-c", PROGRAM, "suite", "run", suite, "-o", str(folder), "-q", *paths]


def timed_run(words: list[str]) -> float:
    """Run it to its end; seconds. Its own words go to stderr."""
    started = time.perf_counter()
    done = subprocess.run(words, check=False, stdout=STDERR, env=os.environ)
    if done.returncode:
        sys.exit(f"the suite ended with {done.returncode}")
    return time.perf_counter() - started


def parts(suite: Suite, entries: Iterable[Entry]) -> tuple[Part, Part]:
    """Sessions and replays of a run that nothing interrupted."""
    ended = {entry.job: entry for entry in entries if entry.event in ENDED}
    jobs = [job for job in plan_jobs(suite) if job.prover.endpoint == LOCAL]
    done = {job.id: ended[job.id] for job in jobs if job.id in ended and ended[job.id].event == "finished"}
    replays = [replay_id(each.name) for each in plan_replays(suite)]
    redone = {name: ended[name] for name in replays if name in ended and ended[name].event == "finished"}
    rest = [entry for entry in ended.values() if entry.event != "finished"]
    return (
        _part(
            list(done.values()),
            [entry for entry in rest if entry.job not in replays],
            sum(job.loads for job in jobs if job.id in done),
            sum(sum(entry.wall_seconds) + entry.load_seconds for entry in done.values()),
        ),
        _part(
            list(redone.values()),
            [entry for entry in rest if entry.job in replays],
            len({each.variant.arithmetic for each in plan_replays(suite) if replay_id(each.name) in redone}),
            sum(entry.seconds for entry in redone.values()),
        ),
    )


def _part(done: list[Entry], rest: list[Entry], least: int, seconds: float) -> Part:
    refused = sum(entry.load_seconds for entry in rest)
    return Part(
        finished=len(done),
        loads=sum(entry.loads for entry in done),
        least=least,
        refused=sum(entry.loads for entry in rest),
        seconds=seconds + refused,
        load_seconds=sum(entry.load_seconds for entry in done) + refused,
    )


def overhead(wall: float, *found: Part) -> float:
    """The share of ``wall`` seconds, over the sum of the parts, that is in none of them."""
    whole = sum(each.seconds for each in found)
    return (wall - whole) / whole


def show(folder: Path, wall: float) -> None:
    """Print the table of the run in ``folder``, which took ``wall`` seconds."""
    import torch

    suite = Folder(folder).load().suite
    sessions, replays = parts(suite, read_journal(Folder(folder).journal))
    print(describe(suite.baseline.config, torch.device("cpu")))
    print(
        f"{suite.name}: {suite.references.count} × {suite.references.prompt_tokens} prompt tokens, "
        f"{suite.references.new_tokens} new tokens, {suite.repetitions} repetitions\n"
    )
    print("| part | finished | model loads | least | loads that were refused | s | of it loading, s |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, each in (("sessions", sessions), ("replays", replays)):
        print(
            f"| {name} | {each.finished} | {each.loads} | {each.least} | {each.refused} "
            f"| {each.seconds:.1f} | {each.load_seconds:.1f} |"
        )
    whole = sessions.seconds + replays.seconds
    beyond = overhead(wall, sessions, replays)
    print(f"\nthe run took {wall:.1f} s, its parts {whole:.1f} s: overhead {beyond:.1%} (goal: at most 5 %)")


if __name__ == "__main__":
    main()
