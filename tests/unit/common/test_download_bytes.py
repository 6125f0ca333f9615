"""How much a model would fetch, as the hub says it; without an answer it is not known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fpforensics.common.models import download_bytes

FILES = {"model.safetensors": 1000, "config.json": 20, "pytorch_model.bin": 5000, "README.md": 7}


class Api:
    def model_info(self, name: str, **_: Any) -> Any:
        if name != "someone/known":
            raise RuntimeError("no connection")
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=each, size=size) for each, size in FILES.items()])


def test_download_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert download_bytes("someone/known") == 1020  # nothing pickled is fetched
    assert download_bytes("mine", models={"mine": "someone/known"}) == 1020
    assert download_bytes("someone/unknown") is None
    assert download_bytes("smollm2-135m") is None
