"""What one machine collected, replayed on another: no session is begun, and the numbers are those of one run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NoReturn

import msgspec
import pytest
from click.testing import CliRunner
from suite_world import FINISHED, TOML, Starts, make, opened, results, run

from fpforensics.common.errors import LimitError, ReplayError, UsageError
from fpforensics.verifier.cli.suite import suite
from fpforensics.verifier.suite.folder import Folder
from fpforensics.verifier.suite.journal import Journal
from fpforensics.verifier.suite.model import ReplaySettings

COLLECT = TOML + "\n[replay]\nenabled = false\n"


class Nowhere:
    """A host on which nothing starts."""

    def __call__(self, *_: object) -> NoReturn:
        raise ReplayError("no GPU here", "use another device")


@pytest.fixture
def moved(tiny: Path, tmp_path: Path) -> Path:
    """A folder of evidence alone that was copied from a machine which is gone, but for its private key."""
    there, here = tmp_path / "there", tmp_path / "here"
    shutil.copytree(tiny, there / "model")
    run(make(there / "run", there / "model", toml=COLLECT))
    shutil.copytree(there / "run", here, ignore=shutil.ignore_patterns("local.key", ".incoming"))
    shutil.rmtree(there)
    return here


def replay_as(folder: Path, tiny: Path, **changes: str) -> None:
    replay = msgspec.structs.replace(Folder(folder).load().suite.replay, enabled=True, **changes)  # type: ignore[arg-type]
    Folder(folder).replay_as(Folder(folder).load(), replay, {"tiny": str(tiny)})


def test_the_numbers_are_those_of_one_run(unbroken: Path, moved: Path, tiny: Path) -> None:
    assert not list((moved / "replays").iterdir())
    replay_as(moved, tiny)
    starts = Starts()
    run(opened(moved, start=starts), sessions=False)
    assert results(moved) == results(unbroken)
    assert len(starts.configs) == len(FINISHED)  # replays alone
    run(opened(moved, start=starts), sessions=False)
    assert len(starts.configs) == len(FINISHED)


def test_a_session_that_is_open_stays_open(moved: Path, tiny: Path) -> None:
    lines = (moved / "journal.jsonl").read_text().splitlines(keepends=True)
    (moved / "journal.jsonl").write_text("".join(line for line in lines if "attn=eager" not in line))
    replay_as(moved, tiny)
    written = run(opened(moved), sessions=False)
    states = {config.config: (config.state, config.reason) for each in written.experiments for config in each.configs}
    assert states["attn=eager"] == ("open", "not run (`verifier suite resume` goes on)")
    assert states["baseline"] == ("finished", "")


def test_replays_made_in_another_way_are_not_mixed(moved: Path, tiny: Path) -> None:
    replay_as(moved, tiny, mode="prefill")
    run(opened(moved), sessions=False)
    replay_as(moved, tiny)
    with pytest.raises(UsageError, match=r"holds replays made with mode=prefill, using='', device=auto"):
        replay_as(moved, tiny, mode="decode")
    assert Folder(moved).load().suite.replay == ReplaySettings(mode="prefill")


def test_a_using_that_means_nothing_changes_nothing(moved: Path, tiny: Path) -> None:
    before = Folder(moved).load()
    with pytest.raises(UsageError, match="matmull"):
        replay_as(moved, tiny, using="matmull=native")
    assert Folder(moved).load() == before


def test_what_one_device_could_not_replay_another_does(moved: Path, tiny: Path) -> None:
    replay_as(moved, tiny, device="cuda:7")
    written = run(opened(moved, start=Nowhere()), sessions=False)
    assert written.experiments[0].replays_skipped
    replay_as(moved, tiny, device="cpu")
    written = run(opened(moved), sessions=False, again=True)
    assert not written.experiments[0].replays_skipped
    assert written.experiments[0].matrices


def test_a_run_under_way_is_left_alone(moved: Path) -> None:
    half = moved / ".incoming" / "local.baseline.msgpack"
    half.parent.mkdir()
    half.write_bytes(b"half")
    before = (moved / "suite.json").read_bytes()
    with Journal(moved / "journal.jsonl"):
        done = CliRunner().invoke(suite, ["replay", str(moved), "--mode", "prefill", "-q"])
    assert isinstance(done.exception, LimitError)
    assert (moved / "suite.json").read_bytes() == before
    assert half.exists()
