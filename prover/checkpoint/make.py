"""From an unquantized checkpoint to one in a provider's format: a folder that appears whole, or not at all.

The same source, format and options make the same bytes, on any machine; formats that a library writes are as repeatable as
that library, whose version is part of what names them in the cache.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile, rmtree
from typing import Any

import msgspec

from fpforensics.common.cache import cache_folder, sync_folder, write_atomically
from fpforensics.common.errors import MissingDependencyError, UsageError
from fpforensics.common.models import read_config, resolve_model
from fpforensics.common.signals import Array
from fpforensics.common.weights import StoredTensor, stored_tensors, weights_digest
from fpforensics.prover.checkpoint.formats import Format, as_float32, choose_group, find_format, is_projection
from fpforensics.prover.checkpoint.pad import Padding, parse_padding
from fpforensics.prover.checkpoint.tensors import read_floats, write_tensors

RECORD = "made_by_fpforensics.json"
# Part of what names a checkpoint in the cache: raise it when what is written changes.
_RECIPE = 2
_COPIED = ("*.json", "*.jinja", "*.tiktoken", "tokenizer.model", "merges.txt", "vocab.txt")
_NOT_COPIED = frozenset({"config.json", "conversion.json", RECORD})
_INSTALL = {"torchao": "pip install '.[hf,torchao]'", "bitsandbytes": "pip install '.[hf]'"}
Progress = Callable[[str, int, int], None]
"""Called with (what is happening, done, total)."""


class Recipe(msgspec.Struct, frozen=True):
    """What was made of what: beside the weights, as ``made_by_fpforensics.json``."""

    source: str
    source_weights: str
    format: str
    group_size: int
    pad: dict[str, int]
    tool: str


class _Record(msgspec.Struct, frozen=True):
    recipe: Recipe
    weights: str
    files: dict[str, str]


@dataclass(frozen=True)
class MadeCheckpoint:
    """A finished checkpoint; ``fresh`` says that it was made now, not found in the cache."""

    path: Path
    weights_digest: str
    recipe: Recipe
    fresh: bool


def make_checkpoint(
    model: str,
    format_name: str,
    *,
    revision: str = "",
    group_size: int | None = None,
    pad: str = "",
    output: Path | None = None,
    models: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> MadeCheckpoint:
    """Quantize ``model`` into a format, padded first where ``pad`` says so.

    ``output`` must be a new or empty folder; without one the checkpoint is kept in the user's cache, and found there by
    the next call. Raises :class:`UsageError` for what does not fit together, and :class:`MissingDependencyError`.
    """
    report = progress or (lambda _stage, _done, _total: None)
    made_as = find_format(format_name)
    _check_library(made_as)
    wanted = parse_padding(pad)
    if made_as.name == "none" and not wanted:
        raise UsageError("format none without --pad would be the model itself", "name a format, or a shape to pad to")
    if group_size is not None and not made_as.grouped:
        raise UsageError(f"format {made_as.name} has no groups", "leave --group-size out")
    if output is not None and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"{output} exists and is not an empty folder", "name a new folder")

    found = resolve_model(model, revision, models, progress=lambda done, total: report("converting", done, total))
    source = _Source(found.path, wanted)
    recipe = Recipe(
        source=found.name,
        source_weights=weights_digest(found.path),
        format=made_as.name,
        group_size=choose_group(group_size, source.widths()) if made_as.grouped else 0,
        pad=wanted,
        tool=_tool(made_as),
    )
    if output is not None:
        return MadeCheckpoint(output, _write(output, source, made_as, recipe, report), recipe, True)
    return _in_cache(source, made_as, recipe, report)


class _Source:
    """An unquantized checkpoint, padded on the way where asked."""

    def __init__(self, path: Path, wanted: Mapping[str, int]) -> None:
        self.path = path
        config = read_config(path)
        if config.get("quantization_config"):
            raise UsageError(f"the checkpoint in {path} is quantized already", "give an unquantized one")
        self._padding = Padding(config, wanted) if wanted else None
        self.config = self._padding.config() if self._padding else config
        self.stored = stored_tensors(path)
        if not any(is_projection(tensor.name) for tensor in self.stored):
            raise UsageError(f"the checkpoint in {path} has no '…_proj.weight' tensors", "give a Llama-like model")

    def tensor(self, stored: StoredTensor) -> Array:
        weights = read_floats(stored)
        return self._padding.tensor(stored.name, weights) if self._padding else weights

    def widths(self) -> set[int]:
        """The inputs' widths of all projections, as padded."""
        if self._padding is None:
            return {tensor.shape[1] for tensor in self.stored if is_projection(tensor.name)}
        new = self._padding.new
        return {new.hidden, new.heads * new.head, new.mlp}


def _in_cache(source: _Source, made_as: Format, recipe: Recipe, report: Progress) -> MadeCheckpoint:
    try:
        from filelock import FileLock
    except ImportError as error:
        raise MissingDependencyError("a checkpoint in the cache", "filelock", "pip install filelock") from error
    # Not the name that the model was called by: the same weights make the same checkpoint.
    named = msgspec.structs.replace(recipe, source="")
    digest = hashlib.sha256(msgspec.json.encode(named, order="deterministic")).hexdigest()
    parts = (Path(recipe.source).name, recipe.format, digest[:12])
    folder = cache_folder() / "checkpoints" / re.sub(r"[^\w.-]", "-", "-".join(parts))
    kept = _sound(folder)
    if kept is not None:
        return MadeCheckpoint(folder, kept.weights, kept.recipe, False)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            kept = _sound(folder)
            if kept is not None:
                return MadeCheckpoint(folder, kept.weights, kept.recipe, False)
            return MadeCheckpoint(folder, _write(folder, source, made_as, recipe, report), recipe, True)
    except OSError as error:
        raise UsageError(f"cannot keep a checkpoint in {folder.parent}: {error}", "set FPFORENSICS_CACHE") from error


def _sound(folder: Path) -> _Record | None:
    """The record of a finished checkpoint whose files are what it says, or None."""
    try:
        record = msgspec.json.decode((folder / RECORD).read_bytes(), type=_Record)
        whole = all(_sha256(folder / name) == digest for name, digest in record.files.items())
        return record if whole and weights_digest(folder) == record.weights else None
    except (OSError, msgspec.DecodeError, UsageError):
        return None


def _write(folder: Path, source: _Source, made_as: Format, recipe: Recipe, report: Progress) -> str:
    """Make the checkpoint beside ``folder``, then put it in its place; returns its weights' digest."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        fresh = aside / "fresh"
        fresh.mkdir()
        if made_as.library:
            _write_by_library(fresh, aside / "source", source, made_as, report)
        else:
            _write_ours(fresh, source, made_as, recipe.group_size, report)
        digest = weights_digest(fresh)
        files = {file.name: _sha256(file) for file in sorted(fresh.iterdir()) if file.suffix != ".safetensors"}
        write_atomically(fresh / RECORD, msgspec.json.format(msgspec.json.encode(_Record(recipe, digest, files))))
        sync_folder(fresh)
        if folder.exists():
            folder.rename(aside / "damaged")
        fresh.rename(folder)
        sync_folder(folder.parent)
    finally:
        rmtree(aside, ignore_errors=True)
    return digest


def _write_ours(folder: Path, source: _Source, made_as: Format, group: int, report: Progress) -> None:
    tensors: dict[str, Array] = {}
    for done, stored in enumerate(source.stored, start=1):
        weights = source.tensor(stored)
        if made_as.pack is not None and is_projection(stored.name):
            prefix = stored.name.removesuffix("weight")
            packed = made_as.pack(as_float32(weights), group)
            tensors.update({f"{prefix}{name}": array for name, array in packed.items()})
        else:
            tensors[stored.name] = weights
        report(f"rounding to {made_as.name}", done, len(source.stored))
    config = dict(source.config)
    if made_as.declare is not None:
        config["quantization_config"] = declared = made_as.declare(group)
        if "ignore" in declared:  # the others are told by their tensors alone
            declared["ignore"] += _routers(source)
    if made_as.dtype:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = made_as.dtype
    _write_files(folder, source, config)
    write_tensors(folder / "model.safetensors", tensors)


def _routers(source: _Source) -> list[str]:
    """The linear layers that choose experts: they stay as they are."""
    return [stored.name.removesuffix(".weight") for stored in source.stored if stored.name.endswith("gate.weight")]


def _write_by_library(folder: Path, aside: Path, source: _Source, made_as: Format, report: Progress) -> None:
    from fpforensics.prover.checkpoint.library import quantize_folder

    # The library reads a folder, so that what it quantizes is what was padded.
    aside.mkdir()
    tensors = {stored.name: source.tensor(stored) for stored in source.stored}
    write_tensors(aside / "model.safetensors", tensors)
    _write_files(aside, source, source.config)
    with _two_steps(report, f"quantizing with {made_as.library}"):
        quantize_folder(aside, folder, made_as.name)
    _write_files(folder, source, None)


@contextmanager
def _two_steps(report: Progress, stage: str) -> Iterator[None]:
    report(stage, 0, 1)
    yield
    report(stage, 1, 1)


def _write_files(folder: Path, source: _Source, config: Mapping[str, Any] | None) -> None:
    """The tokenizer's files, and ``config.json`` where it is given."""
    for pattern in _COPIED:
        for file in source.path.glob(pattern):
            if file.name not in _NOT_COPIED and not file.name.endswith(".index.json"):
                copyfile(file, folder / file.name)
    if config is not None:
        write_atomically(folder / "config.json", (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())


def _check_library(made_as: Format) -> None:
    needed = (made_as.library, "torch", "transformers") if made_as.library else ()
    for package in needed:
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError(f"format {made_as.name}", package, _INSTALL[made_as.library])


def _tool(made_as: Format) -> str:
    if not made_as.library:
        return f"recipe {_RECIPE}"
    packages = (made_as.library, "transformers", "torch")
    return ", ".join([f"recipe {_RECIPE}", *(f"{name} {importlib.metadata.version(name)}" for name in packages)])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
