"""Lineup files: TOML with one ``[[config]]`` table for each member, in the keys of a claim, and an optional ``using``."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fpforensics.common.config import KEYS
from fpforensics.common.errors import UsageError, did_you_mean, shorten


@dataclass(frozen=True)
class Lineup:
    """Config specs, and how the verifier runs them (empty: each as it is)."""

    specs: tuple[str, ...]
    using: str = ""


def read_lineup(items: Sequence[str]) -> Lineup:
    """``items`` are specs (``attn=eager``) or paths of ``.toml`` files, in any mixture."""
    specs: list[str] = []
    using = ""
    for item in items:
        if item.endswith(".toml"):
            read = read_lineup_file(Path(item))
            specs += read.specs
            using = read.using or using
        else:
            specs.append(item)
    return Lineup(tuple(specs), using)


def read_lineup_file(path: Path) -> Lineup:
    """Read one TOML file. Raises :class:`UsageError` naming the file and the offending key."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"no lineup file {path}", "give a .toml file or a spec such as attn=eager") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"lineup {path} is not readable TOML: {error}", "see docs/lineup.md") from None
    for key in document:
        if key not in ("config", "using"):
            raise UsageError(f"lineup {path}: unknown key {shorten(key)!r}", did_you_mean(key, ("config", "using")))
    tables = document.get("config", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables) or not tables:
        raise UsageError(f"lineup {path} has no [[config]] tables", 'write [[config]] and then e.g. attn = "eager"')
    using = document.get("using", "")
    if not isinstance(using, str):
        raise UsageError(f"lineup {path}: using is {using!r}", 'write for example using = "matmul=fp32-rounded"')
    return Lineup(tuple(_spec(path, index, table) for index, table in enumerate(tables)), using)


def _spec(path: Path, index: int, table: dict[str, object]) -> str:
    parts = []
    for key, value in table.items():
        if key not in KEYS:
            raise UsageError(
                f"lineup {path}: config[{index}] has unknown key {shorten(key)!r}", did_you_mean(key, KEYS)
            )
        if not isinstance(value, str | int | bool):
            raise UsageError(f"lineup {path}: config[{index}].{key} is {value!r}", "a string, whole number or boolean")
        parts.append(f"{key}={str(value).lower() if isinstance(value, bool) else value}")
    return ",".join(parts)
