"""Good evidence gets in once and stays; nothing else gets in."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from rpc_world import (
    PROVER_KEY,
    STRANGER_KEY,
    write_bundle,
)
from service_world import WIDE, is_serving
from verifier_world import (
    VERIFIERS,
    Checker,
    assert_refused,
    eventually,
    header,
    kept,
    raw,
    upload,
)

from fpforensics.common.engines.base import Host
from fpforensics.common.errors import (
    LimitError,
    NonceError,
    SignatureError,
    UnknownModelError,
)
from fpforensics.common.rpc import CHUNK_BYTES
from fpforensics.common.serving import RunningServer
from fpforensics.proto import audit_pb2 as pb
from fpforensics.proto.evidence_pb2 import Chunk
from fpforensics.verifier.auditor import AuditorClient
from fpforensics.verifier.check import CheckPlan
from fpforensics.verifier.client import VerifierClient
from fpforensics.verifier.service import MAX_UPLOADS, SERVICE, VerifierConfig, serve_verifier
from fpforensics.verifier.verdict import open_verdict

# --- the main path ---


def test_from_challenge_to_audited_verdict(
    client: VerifierClient, auditor: AuditorClient, checker: Checker, tmp_path: Path
) -> None:
    nonce = client.request_nonce()
    digest = write_bundle(tmp_path / "b", nonce=nonce, width=WIDE)
    sent: list[int] = []
    submission = client.submit_bundle(tmp_path / "b", lambda _stage, done, _total: sent.append(done))
    assert (submission.bundle_digest, submission.signer, submission.challenged) == (digest, PROVER_KEY.keyid, True)
    assert len(sent) > 4
    assert sent[-1] == (tmp_path / "b").stat().st_size
    assert (tmp_path / "store" / "bundles" / f"{digest[7:]}.msgpack").read_bytes() == (tmp_path / "b").read_bytes()

    stages: list[str] = []
    plan = CheckPlan(claim="quant=none", lineup=("attn=eager", "attn=sdpa"), mode="prefill", row="attn=sdpa,dtype=bf16")
    envelope = client.check(digest, plan, lambda stage, _done, _total: stages.append(stage))
    assert checker.plans == [plan]
    assert stages

    verdict = open_verdict(envelope, VERIFIERS)
    assert verdict.predicate.result.bundle_digest == digest
    assert verdict.predicate.result.nonce == nonce
    assert verdict.predicate.challenged
    assert verdict.predicate.sequence == 1
    assert auditor.get(verdict.predicate.verdict_id) == verdict
    assert list(auditor.list()) == [verdict]


def test_an_unchallenged_bundle_is_said_to_be_one(client: VerifierClient, auditor: AuditorClient, bundle: Path) -> None:
    submission = client.submit_bundle(bundle)
    assert not submission.challenged
    client.check(submission.bundle_digest, CheckPlan())
    assert [verdict.predicate.challenged for verdict in auditor.list()] == [False]


def test_the_same_bundle_again_is_the_same_answer(client: VerifierClient, bundle: Path, tmp_path: Path) -> None:
    assert client.submit_bundle(bundle) == client.submit_bundle(bundle)
    assert len(kept(tmp_path)) == 1


def test_concurrent_submitters_all_get_in(server: RunningServer, tmp_path: Path) -> None:
    for number in range(6):
        write_bundle(tmp_path / f"b{number}", seed=number, width=20_000)

    def submit(number: int) -> str:
        with VerifierClient(f"127.0.0.1:{server.port}") as client:
            return client.submit_bundle(tmp_path / f"b{number % 6}").bundle_digest

    with ThreadPoolExecutor(6) as pool:
        digests = list(pool.map(submit, range(12)))
    assert len(set(digests)) == 6
    assert len(kept(tmp_path)) == 6


def test_everything_survives_a_restart(config: VerifierConfig, bundle: Path) -> None:
    with serve_verifier(config) as server, VerifierClient(f"127.0.0.1:{server.port}") as client:
        digest = client.submit_bundle(bundle).bundle_digest
        first = client.check(digest, CheckPlan())
    with serve_verifier(config) as server, VerifierClient(f"127.0.0.1:{server.port}") as client:
        second = client.check(digest, CheckPlan())
        with AuditorClient(f"127.0.0.1:{server.port}", VERIFIERS) as auditor:
            assert [verdict.envelope for verdict in auditor.list()] == [first, second]


# --- hostile uploads: the right status, nothing written, alive afterwards ---


CODES = grpc.StatusCode
SHAPES: dict[str, tuple[Callable[[bytes], Iterator[pb.SubmitRequest]], grpc.StatusCode]] = {
    "nothing": (lambda _: iter(()), CODES.INVALID_ARGUMENT),
    "no header": (lambda good: iter(list(upload(good))[1:]), CODES.INVALID_ARGUMENT),
    "an empty header": (lambda good: iter([pb.SubmitRequest(header=pb.SubmitHeader())]), CODES.INVALID_ARGUMENT),
    "an empty part": (lambda good: iter([header(good), pb.SubmitRequest()]), CODES.INVALID_ARGUMENT),
    "two headers": (lambda good: iter([header(good), header(good)]), CODES.INVALID_ARGUMENT),
    "an oversized chunk": (lambda _: upload(b"x" * (CHUNK_BYTES + 1), CHUNK_BYTES + 1), CODES.RESOURCE_EXHAUSTED),
    "a message over gRPC's limit": (lambda _: upload(b"x" * (4 << 20), 4 << 20), CODES.RESOURCE_EXHAUSTED),
    "a promise of 2^63 bytes": (lambda _: iter([header(b"x", size=2**63)]), CODES.RESOURCE_EXHAUSTED),
    "truncated": (lambda good: iter(list(upload(good, 500))[:-1]), CODES.INVALID_ARGUMENT),
    "an empty chunk": (lambda good: iter([header(good), pb.SubmitRequest(chunk=Chunk())]), CODES.INVALID_ARGUMENT),
    "another digest": (lambda good: upload(good, sha256=b"x" * 32), CODES.INVALID_ARGUMENT),
    "garbage": (lambda _: upload(os.urandom(5000)), CODES.INVALID_ARGUMENT),
    "a deep nest": (lambda _: upload(b"\x91" * 10_000), CODES.INVALID_ARGUMENT),
    "cut in the file": (lambda good: upload(good[:-1]), CODES.INVALID_ARGUMENT),
    "a longer file": (lambda good: upload(good + b"x"), CODES.INVALID_ARGUMENT),
}


@pytest.mark.parametrize(("shape", "code"), SHAPES.values(), ids=SHAPES)
def test_a_hostile_upload_is_refused(
    server: RunningServer,
    bundle: Path,
    tmp_path: Path,
    shape: Callable[[bytes], Iterator[pb.SubmitRequest]],
    code: grpc.StatusCode,
) -> None:
    assert_refused(server, shape(bundle.read_bytes()), code, tmp_path)


def test_more_bytes_than_promised_are_refused(server: RunningServer, bundle: Path, tmp_path: Path) -> None:
    content = bundle.read_bytes()
    requests = upload(content, 500, size=len(content) - 100)
    assert_refused(server, requests, CODES.RESOURCE_EXHAUSTED, tmp_path)


def test_more_bytes_than_the_cap_are_refused(config: VerifierConfig, bundle: Path, tmp_path: Path) -> None:
    small = replace(config, max_bundle_bytes=bundle.stat().st_size)
    with serve_verifier(small) as server, VerifierClient(f"127.0.0.1:{server.port}") as client:
        write_bundle(tmp_path / "large", width=1000)
        with pytest.raises(LimitError, match="a bundle of"):
            client.submit_bundle(tmp_path / "large")
        assert kept(tmp_path) == []
        client.submit_bundle(bundle)


def test_a_flipped_byte_anywhere_is_refused(server: RunningServer, bundle: Path, tmp_path: Path) -> None:
    content = bundle.read_bytes()
    codes = {CODES.INVALID_ARGUMENT, CODES.PERMISSION_DENIED}
    hint = content.index(PROVER_KEY.keyid.encode())  # the only bytes that nothing depends on
    with raw(server.port) as stub:
        for at in range(0, len(content), len(content) // 60):
            if hint <= at < hint + len(PROVER_KEY.keyid):
                continue
            changed = bytearray(content)
            changed[at] ^= 0x01
            with pytest.raises(grpc.RpcError) as caught:
                stub.SubmitBundle(upload(bytes(changed)), timeout=30)
            assert caught.value.code() in codes, at
    assert kept(tmp_path) == []
    assert is_serving(server, SERVICE)


def test_an_unknown_key_is_refused(client: VerifierClient, tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", key=STRANGER_KEY)
    with pytest.raises(SignatureError):
        client.submit_bundle(tmp_path / "b")
    assert kept(tmp_path) == []


@pytest.mark.parametrize("model", ["evil/weights", "/etc", "../smollm2-135m"])
def test_a_model_that_the_verifier_lacks_is_refused(client: VerifierClient, tmp_path: Path, model: str) -> None:
    write_bundle(tmp_path / "b", model=model)
    with pytest.raises(UnknownModelError, match="does not hold"):
        client.submit_bundle(tmp_path / "b")
    assert kept(tmp_path) == []


def test_a_model_that_the_operator_named_is_held(config: VerifierConfig, tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", model="mine")
    named = replace(config, host=Host(models={"mine": "/models/mine"}))
    with serve_verifier(named) as server, VerifierClient(f"127.0.0.1:{server.port}") as client:
        client.submit_bundle(tmp_path / "b")


def test_a_nonce_is_answered_once(client: VerifierClient, tmp_path: Path) -> None:
    nonce = client.request_nonce()
    write_bundle(tmp_path / "first", nonce=nonce, seed=1)
    write_bundle(tmp_path / "second", nonce=nonce, seed=2)
    assert client.submit_bundle(tmp_path / "first").challenged
    with pytest.raises(NonceError, match="already answered"):
        client.submit_bundle(tmp_path / "second")
    assert client.submit_bundle(tmp_path / "first").challenged
    assert len(kept(tmp_path)) == 1


def test_a_verifier_may_require_its_own_challenge(config: VerifierConfig, tmp_path: Path) -> None:
    strict = replace(config, require_challenge=True)
    with serve_verifier(strict) as server, VerifierClient(f"127.0.0.1:{server.port}") as client:
        for number, nonce in enumerate(("", "ab" * 32)):
            write_bundle(tmp_path / f"b{number}", nonce=nonce)
            with pytest.raises(NonceError):
                client.submit_bundle(tmp_path / f"b{number}")
        assert kept(tmp_path) == []
        write_bundle(tmp_path / "good", nonce=client.request_nonce())
        assert client.submit_bundle(tmp_path / "good").challenged


def test_a_client_that_sends_nothing_is_let_go(config: VerifierConfig, bundle: Path, tmp_path: Path) -> None:
    with serve_verifier(replace(config, upload_seconds=0.5)) as server, raw(server.port) as stub:
        never = threading.Event()

        def silent() -> Iterator[pb.SubmitRequest]:
            yield header(b"x")
            never.wait(60)

        with pytest.raises(grpc.RpcError) as caught:
            stub.SubmitBundle(silent(), timeout=30)
        assert caught.value.code() == CODES.CANCELLED
        never.set()
        with VerifierClient(f"127.0.0.1:{server.port}") as client:
            client.submit_bundle(bundle)
    assert len(kept(tmp_path)) == 1


def test_uploads_under_way_are_bounded(server: RunningServer, bundle: Path) -> None:
    finish, begun = threading.Event(), threading.Semaphore(0)
    content = bundle.read_bytes()

    def slow() -> Iterator[pb.SubmitRequest]:
        parts = list(upload(content))
        yield parts[0]
        begun.release()
        finish.wait(60)
        yield from parts[1:]

    with raw(server.port) as stub, VerifierClient(f"127.0.0.1:{server.port}") as client:
        calls = [stub.SubmitBundle.future(slow(), timeout=60) for _ in range(MAX_UPLOADS)]
        for _ in calls:
            assert begun.acquire(timeout=60)

        def probe() -> None:
            # Ours may have held a slot when a slow one came, which was then refused: let that one come again.
            for index, call in enumerate(calls):
                if call.done():
                    calls[index] = stub.SubmitBundle.future(slow(), timeout=60)
                    assert begun.acquire(timeout=60)
            client.submit_bundle(bundle)

        eventually(LimitError, "uploads are under way", probe)
        finish.set()
        assert len({call.result(timeout=30).bundle_digest for call in calls}) == 1
        client.submit_bundle(bundle)
