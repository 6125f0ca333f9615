"""What is refused before anything is loaded, and what only the worker can tell and is therefore let through."""

from __future__ import annotations

import sys

import pytest

from fpforensics.common.config import parse_config
from fpforensics.common.engines import preflight
from fpforensics.common.engines.base import Host
from fpforensics.common.engines.preflight import require_host, require_runnable
from fpforensics.common.errors import MissingDependencyError, ReplayError, UsageError


@pytest.fixture
def torch_build(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with a driver and no opinion on what is visible, until the test says otherwise."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(preflight, "has_driver", lambda: True)
    monkeypatch.setattr(sys, "platform", "linux")
    return monkeypatch


def with_torch(patch: pytest.MonkeyPatch, version: str) -> None:
    patch.setattr(preflight.importlib.metadata, "version", lambda _: version)


def test_an_interpreter_is_there_or_not() -> None:
    require_host(Host(python=sys.executable))
    with pytest.raises(UsageError, match="--python /nosuch: no such interpreter"):
        require_host(Host(python="/nosuch"))


@pytest.mark.parametrize("version", ["2.13.0+cu128", "2.13.0", "2.13.0+rocm7", "2.13.0a0+git1234"])
def test_a_gpu_that_may_be_there_is_the_workers_to_find(torch_build: pytest.MonkeyPatch, version: str) -> None:
    with_torch(torch_build, version)
    require_host(Host(device="cuda"))


@pytest.mark.parametrize(
    ("version", "driver", "env", "said"),
    [
        ("2.13.0+cpu", True, {}, "torch 2.13.0+cpu computes on CPUs only"),
        ("2.13.0+cu128", False, {}, "no NVIDIA driver is installed"),
        ("2.13.0", False, {}, "no NVIDIA driver is installed"),
        ("2.13.0+cu128", True, {"CUDA_VISIBLE_DEVICES": ""}, "CUDA_VISIBLE_DEVICES hides every GPU"),
        ("2.13.0+cu128", True, {"CUDA_VISIBLE_DEVICES": "-1"}, "CUDA_VISIBLE_DEVICES hides every GPU"),
    ],
)
def test_a_gpu_that_cannot_be_there_is_refused(
    torch_build: pytest.MonkeyPatch, version: str, driver: bool, env: dict[str, str], said: str
) -> None:
    with_torch(torch_build, version)
    torch_build.setattr(preflight, "has_driver", lambda: driver)
    with pytest.raises(ReplayError, match="device cuda is not available here") as refused:
        require_host(Host(device="cuda", env=env))
    assert said in refused.value.message
    require_host(Host(device="auto", env=env))
    require_host(Host(device="cpu", env=env))


def test_what_another_interpreter_holds_is_its_own(torch_build: pytest.MonkeyPatch) -> None:
    with_torch(torch_build, "2.13.0+cpu")
    torch_build.setattr("importlib.util.find_spec", lambda _: None)
    other = Host(device="cuda", python=sys.executable)
    require_host(other)
    require_runnable([parse_config("attn=flash_attention_2"), parse_config("quant=torchao-int8")], other)
    with pytest.raises(UsageError, match="tp=2"):
        require_runnable([parse_config("tp=2")], other)
    with pytest.raises(MissingDependencyError, match="backend transformers needs torch"):
        require_runnable([parse_config("")], Host())


def test_flash_attention_needs_a_gpu(torch_build: pytest.MonkeyPatch) -> None:
    with_torch(torch_build, "2.13.0+cu128")
    torch_build.setattr("importlib.util.find_spec", lambda name: object())
    require_runnable([parse_config("attn=flash_attention_2")], Host(device="cuda"))
    with pytest.raises(ReplayError, match="needs a CUDA device"):
        require_runnable([parse_config("attn=flash_attention_2")], Host(device="cpu"))
