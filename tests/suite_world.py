"""What tests of suites share: a small suite on a tiny model, runs in this process, and results without their times."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fake_engine import fake_engine

from fpforensics.common.config import ExecutionConfig
from fpforensics.common.engines.base import Engine, EngineStarter, Host
from fpforensics.common.keys import Keyring
from fpforensics.verifier.suite.folder import Folder, Settings
from fpforensics.verifier.suite.reading import parse_suite
from fpforensics.verifier.suite.run import Clock
from fpforensics.verifier.suite.sessions import Setting
from fpforensics.verifier.suite.suite import run_suite

TOML = """
name = "tiny"
title = "A tiny suite"
repetitions = 2

[baseline]
config = "model=tiny,attn=sdpa"

[references]
count = 2
prompt_tokens = 16
new_tokens = 4
documents = ["DOCUMENT"]

[capture]
layers = ["1", "2", "last"]
prefill_positions = 3
top_k = 4

[[experiment]]
name = "attention"
variable = "attn"
values = ["attn=eager"]

[[experiment]]
name = "tensor_parallel"
variable = "emulate_tp"
values = ["emulate_tp=2"]
reload = true

[[experiment]]
name = "expert_parallel"
variable = "ep"
values = ["ep=2"]

[[experiment]]
name = "concurrent_streams"
variable = "concurrent"
values = ["concurrent=true"]

[[experiment]]
name = "cuda_version"
variable = "cuda_version"
skip = "no other interpreter here"
"""
TEXT = " ".join(f"The {number}th sentence says something else." for number in range(40))
FINISHED = ("local.baseline", "local.attn=eager", "local.emulate_tp=2", "local.concurrent=true")
TIMES = ("timestamp", "date_created", "seconds", "mean", "variance", "slowdown", "interval", "time")


def no_wait(_seconds: float) -> None:
    """Nobody sleeps in a test."""


CLOCK = Clock(wait=no_wait)


class Starts:
    """Starts engines in this process and counts them; at start ``kill_at`` something happens first."""

    def __init__(
        self, kill_at: int = -1, act: Callable[[], None] = lambda: None, engine: EngineStarter = fake_engine
    ) -> None:
        self.configs: list[ExecutionConfig] = []
        self.kill_at, self.act, self.engine = kill_at, act, engine

    @contextmanager
    def __call__(self, config: ExecutionConfig, host: Host, cancelled: Callable[[], bool]) -> Iterator[Engine]:
        self.configs.append(config)
        if len(self.configs) == self.kill_at:
            self.act()
        with self.engine(config, host, cancelled) as engine:
            yield engine


def make(folder: Path, model: Path, toml: str = TOML, keyring: Keyring | None = None, **changes: Any) -> Setting:
    """A new run's folder, and how it is run in this process."""
    document = folder.parent / "document.txt"
    document.write_text(TEXT)
    suite = parse_suite(toml.replace("DOCUMENT", str(document)), "tiny.toml")
    Folder(folder).create(Settings(suite=suite, models={"tiny": str(model)}), keyring or Keyring())
    return opened(folder, **changes)


def opened(folder: Path, **changes: Any) -> Setting:
    """A run's folder, as ``resume`` opens it."""
    settings = Folder(folder).load()
    given = {"folder": Folder(folder), "suite": settings.suite, "models": settings.models, "start": Starts()}
    return Setting(**(given | changes))


def run(setting: Setting, **options: Any) -> Any:
    return run_suite(setting, clock=CLOCK, **options)


def results(folder: Path) -> dict[str, Any]:
    """Every JSON file that a run leaves, without times, names of sessions and what hangs on them."""
    found = {
        path.name: without_times(json.loads(path.read_text()))
        for path in sorted(folder.glob("*.json"))
        if path.name != "suite.json"  # it names the folder that documents lie in
    }
    for path in sorted((folder / "replays").iterdir()):
        found[path.name] = without_times(json.loads(path.read_text()))
    return found


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: without_times(each)
            for key, each in value.items()
            if key not in (*TIMES, "digest") and not key.startswith("runtime")
        }
    return [without_times(each) for each in value] if isinstance(value, list) else value
