"""One tiny model and one unbroken run, shared by this folder's tests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from fake_engine import LAYERS, VOCABULARY
from safetensors.numpy import save_file
from suite_world import make, run
from tiny_models import write_tokenizer

SIZES = {"model_type": "llama", "vocab_size": VOCABULARY, "num_hidden_layers": LAYERS, "max_position_embeddings": 4096}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What of a checkpoint is read without torch: a tokenizer, sizes, and a file of weights that nobody loads."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(SIZES))
    save_file({"weight": np.zeros((2, 2), np.float32)}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("suite") / "run"
    run(make(folder, tiny))
    return folder
