"""Tensors of a safetensors checkpoint as NumPy arrays, read one at a time, and written as one file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from fpforensics.common.errors import UsageError, shorten
from fpforensics.common.signals import Array
from fpforensics.common.weights import StoredTensor

_DTYPES: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I8": np.dtype("i1"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_FLOATS = ("F64", "F32", "F16", "BF16")


def read_floats(stored: StoredTensor) -> Array:
    """One floating tensor, in its own dtype. Raises :class:`UsageError` for one of integers or of eight bits."""
    if stored.dtype not in _FLOATS:
        raise UsageError(
            f"tensor {shorten(stored.name)!r} of {stored.file} is stored as {stored.dtype}",
            "give an unquantized checkpoint",
        )
    with stored.file.open("rb") as file:
        file.seek(stored.begin)
        raw = file.read(stored.end - stored.begin)
    return np.frombuffer(raw, _DTYPES[stored.dtype]).reshape(stored.shape)


def write_tensors(path: Path, tensors: Mapping[str, Array]) -> None:
    """One safetensors file, sorted by name and synced to disk: the same tensors are the same bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(tensors):
        array = tensors[name]
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": _NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name in sorted(tensors):
            file.write(np.ascontiguousarray(tensors[name]).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
