"""The committed gRPC code is what the pinned generator writes, and loads under every protobuf that we support."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / ".venv" / "grpc-tools"
PROTO = ROOT / "proto"


def check(folder: Path) -> subprocess.CompletedProcess[str]:
    if not TOOLS.is_dir():
        pytest.skip("the pinned generator is not installed (make install)")
    command = [sys.executable, str(folder / "generate.py"), "--check", "--tools", str(TOOLS)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_committed_code_is_fresh() -> None:
    done = check(PROTO)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("name", "change", "stale"),
    [
        ("audit_pb2.py", "append", ["audit_pb2.py"]),
        ("evidence_pb2.pyi", "remove", ["evidence_pb2.pyi"]),
        ("evidence.proto", "message Fresh {}", ["evidence_pb2.py", "evidence_pb2.pyi"]),
        ("orphan_pb2.py", "append", ["orphan_pb2.py"]),
    ],
)
def test_stale_code_is_named(tmp_path: Path, name: str, change: str, stale: list[str]) -> None:
    copy = shutil.copytree(PROTO, tmp_path / "proto", ignore=shutil.ignore_patterns("__pycache__"))
    if change == "remove":
        (copy / name).unlink()
    else:
        with (copy / name).open("a") as file:
            file.write("\n# changed\n" if change == "append" else f"\n{change}\n")
    done = check(copy)
    assert done.returncode == 1
    assert re.findall(r"proto/(\S+)", done.stderr) == stale


def test_it_loads_under_the_oldest_runtimes_that_we_declare() -> None:
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    lowest = {name: version for name, _, version in (need.partition(">=") for need in needs)}
    for name in ("audit", "evidence"):
        stamped = re.search(r"^# Protobuf Python Version: (\S+)$", (PROTO / f"{name}_pb2.py").read_text(), re.M)
        generated = re.search(r"^GRPC_GENERATED_VERSION = '(\S+)'$", (PROTO / f"{name}_pb2_grpc.py").read_text(), re.M)
        assert stamped
        assert generated
        assert _version(stamped[1]) <= _version(lowest["protobuf"])
        assert _version(generated[1]) <= _version(lowest["grpcio"])


def test_descriptor_paths_are_ours_alone() -> None:
    from fpforensics.proto import audit_pb2, evidence_pb2

    assert audit_pb2.DESCRIPTOR.name == "fpforensics/proto/audit.proto"
    assert evidence_pb2.DESCRIPTOR.name == "fpforensics/proto/evidence.proto"
    assert not (PROTO / "__init__.py").exists()


def _version(text: str) -> tuple[int, ...]:
    parts = tuple(int(part) for part in text.split("."))
    return parts + (0,) * (3 - len(parts))
