"""Prompts that nothing was tuned on, other kinds of text than the profile's: how often whole verdicts on them are wrong.

bench/fresh.py documents -o FOLDER              the texts: Python's language reference, and source of its standard library
"""

from __future__ import annotations

import argparse
import inspect
import pydoc_data.topics
import sys
from pathlib import Path

MODULES = (
    "argparse",
    "configparser",
    "decimal",
    "difflib",
    "email.message",
    "fractions",
    "heapq",
    "inspect",
    "tarfile",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    documents_ = commands.add_parser("documents")
    documents_.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    documents(arguments.output)


def documents(folder: Path) -> None:
    """Two texts that come with Python: prose and code."""
    folder.mkdir(parents=True, exist_ok=True)
    prose = "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    code = "\n\n".join(inspect.getsource(__import__(name, fromlist=["_"])) for name in MODULES)
    for name, text in (("language-reference", prose), ("standard-library", code)):
        path = folder / f"{name}.txt"
        path.write_text(text, encoding="utf-8")
        print(f"{path}: {len(text)} characters, Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
