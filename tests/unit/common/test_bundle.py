from __future__ import annotations

import hashlib
import os
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import NONCE, TEST_KEY, Size, evidence, trace, write_synthetic

from fpforensics.common.bundle import BundleWriter
from fpforensics.common.bundle_file import BundleFile
from fpforensics.common.errors import Error, EvidenceError, UsageError
from fpforensics.common.evidence import Evidence
from fpforensics.common.frame import blob_header, head
from fpforensics.common.keys import Keyring
from fpforensics.common.signals import DTYPES, Trace
from fpforensics.verifier.intake import open_bundle

KEYRING = Keyring([TEST_KEY.public])


class Plain(msgspec.Struct, forbid_unknown_fields=True):
    format: str
    envelope: dict[str, Any]
    blobs: dict[bytes, bytes]


def assert_same(a: Trace, b: Trace) -> None:
    assert np.array_equal(a.output_ids, b.output_ids)
    for left, right in ((a.prefill, b.prefill), (a.decode, b.decode)):
        assert list(left.tensors()) == list(right.tensors())
        for name, array in left.tensors().items():
            assert right.tensors()[name].dtype == array.dtype
            assert right.tensors()[name].tobytes() == array.tobytes(), name


@settings(deadline=None)
@given(
    size=st.builds(
        Size,
        rows=st.integers(1, 3),
        references=st.integers(1, 3),
        prompt=st.integers(1, 9).map(lambda extra: extra + 3),
        output=st.integers(1, 9),
        prefill=st.integers(1, 4),
        layers=st.sampled_from([(), ("1",), ("1", "4", "last")]),
        top_k=st.integers(1, 5),
        dtype=st.sampled_from(["bf16", "f16", "f32", "f64"]),
        logits=st.booleans(),
    )
)
def test_what_goes_in_comes_out_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, size: Size) -> None:
    path = tmp_path_factory.getbasetemp() / "round-trip.msgpack"
    digest = write_synthetic(path, size)
    with open_bundle(path, KEYRING, expected_nonce=NONCE) as bundle:
        bundle.verify_all()
        assert bundle.digest == digest
        for number, row in enumerate(bundle.evidence.rows):
            for reference in range(size.references):
                assert_same(bundle.trace(row, f"ref_{reference}"), trace(size, number, reference))


def test_any_messagepack_library_can_read_it(tmp_path: Path) -> None:
    write_synthetic(tmp_path / "b.msgpack")
    plain = msgspec.msgpack.decode((tmp_path / "b.msgpack").read_bytes(), type=Plain)
    assert plain.format == "fpforensics-bundle/1"
    assert set(plain.envelope) == {"payloadType", "payload", "signatures"}
    assert all(hashlib.sha256(data).digest() == digest for digest, data in plain.blobs.items())


def test_the_same_evidence_gives_the_same_bytes(tmp_path: Path) -> None:
    write_synthetic(tmp_path / "a.msgpack", Size(rows=2))
    write_synthetic(tmp_path / "b.msgpack", Size(rows=2))
    assert (tmp_path / "a.msgpack").read_bytes() == (tmp_path / "b.msgpack").read_bytes()


def test_equal_arrays_are_stored_once_and_unused_ones_not_at_all(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "b.msgpack") as writer:
        first = writer.add(np.arange(6, dtype=np.int32))
        again = writer.add(np.arange(6, dtype=np.int32).reshape(2, 3))
        assert (first.sha256, again.shape) == (again.sha256, (2, 3))
        writer.finish(evidence(Size(), writer), TEST_KEY)
    with BundleFile(tmp_path / "b.msgpack") as file:
        digests = [blob.sha256 for blob in file.blobs()]
    assert len(digests) == len(set(digests))
    assert first.sha256 not in digests


def test_layout_and_byte_order_of_memory_do_not_matter(tmp_path: Path) -> None:
    plain = np.arange(12, dtype=np.float32).reshape(3, 4)
    with BundleWriter(tmp_path / "b.msgpack") as writer:
        expected = writer.add(plain)
        assert writer.add(np.asfortranarray(plain)) == expected
        assert writer.add(np.repeat(plain, 2, axis=1)[:, ::2]) == expected
        assert writer.add(plain.astype(">f4")) == expected


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32", "f64"])
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused_at_once(tmp_path: Path, dtype: str, value: float) -> None:
    array = np.zeros((3, 5), DTYPES[dtype])
    with BundleWriter(tmp_path / "b.msgpack") as writer:
        extreme = ml_dtypes.finfo(DTYPES[dtype]) if dtype == "bf16" else np.finfo(DTYPES[dtype])
        array[0, :2] = extreme.max, extreme.min
        writer.add(array)
        array[2, 3] = value
        with pytest.raises(EvidenceError, match="NaN or infinity"):
            writer.add(array)


def test_a_trace_that_is_not_finite_is_named(tmp_path: Path) -> None:
    broken = trace(Size(), 0, 0)
    broken.decode.hidden_states["1"][1, 2] = float("inf")
    with (
        BundleWriter(tmp_path / "b.msgpack") as writer,
        pytest.raises(EvidenceError, match="ref_0, decode, hidden_states/1"),
    ):
        writer.add_trace(broken)


def test_foreign_dtypes_are_refused(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "b.msgpack") as writer, pytest.raises(Error, match="dtype int64"):
        writer.add(np.arange(3, dtype=np.int64))


def break_shape(good: Evidence) -> Evidence:
    return msgspec.structs.replace(good, rows=())


def break_float(good: Evidence) -> Evidence:
    repetitions = msgspec.structs.replace(good.rows[0].repetitions, wall_mean=float("nan"))
    return msgspec.structs.replace(good, rows=(msgspec.structs.replace(good.rows[0], repetitions=repetitions),))


@pytest.mark.parametrize("change", [break_shape, break_float])
@pytest.mark.parametrize("existing", [b"", b"an older bundle"])
def test_what_a_verifier_would_refuse_is_never_written(tmp_path: Path, change: Any, existing: bytes) -> None:
    path = tmp_path / "b.msgpack"
    if existing:
        path.write_bytes(existing)
    with pytest.raises(EvidenceError):
        write_synthetic(path, change=change)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == (
        [("b.msgpack", existing)] if existing else []
    )


def test_a_tensor_that_was_never_added_is_refused(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "a.msgpack") as writer:
        described = evidence(Size(), writer)
    with (
        BundleWriter(tmp_path / "b.msgpack") as empty,
        pytest.raises(EvidenceError, match="never added"),
    ):
        empty.finish(described, TEST_KEY)
    assert list(tmp_path.iterdir()) == []


def test_an_older_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "b.msgpack"
    write_synthetic(path, Size(rows=3))
    with path.open("rb") as reader:
        older = reader.read(10)
        write_synthetic(path)
        assert reader.seek(0) == 0
        assert reader.read(10) == older  # who had it open keeps the old one
    with open_bundle(path, KEYRING) as bundle:
        bundle.verify_all()
    assert [file.name for file in tmp_path.iterdir()] == ["b.msgpack"]


def test_an_interrupted_run_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), BundleWriter(tmp_path / "b.msgpack") as writer:
        evidence(Size(), writer)
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_missing_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot write"):
        BundleWriter(tmp_path / "missing" / "b.msgpack")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_a_usage_error_and_leaves_nothing(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "b.msgpack") as writer:
        good = evidence(Size(), writer)
        descriptor = os.open("/dev/full", os.O_RDWR)
        os.dup2(descriptor, writer._spool.fileno())
        os.close(descriptor)
        with pytest.raises(UsageError, match="No space left"):
            writer.add(np.arange(5, dtype=np.int32))
        assert good.references
    assert list(tmp_path.iterdir()) == []


def test_memory_holds_one_array_at_a_time(tmp_path: Path) -> None:
    array = np.zeros(1 << 20, np.float32)  # 4 MiB
    tracemalloc.start()
    try:
        with BundleWriter(tmp_path / "b.msgpack") as writer:
            for number in range(12):
                array[0] = number
                writer.add(array)
            _, peak = tracemalloc.get_traced_memory()
            assert writer._end > 48 << 20
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20


@pytest.mark.parametrize("count", [0, 15, 16, 65535, 65536])
def test_headers_are_those_of_messagepack(tmp_path: Path, count: int) -> None:
    write_synthetic(tmp_path / "b.msgpack")
    with BundleFile(tmp_path / "b.msgpack") as file:
        envelope = file.envelope
    encoded = msgspec.msgpack.encode(dict.fromkeys(range(count)))
    header = encoded[: 1 if count < 16 else 3 if count < 65536 else 5]
    assert head(envelope, count).endswith(b"\xa5blobs" + header)
    digest = bytes(32)
    assert blob_header(digest, count) + bytes(count) == msgspec.msgpack.encode({digest: bytes(count)})[1:]
