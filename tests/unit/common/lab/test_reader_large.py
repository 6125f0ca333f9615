"""Reading what is larger than it should be: bombs fail within seconds and little memory, honest files need one run's.

A mapped file's pages count as resident though the system may drop them, so memory means what a process owns: its
data segment, limited by the system in a process of its own; or what Python allocated.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path

import numpy as np
import pytest

from fpforensics.common.lab.document import MAX_TOKEN_BYTES
from fpforensics.common.lab.reader import MAX_UNTYPED_BYTES, open_experiment
from fpforensics.common.lab.run import Layered, Run, RunInfo, RunSignals, Vectors
from fpforensics.common.lab.text import MAX_NAMES
from fpforensics.common.lab.writer import RunDetails, write_experiment

MEGABYTE = 1 << 20
MEMORY = 300 * MEGABYTE
METADATA = {"experiment_type": "made_up", "variable_tested": "value"}
HEAD = '{"experiment_metadata":' + json.dumps(METADATA) + ',"configurations":'
CONFIGURATIONS = [{"config_id": "a", "hardware": "H100", "variable_value": 1}]

TOO_MANY = f"the document: more than {MAX_NAMES} names"

# name: (beginning, what is repeated, end, what the error begins with)
BOMBS = {
    "lists": ("", "[", "", "the document: Expected object"),
    "objects": ("", '{"a":', "", TOO_MANY),
    "steps": ('{"runs":[{"config_id":"a","rep_id":0,"decode_steps":[', '{"step":0},', "", TOO_MANY),
    "positions": (
        '{"runs":[{"config_id":"a","rep_id":0,"prefill":{"hidden_states":{"layer_1":{',
        '"p":0,',
        "",
        TOO_MANY,
    ),
    "tokens": (
        HEAD + json.dumps(CONFIGURATIONS) + ',"runs":[{"config_id":"a","rep_id":0,"decode_steps":[],"token_ids":[',
        "1000,",
        "1]}]}",
        f"runs: more than {MAX_TOKEN_BYTES} bytes of token_ids",
    ),
    "lists in runs": ('{"runs":', "[", "", "runs[0]: Expected object"),
    "lists in a vector": (
        '{"runs":[{"config_id":"a","rep_id":0,"decode_steps":[],"prefill":{"hidden_states":{"layer_1":{"pos_-1":',
        "[",
        "",
        "the document: it nests too deeply",
    ),
    "empty lists as runs": (
        '{"experiment_metadata":{},"configurations":[],"runs":[',
        "[],",
        "",
        "runs[0]: Expected object",
    ),
    "empty objects as runs": ('{"runs":[', "{},", "{}]}", "runs[0]: Object missing required field config_id"),
    "nothing but spaces": ("", " ", "", "the document: not JSON: it ends too early"),
    "nothing but zero bytes": ("", "\0", "", "the document: not JSON: invalid character (byte 0)"),
    "one string": ('"', "a", "", "the document: not JSON: it ends too early"),
}
# These have to be read to their end: seconds for each gigabyte.
LONG_BOMBS = {
    "empty lists in metadata": (
        '{"configurations":[],"runs":[],"experiment_metadata":{"a":[',
        "[],",
        "1]}}",
        f"experiment_metadata: more than {MAX_UNTYPED_BYTES} bytes",
    ),
    "empty objects as configurations": (
        '{"experiment_metadata":' + json.dumps(METADATA) + ',"runs":[],"configurations":[',
        "{},",
        "{}]}",
        f"configurations: more than {MAX_UNTYPED_BYTES} bytes",
    ),
    "empty lists where nothing is read": (
        HEAD + json.dumps(CONFIGURATIONS) + ',"runs":[],"unknown":[',
        "[],",
        "1]}",
        "runs: an empty list",
    ),
    "empty lists and no end": ('{"unknown":[', "[],", "", "the document: not JSON: it ends too early"),
    "one vector": (
        HEAD + json.dumps(CONFIGURATIONS) + ',"runs":[{"config_id":"b","rep_id":0,"decode_steps":[],"prefill":'
        '{"hidden_states":{"layer_1":{"pos_-1":[',
        "0.5,",
        "1]}}}}]}",
        "runs[0].config_id: 'b' is no configuration",
    ),
}

# Opens argv[1] with argv[2] bytes to spend, and says how it ended.
CHILD = """
import json, re, resource, sys, time
from pathlib import Path
from fpforensics.common.errors import EvidenceError
from fpforensics.common.lab.reader import open_experiment
used = int(re.search(r"VmData:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
limit = used + int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
start = time.monotonic()
try:
    with open_experiment(Path(sys.argv[1])) as experiment:
        experiment.validate()
    line = ""
except EvidenceError as error:
    line = error.diagnostics()
print(json.dumps([line, time.monotonic() - start]))
"""


def open_in_a_child(path: Path, memory: int = MEMORY) -> tuple[str, float]:
    """What opening and validating said, and how many seconds it took."""
    if not sys.platform.startswith("linux"):
        pytest.skip("memory is limited as Linux does it")
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(path), str(memory)], capture_output=True, text=True, timeout=250
    )
    assert child.returncode == 0, child.stderr[-2000:]
    line, seconds = json.loads(child.stdout)
    return line, seconds


def fill(path: Path, parts: tuple[str, str, str, str], size: int) -> Path:
    if shutil.disk_usage(path.parent).free < 2 * size:
        pytest.skip(f"not {2 * size} bytes of free space")
    beginning, unit, end, _ = parts
    chunk = (unit * (MEGABYTE // len(unit))).encode()
    with path.open("wb") as file:
        file.write(beginning.encode())
        file.writelines(repeat(chunk, size // len(chunk) + 1))
        file.write(end.encode())
    return path


def check_refused(path: Path, says: str, seconds_at_most: float) -> None:
    line, seconds = open_in_a_child(path)
    path.unlink()
    assert line.startswith(says) and line.isprintable() and len(line) < 300
    assert "memory" not in line
    assert seconds < seconds_at_most


@pytest.mark.parametrize("name", BOMBS | LONG_BOMBS)
def test_a_bomb_of_64_megabytes(tmp_path: Path, name: str) -> None:
    parts = (BOMBS | LONG_BOMBS)[name]
    check_refused(fill(tmp_path / "a.json", parts, 64 * MEGABYTE), parts[3], 15)


def test_a_gigabyte_of_brackets(tmp_path: Path) -> None:
    parts = BOMBS["lists"]
    check_refused(fill(tmp_path / "a.json", parts, 1024 * MEGABYTE), parts[3], 5)


def test_a_gigabyte_of_nothing(tmp_path: Path) -> None:
    """A sparse file, which costs its maker no disk at all."""
    path = tmp_path / "a.json"
    path.touch()
    with path.open("r+b") as file:
        file.truncate(1024 * MEGABYTE)
    check_refused(path, BOMBS["nothing but zero bytes"][3], 5)


@pytest.mark.slow
@pytest.mark.parametrize("name", BOMBS | LONG_BOMBS)
def test_a_bomb_of_a_gigabyte(tmp_path: Path, name: str) -> None:
    parts = (BOMBS | LONG_BOMBS)[name]
    check_refused(fill(tmp_path / "a.json", parts, 1024 * MEGABYTE), parts[3], 60 if name in LONG_BOMBS else 20)


def test_the_limit_on_memory_is_one(tmp_path: Path) -> None:
    """The control: what needs more than the child may spend is refused for it, in one line."""
    parts = BOMBS["tokens"]
    path = fill(tmp_path / "a.json", parts, MAX_TOKEN_BYTES - 4 * MEGABYTE)
    line, _ = open_in_a_child(path)
    assert line.startswith("runs: too much for this machine's memory")


def honest(path: Path, runs: int, width: int) -> Path:
    rng = np.random.default_rng(0)

    def make() -> Iterator[tuple[Run, RunDetails]]:
        for index in range(runs):
            vectors: dict[Layered, Vectors] = {
                ("hidden_states", "layer_1"): Vectors(((0, -2), (0, -1)), rng.normal(size=(2, width)))
            }
            yield Run(RunInfo(index, "a", "ref_0", index), {"prefill": RunSignals(None, vectors)}), {}

    write_experiment(path, METADATA, CONFIGURATIONS, make())
    return path


def test_an_honest_file_larger_than_memory(tmp_path: Path) -> None:
    """60 MB, 24 MB of them as arrays, in a process that may spend 20 MB: a run's at a time."""
    path = honest(tmp_path / "a.json", runs=30, width=50_000)
    assert path.stat().st_size > 55 * MEGABYTE
    line, _ = open_in_a_child(path, 20 * MEGABYTE)
    assert line == ""


def test_reading_needs_the_same_memory_for_any_number_of_runs(tmp_path: Path) -> None:
    def peak(path: Path) -> int:
        tracemalloc.start()
        with open_experiment(path) as experiment:
            experiment.validate()
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    few = peak(honest(tmp_path / "few.json", runs=4, width=20_000))
    many = peak(honest(tmp_path / "many.json", runs=40, width=20_000))
    one_run = 2 * 20_000 * 8
    assert many < few + one_run / 2
