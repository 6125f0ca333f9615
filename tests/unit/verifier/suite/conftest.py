"""One tiny model and one unbroken run, shared by this folder's tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_engine import fake_checkpoint
from suite_world import make, run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What of a checkpoint is read without torch: a tokenizer, sizes, and a file of weights that nobody loads."""
    return fake_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("suite") / "run"
    run(make(folder, tiny))
    return folder
