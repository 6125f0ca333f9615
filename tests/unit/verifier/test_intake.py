from __future__ import annotations

import os
import shutil
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from assets.generate import FOLDER, GOLDEN, GOLDEN_SIZE, INDEX, Case, Corpus, generate
from hypothesis import example, given, settings
from hypothesis import strategies as st
from synthetic import NONCE, OTHER_KEY, TEST_KEY, Size, trace, write_synthetic

from fpforensics.common import errors
from fpforensics.common.errors import EvidenceError, NonceError, SignatureError, UsageError
from fpforensics.common.evidence import Tensor
from fpforensics.common.keys import Keyring
from fpforensics.common.signals import first_divergence
from fpforensics.verifier.intake import Limits, VerifiedBundle, open_bundle

KEYRING = Keyring([OTHER_KEY.public, TEST_KEY.public])
TRUSTING = Keyring([TEST_KEY.public])
CASES = msgspec.json.decode((FOLDER / INDEX).read_bytes(), type=dict[str, Case])
GOLDEN_BYTES = (FOLDER / GOLDEN).read_bytes()
OPEN_FILES = Path("/proc/self/fd")


def read_everything(path: Path, limits: Limits | None = None) -> str:
    """Every way to use a bundle; the signer's key id."""
    with open_bundle(path, TRUSTING, expected_nonce=NONCE, limits=limits) as bundle:
        bundle.verify_digests()
        bundle.verify_all()
        bundle.references()
        for row in bundle.evidence.rows:
            for reference in bundle.evidence.references:
                bundle.trace(row, reference.id)
                bundle.forcing(row, reference.id)
        return bundle.signer.keyid


def use_without_verify_all(path: Path) -> None:
    with open_bundle(path, TRUSTING, expected_nonce=NONCE) as bundle:
        bundle.references()
        for row in bundle.evidence.rows:
            for reference in bundle.evidence.references:
                bundle.trace(row, reference.id)


def assert_one_clear_line(error: EvidenceError) -> None:
    text = error.diagnostics()
    assert error.exit_code == 4
    assert error.hint
    assert text.isprintable(), text
    assert 15 < len(text) < 400


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    return Path(shutil.copy(FOLDER / GOLDEN, tmp_path / "golden.msgpack"))


def test_the_committed_corpus_is_what_its_generator_writes(tmp_path: Path) -> None:
    generate(tmp_path)
    written = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for path, data in written.items():
        assert (FOLDER / path).read_bytes() == data, f"{path}: run PYTHONPATH=tests python -m assets.generate"
    committed = {path.relative_to(FOLDER) for path in (FOLDER / "hostile").iterdir()}
    assert committed == {path for path in written if path.parts[0] == "hostile"}
    assert sum(map(len, written.values())) < 300_000


def test_a_bundle_from_before_a_config_field_existed_still_opens() -> None:
    """Evidence is never written again: what a later version adds to configs must have a default that it meant."""
    path, keyring = FOLDER / "h100" / "sdpa-eager.msgpack", Keyring.from_paths([FOLDER / "h100" / "prover.key.pub"])
    assert b"emulate_tensor_parallel" not in path.read_bytes()
    with open_bundle(path, keyring) as bundle:
        assert {row.config.emulate_tensor_parallel for row in bundle.evidence.rows} == {1}


def test_the_golden_bundle_gives_back_what_was_recorded(golden: Path) -> None:
    with open_bundle(golden, KEYRING, expected_nonce=NONCE) as bundle:
        for verify in (bundle.verify_digests, bundle.verify_all):
            seen: list[tuple[int, int]] = []
            verify(lambda done, total: seen.append((done, total)))  # noqa: B023
            assert seen[-1][0] == seen[-1][1] > 0
        assert bundle.signer == TEST_KEY.public
        assert bundle.digest.startswith("sha256:")
        assert [reference.id for reference in bundle.references()] == ["ref_0", "ref_1"]
        row = bundle.evidence.rows[1]
        recorded = trace(GOLDEN_SIZE, 1, 1)
        read = bundle.trace(row, "ref_1")
        assert first_divergence(recorded, read) is None
        forcing = bundle.forcing(row, "ref_1")
        assert np.array_equal(forcing.output_ids, recorded.output_ids)
        assert np.array_equal(forcing.positions["decode"], [6, 7, 8])
        assert np.array_equal(forcing.claimed_ids["prefill"], recorded.prefill.logprob_ids)


@pytest.mark.parametrize("name", CASES)
def test_hostile_bundles(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    path = Path(shutil.copy(FOLDER / "hostile" / f"{name}.msgpack", tmp_path / "bundle.msgpack"))
    if not case.error:
        assert read_everything(path) == TEST_KEY.keyid
        return
    for use in (read_everything, use_without_verify_all):
        with pytest.raises(getattr(errors, case.error)) as caught:
            use(path)
        assert type(caught.value).__name__ == case.error
        assert case.message in caught.value.diagnostics()
        assert_one_clear_line(caught.value)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("percent", range(100))
def test_truncation_at_every_percent(tmp_path: Path, percent: int) -> None:
    path = tmp_path / "cut.msgpack"
    path.write_bytes(GOLDEN_BYTES[: len(GOLDEN_BYTES) * percent // 100])
    with pytest.raises(EvidenceError, match=r"is cut short|is empty") as caught:
        read_everything(path)
    assert_one_clear_line(caught.value)


@settings(deadline=None, max_examples=300)
@given(st.integers(0, len(GOLDEN_BYTES) - 1), st.integers(1, 255))
def test_any_flipped_byte_is_caught_unless_it_is_in_the_hint(
    tmp_path_factory: pytest.TempPathFactory, offset: int, mask: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "flipped.msgpack"
    path.write_bytes(GOLDEN_BYTES[:offset] + bytes([GOLDEN_BYTES[offset] ^ mask]) + GOLDEN_BYTES[offset + 1 :])
    hint = GOLDEN_BYTES.index(TEST_KEY.keyid.encode())
    try:
        assert read_everything(path) == TEST_KEY.keyid
    except EvidenceError as error:
        assert_one_clear_line(error)
    else:
        assert hint <= offset < hint + len(TEST_KEY.keyid)


@settings(deadline=None, max_examples=200)
@given(st.integers(0, len(GOLDEN_BYTES)), st.integers(0, 64), st.binary(max_size=64))
def test_any_splice_is_an_evidence_error(
    tmp_path_factory: pytest.TempPathFactory, offset: int, removed: int, inserted: bytes
) -> None:
    spliced = GOLDEN_BYTES[:offset] + inserted + GOLDEN_BYTES[offset + removed :]
    hint = GOLDEN_BYTES.index(TEST_KEY.keyid.encode())
    if spliced == GOLDEN_BYTES or hint - 2 <= offset <= hint + 64:
        return
    path = tmp_path_factory.getbasetemp() / "spliced.msgpack"
    path.write_bytes(spliced)
    with pytest.raises(EvidenceError):
        read_everything(path)


JSON_NOISE = (
    st.binary(max_size=40)
    | st.text(alphabet='{}[]",:\\-0123456789.eE\x00é', max_size=40).map(lambda text: text.encode())
    | st.sampled_from([b"NaN", b"null", b"1e400", b'"\\ud800"', b"[]", b"-1", b"9" * 30, b"true"])
)


@settings(deadline=None, max_examples=300)
@given(st.data())
@example(None)
def test_any_manifest_that_a_trusted_key_signs_is_evidence_or_an_evidence_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject | None
) -> None:
    corpus = CORPUS
    payload = corpus.envelope.payload
    if data is not None:
        offset = data.draw(st.integers(0, len(payload)))
        removed = data.draw(st.integers(0, 30))
        payload = payload[:offset] + data.draw(JSON_NOISE) + payload[offset + removed :]
    path = tmp_path_factory.getbasetemp() / "signed.msgpack"
    path.write_bytes(corpus.signed(payload))
    try:
        read_everything(path)
    except EvidenceError as error:
        assert_one_clear_line(error)


CORPUS = Corpus()


def test_another_challenge_is_refused(golden: Path) -> None:
    with pytest.raises(NonceError, match="answers nonce"):
        open_bundle(golden, KEYRING, expected_nonce="ff")
    with pytest.raises(NonceError):
        open_bundle(golden, KEYRING, expected_nonce="")
    with open_bundle(golden, KEYRING) as bundle:
        assert bundle.evidence.nonce == NONCE


def test_no_key_trusts_nobody(golden: Path) -> None:
    with pytest.raises(SignatureError, match=TEST_KEY.keyid):
        open_bundle(golden, Keyring())


def test_only_the_intake_makes_verified_bundles(golden: Path) -> None:
    with open_bundle(golden, KEYRING) as bundle:
        with pytest.raises(TypeError, match="open_bundle"):
            VerifiedBundle(object(), bundle._file, bundle.evidence, bundle.signer, bundle.digest, {})
        with pytest.raises(ValueError, match="read-only"):
            bundle.trace(bundle.evidence.rows[0], "ref_0").output_ids[0] = 1


def test_what_is_not_there_is_named(golden: Path, tmp_path: Path) -> None:
    with open_bundle(golden, KEYRING) as bundle:
        with pytest.raises(EvidenceError, match="no trace of 'ref_7'"):
            bundle.trace(bundle.evidence.rows[0], "ref_7")
        with pytest.raises(EvidenceError, match="no reference 'ref_7'"):
            bundle.reference("ref_7")
        with pytest.raises(EvidenceError, match="no blob"):
            bundle.array(Tensor(sha256="0" * 64, dtype="f32", shape=(1,)))
        known = bundle.evidence.rows[0].traces[0].output_ids
        with pytest.raises(EvidenceError, match="has 16 bytes"):
            bundle.array(Tensor(sha256=known.sha256, dtype="i32", shape=(5,)))
    with pytest.raises(UsageError, match="does not exist"):
        open_bundle(tmp_path / "missing.msgpack", KEYRING)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="is not a file"):
        open_bundle(tmp_path / "pipe", KEYRING)


def test_a_blob_changed_after_opening_is_noticed_when_it_is_used(golden: Path) -> None:
    with open_bundle(golden, KEYRING) as bundle:
        row = bundle.evidence.rows[0]
        bundle.trace(row, "ref_0")
        with golden.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\xff")
        last = bundle.evidence.rows[1].traces[1].decode["key_vectors/last"]
        with pytest.raises(EvidenceError, match="digest differs"):
            bundle.array(last)
        with golden.open("r+b") as file:
            file.truncate(len(GOLDEN_BYTES) - 1)
        with pytest.raises(EvidenceError, match="cut short"):
            bundle.array(last)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(file_bytes=1000), f"has {len(GOLDEN_BYTES)} bytes"),
        (Limits(manifest_bytes=1000), "bytes for the manifest"),
        (Limits(tensors=10), "claims 62 blobs"),
        (Limits(rows=1), "rows: 2"),
    ],
    ids=["file", "manifest", "tensors", "rows"],
)
def test_limits_are_the_callers(golden: Path, limits: Limits, message: str) -> None:
    with pytest.raises(EvidenceError, match=message):
        open_bundle(golden, KEYRING, limits=limits)


@pytest.mark.parametrize(
    "name",
    [
        "claims-2-40-elements",
        "huge-bin32-payload",
        "huge-bin32-blob",
        "huge-map32-blobs",
        "nested-manifest",
        "nested-frame",
    ],
)
def test_refusing_takes_little_memory(name: str) -> None:
    path = FOLDER / "hostile" / f"{name}.msgpack"
    tracemalloc.start()
    try:
        with pytest.raises(EvidenceError):
            open_bundle(path, TRUSTING)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 << 20


def test_verifying_takes_little_memory_whatever_the_size(tmp_path: Path) -> None:
    path = tmp_path / "large.msgpack"
    write_synthetic(path, Size(prompt=64, prefill=64, layers=("1",), hidden=1 << 17, key=1 << 10))
    assert path.stat().st_size > 16 << 20
    with open_bundle(path, TRUSTING) as bundle:
        tracemalloc.start()
        try:
            bundle.verify_all()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < 2 << 20


@pytest.mark.skipif(not OPEN_FILES.exists(), reason="needs /proc")
def test_files_are_closed_after_a_refusal() -> None:
    before = len(list(OPEN_FILES.iterdir()))
    for name in CASES:
        with suppress(EvidenceError):
            open_bundle(FOLDER / "hostile" / f"{name}.msgpack", TRUSTING, expected_nonce=NONCE).close()
    assert len(list(OPEN_FILES.iterdir())) == before


def test_a_blob_that_two_tensors_share_obeys_both_rules(tmp_path: Path) -> None:
    """One blob as finite floats and as token ids: each mention is checked for itself."""
    corpus = CORPUS

    def share(manifest: dict[str, Any]) -> None:
        trace = manifest["predicate"]["rows"][0]["traces"][0]
        trace["decode"]["chosen_logprobs"]["sha256"] = trace["decode"]["positions"]["sha256"]

    dropped = bytes.fromhex(corpus.manifest["predicate"]["rows"][0]["traces"][0]["decode"]["chosen_logprobs"]["sha256"])
    blobs = [blob for blob in corpus.blobs if blob[0] != dropped]
    path = tmp_path / "shared.msgpack"
    path.write_bytes(corpus.edited(share, blobs))
    # the bits of small integers are tiny positive floats: log-probabilities within the rounding that is
    # allowed
    assert read_everything(path) == TEST_KEY.keyid
