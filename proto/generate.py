"""Generate the gRPC code in this folder from its .proto files, or say with ``--check`` which files are stale.

The generator's version decides the oldest protobuf runtime that can load the code, so it is pinned and lies beside the
environment (``make install`` puts it there), not in it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGE = "fpforensics/proto"
TOOLS = HERE.parent / ".venv" / "grpc-tools"


def generate(source: Path, into: Path, tools: Path) -> None:
    """Write the code for ``source``/*.proto to ``into``. Raises ``SystemExit`` with protoc's message on failure."""
    if not (tools / "grpc_tools").is_dir():
        raise SystemExit(f"no protoc at {tools} (run: make install)")
    names = sorted(path.name for path in source.glob("*.proto"))
    with tempfile.TemporaryDirectory() as scratch:
        # The virtual path makes imports `from fpforensics.proto import …` and the descriptor path unique.
        command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PACKAGE}={source}"]
        command += [f"--{kind}_out={scratch}" for kind in ("python", "pyi", "grpc_python")]
        command += [f"{PACKAGE}/{name}" for name in names]
        path = {"PYTHONPATH": str(tools)}
        done = subprocess.run(command, env=os.environ | path, cwd=scratch, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        into.mkdir(parents=True, exist_ok=True)
        for made in sorted((Path(scratch) / PACKAGE).iterdir()):
            shutil.copyfile(made, into / made.name)


def stale(committed: Path, fresh: Path) -> list[str]:
    """Names of generated files that differ between the folders, or are in only one of them."""
    names = {path.name for folder in (committed, fresh) for path in folder.glob("*_pb2*.py*")}
    return sorted(name for name in names if _content(committed / name) != _content(fresh / name))


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 and name stale files")
    parser.add_argument("--tools", type=Path, default=TOOLS, help="folder that holds grpcio-tools")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        generate(HERE, Path(folder), args.tools)
        differing = stale(HERE, Path(folder))
        if args.check:
            for name in differing:
                print(f"stale: proto/{name} (run: make proto)", file=sys.stderr)
            return 1 if differing else 0
        for name in differing:
            made = Path(folder) / name
            if made.exists():
                shutil.copyfile(made, HERE / name)
            else:
                (HERE / name).unlink()
            print(f"wrote proto/{name}" if made.exists() else f"removed proto/{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
