"""The weights digest: the same however tensors are split, different for any change, nothing malformed read."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import save, save_file

from fpforensics.common.errors import UsageError
from fpforensics.common.weights import MAX_HEADER_BYTES, weights_digest

Tensors = dict[str, NDArray[Any]]
DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16, np.int8, np.uint8, np.int64)


@st.composite
def tensor_sets(draw: st.DrawFn) -> Tensors:
    names = draw(
        st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=8), min_size=2, max_size=5, unique=True)
    )
    tensors: Tensors = {}
    for name in names:
        if name == "__metadata__":
            continue
        dtype = np.dtype(draw(st.sampled_from(DTYPES)))
        shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
        size = int(np.prod(shape)) * dtype.itemsize
        raw = draw(st.binary(min_size=size, max_size=size))
        tensors[name] = np.frombuffer(raw, dtype).reshape(shape)
    return tensors


def write_sharded(folder: Path, shards: Mapping[str, Tensors]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_single(folder: Path, tensors: Tensors) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    return folder


@settings(max_examples=40, deadline=None)
@given(tensors=tensor_sets(), data=st.data())
def test_split_does_not_matter_and_every_byte_does(
    tmp_path_factory: pytest.TempPathFactory, tensors: Tensors, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("weights")
    names = sorted(tensors)
    cut = data.draw(st.integers(1, len(names) - 1)) if len(names) > 1 else 1
    single = weights_digest(write_single(folder / "single", tensors))
    first, second = ({name: tensors[name] for name in part} for part in (names[:cut], names[cut:]))
    sharded = write_sharded(
        folder / "sharded",
        {"a.safetensors": second, "b.safetensors": first} if second else {"a.safetensors": first},
    )
    assert weights_digest(sharded) == single

    filled = [name for name in names if tensors[name].size]
    if filled:
        name = data.draw(st.sampled_from(filled))
        raw = bytearray(tensors[name].tobytes())
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        changed = tensors | {name: np.frombuffer(bytes(raw), tensors[name].dtype).reshape(tensors[name].shape)}
        assert weights_digest(write_single(folder / "changed", changed)) != single


@pytest.mark.parametrize(
    "other",
    [
        {"x": np.arange(4, dtype=np.float32).reshape(2, 2), "y": np.zeros(2, np.float32)},
        {"x": np.arange(4, dtype=np.float32).view(np.int32), "y": np.zeros(2, np.float32)},
        {"z": np.arange(4, dtype=np.float32), "y": np.zeros(2, np.float32)},
        {"x": np.arange(4, dtype=np.float32)},
        {"y": np.arange(4, dtype=np.float32), "x": np.zeros(2, np.float32)},
    ],
    ids=["shape", "dtype", "name", "fewer", "swapped"],
)
def test_name_dtype_and_shape_count(tmp_path: Path, other: Tensors) -> None:
    base = {"x": np.arange(4, dtype=np.float32), "y": np.zeros(2, np.float32)}
    assert weights_digest(write_single(tmp_path / "a", base)) != weights_digest(write_single(tmp_path / "b", other))


def test_metadata_does_not_count(tmp_path: Path) -> None:
    tensors = {"x": np.arange(4, dtype=np.float32)}
    for name, metadata in (("a", {"format": "pt"}), ("b", {"format": "np", "note": "moved"})):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors", metadata=metadata)
    assert weights_digest(tmp_path / "a") == weights_digest(tmp_path / "b")


def test_digest_is_what_its_docstring_says(tmp_path: Path) -> None:
    # Bundles in the world hold these: the encoding may not change.
    tensors: Tensors = {"b": np.arange(3, dtype=np.float32), "a": np.ones((2, 1), np.int8)}
    hashed = {name: hashlib.sha256(tensor.tobytes()).hexdigest() for name, tensor in tensors.items()}
    lines = f'["a", "I8", [2, 1], "{hashed["a"]}"]\n["b", "F32", [3], "{hashed["b"]}"]\n'
    expected = f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"
    assert weights_digest(write_single(tmp_path, tensors)) == expected


def age(file: Path) -> None:
    """Set a file's time back: a digest is kept only for files that have come to rest."""
    os.utime(file, ns=(10**18, 10**18))


def test_cached_until_a_file_changes(tmp_path: Path, session_cache: Path) -> None:
    folder = write_single(tmp_path, {"x": np.arange(4, dtype=np.float32)})
    file = folder / "model.safetensors"
    age(file)
    kept = set((session_cache / "digests").glob("*.json"))
    before = weights_digest(folder)
    (entry,) = set((session_cache / "digests").glob("*.json")) - kept
    # The entry is what answers: one that says otherwise is believed while the files are the same.
    entry.write_text(entry.read_text().replace(before, "sha256:from-the-cache"))
    assert weights_digest(folder) == "sha256:from-the-cache"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    age(file)  # same size, same modification time
    assert weights_digest(folder) not in (before, "sha256:from-the-cache")


def test_damaged_cache_entry_is_ignored(tmp_path: Path, session_cache: Path) -> None:
    folder = write_single(tmp_path, {"x": np.arange(5, dtype=np.float32)})
    age(folder / "model.safetensors")
    kept = set((session_cache / "digests").glob("*.json"))
    digest = weights_digest(folder)
    (entry,) = set((session_cache / "digests").glob("*.json")) - kept
    entry.write_text("{")
    assert weights_digest(folder) == digest


def test_unwritable_cache_only_costs_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_single(tmp_path / "model", {"x": np.arange(6, dtype=np.float32)})
    age(folder / "model.safetensors")
    (tmp_path / "file").write_text("not a folder")
    expected = weights_digest(folder)
    monkeypatch.setenv("FPFORENSICS_CACHE", str(tmp_path / "file" / "cache"))
    assert weights_digest(folder) == expected


def test_needs_no_torch(tmp_path: Path) -> None:
    folder = write_single(tmp_path, {"x": np.arange(4, dtype=np.float32)})
    program = (
        "import sys; from pathlib import Path; from fpforensics.common.models import weights_digest;"
        f"print(weights_digest(Path({str(folder)!r})));"
        "assert not {'torch', 'transformers', 'safetensors'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == weights_digest(folder), done.stderr


ONE = {"x": np.arange(4, dtype=np.float32)}
GOOD = save(ONE)
HEADER = int.from_bytes(GOOD[:8], "little")


def with_header(**entry: object) -> bytes:
    raw = json.dumps({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | entry}).encode()
    return len(raw).to_bytes(8, "little") + raw + bytes(16)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        GOOD[:7],
        GOOD[:-1],
        GOOD[: 8 + HEADER // 2],
        (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + GOOD[8:],
        (2**64 - 1).to_bytes(8, "little") + GOOD[8:],
        b"\x80\x04" + GOOD,
        (2).to_bytes(8, "little") + b"[]",
        (4).to_bytes(8, "little") + b'"ab"',
        (200_000).to_bytes(8, "little") + b"[" * 200_000,
        with_header(data_offsets=[0, 12]),
        with_header(data_offsets=[16, 0]),
        with_header(data_offsets=[-16, 0]),
        with_header(data_offsets=[8, 24]),
        with_header(data_offsets=[0]),
        with_header(shape=[2**40]),
        with_header(shape=[-4]),
        with_header(shape=[True, 4]),
        with_header(shape="4"),
        with_header(dtype="F31x"),
        with_header(dtype=None),
        GOOD[:8] + GOOD[8:].replace(b'"shape"', b'"dtype"'),
    ],
)
def test_malformed_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UsageError, match=r"model\.safetensors"):
        weights_digest(tmp_path)


@settings(max_examples=200, deadline=None)
@given(at=st.integers(0, 8 + HEADER - 1), value=st.integers(0, 255))
def test_no_header_byte_makes_it_crash(tmp_path_factory: pytest.TempPathFactory, at: int, value: int) -> None:
    folder = tmp_path_factory.mktemp("flipped")
    (folder / "model.safetensors").write_bytes(GOOD[:at] + bytes([value]) + GOOD[at + 1 :])
    try:
        assert weights_digest(folder).startswith("sha256:")
    except UsageError as error:
        assert "model.safetensors" in error.diagnostics()


def pickled(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def adapter(folder: Path) -> None:
    write_single(folder, ONE)
    (folder / "adapter_config.json").write_text("{}")


def repeated(folder: Path) -> None:
    save_file(ONE, folder / "a.safetensors")
    save_file(ONE, folder / "b.safetensors")


def missing_shard(folder: Path) -> None:
    write_sharded(folder, {"a.safetensors": ONE, "b.safetensors": {"y": ONE["x"]}})
    (folder / "b.safetensors").unlink()


def two_sets(folder: Path) -> None:
    write_sharded(folder, {"a.safetensors": ONE})
    write_single(folder, ONE)


def bad_index(folder: Path) -> None:
    write_single(folder, ONE)
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text("[1]")


def escaping_index(folder: Path) -> None:
    save_file(ONE, folder.parent / "outside.safetensors")
    write_sharded(folder, {"a.safetensors": ONE})
    index = {"weight_map": {"x": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def no_tensors(folder: Path) -> None:
    save_file({}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (pickled, "pickled checkpoints are never loaded"),
        (adapter, "adapter"),
        (repeated, "stored more than once"),
        (missing_shard, r"b\.safetensors"),
        (two_sets, "more than one set"),
        (bad_index, "not a safetensors index"),
        (escaping_index, "which is not there"),
        (no_tensors, "holds no tensors"),
        (lambda folder: None, r"no \*\.safetensors"),
        (lambda folder: folder.rmdir(), "no checkpoint folder"),
    ],
)
def test_unclear_folders_are_refused(tmp_path: Path, make: Callable[[Path], None], says: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    make(folder)
    with pytest.raises(UsageError, match=says):
        weights_digest(folder)
