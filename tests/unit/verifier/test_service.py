"""The verifier's service over real gRPC: good evidence in, signed verdicts out, and nothing else gets in or stays."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest
from click.testing import CliRunner
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rpc_world import (
    PROVER_KEY,
    STRANGER_KEY,
    VERIFIER_KEY,
    quick_check,
    result_about,
    write_bundle,
)

from fpforensics.common import envelope as dsse
from fpforensics.common.access import Listen
from fpforensics.common.config import ExecutionConfig
from fpforensics.common.engines.base import Host
from fpforensics.common.errors import (
    DeadlineError,
    Error,
    EvidenceError,
    LimitError,
    NonceError,
    NotFoundError,
    ReplayError,
    SignatureError,
    UnavailableError,
    UnknownModelError,
    UsageError,
)
from fpforensics.common.keys import Keyring, PrivateKey
from fpforensics.common.rpc import CHUNK_BYTES, chunk_file, translated
from fpforensics.common.serving import RunningServer, start_server
from fpforensics.proto import audit_pb2 as pb
from fpforensics.proto import audit_pb2_grpc
from fpforensics.proto.evidence_pb2 import Chunk
from fpforensics.verifier import verdict as verdicts
from fpforensics.verifier.auditor import AuditorClient
from fpforensics.verifier.check import CheckPlan, CheckResult
from fpforensics.verifier.cli.verdicts import verdicts as commands
from fpforensics.verifier.client import VerifierClient
from fpforensics.verifier.intake import VerifiedBundle
from fpforensics.verifier.service import MAX_UPLOADS, MAX_WATCHERS, SERVICE, VerifierConfig, serve_verifier
from fpforensics.verifier.verdict import open_verdict, sign_verdict

TRUSTED = Keyring([PROVER_KEY.public])
VERIFIERS = Keyring([VERIFIER_KEY.public])
WIDE = 400_000  # hidden states of several MiB: several chunks


class Checker:
    """Stands where replays would run; can be told to fail or to hold."""

    def __init__(self) -> None:
        self.plans: list[CheckPlan] = []
        self.error: Exception | None = None
        self.hold = False
        self.holding = threading.Event()
        self.cancelled = threading.Event()

    def __call__(
        self,
        bundle: VerifiedBundle,
        plan: CheckPlan,
        host: Host,
        report: Callable[[str, int, int], None] = lambda *_: None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> CheckResult:
        self.plans.append(plan)
        if self.error:
            raise self.error
        report("holding", 0, 1)
        self.holding.set()
        while self.hold:
            if cancelled():
                self.cancelled.set()
                break  # and returns a result all the same: nobody may get it
            threading.Event().wait(0.01)
        return quick_check(bundle, plan, host, report)


@pytest.fixture
def checker() -> Checker:
    return Checker()


@pytest.fixture
def config(tmp_path: Path, checker: Checker) -> VerifierConfig:
    return VerifierConfig(key=VERIFIER_KEY, keyring=TRUSTED, store=tmp_path / "store", check=checker)


@pytest.fixture
def server(config: VerifierConfig) -> Iterator[RunningServer]:
    with serve_verifier(config) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[VerifierClient]:
    with VerifierClient(f"127.0.0.1:{server.port}") as connected:
        yield connected


@pytest.fixture
def auditor(server: RunningServer) -> Iterator[AuditorClient]:
    with AuditorClient(f"127.0.0.1:{server.port}", VERIFIERS) as connected:
        yield connected


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    write_bundle(tmp_path / "bundle.msgpack")
    return tmp_path / "bundle.msgpack"


@contextmanager
def raw(port: int) -> Iterator[Any]:
    with grpc.insecure_channel(f"127.0.0.1:{port}", [("grpc.enable_http_proxy", 0)]) as channel:
        yield audit_pb2_grpc.VerifierStub(channel)  # type: ignore[no-untyped-call]


def is_serving(server: RunningServer) -> bool:
    with grpc.insecure_channel(f"127.0.0.1:{server.port}", [("grpc.enable_http_proxy", 0)]) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=10)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def kept(tmp_path: Path) -> list[str]:
    store = tmp_path / "store"
    return sorted(path.name for part in ("bundles", "spool") for path in (store / part).iterdir())


def header(content: bytes, **changes: Any) -> pb.SubmitRequest:
    made = pb.SubmitHeader(size=len(content), sha256=hashlib.sha256(content).digest())
    for name, value in changes.items():
        setattr(made, name, value)
    return pb.SubmitRequest(header=made)


def upload(content: bytes, step: int = CHUNK_BYTES, **changes: Any) -> Iterator[pb.SubmitRequest]:
    yield header(content, **changes)
    digest = hashlib.sha256()
    for start in range(0, len(content), step):
        data = content[start : start + step]
        digest.update(data)
        yield pb.SubmitRequest(chunk=Chunk(data=data, running_sha256=digest.digest()))


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


def assert_refused(
    server: RunningServer, requests: Iterator[pb.SubmitRequest], code: grpc.StatusCode, tmp_path: Path
) -> None:
    before = kept(tmp_path)
    with raw(server.port) as stub, pytest.raises(grpc.RpcError) as caught:
        stub.SubmitBundle(requests, timeout=30)
    assert caught.value.code() == code
    details = caught.value.details()
    assert details
    assert "\n" not in details
    assert "Traceback" not in details
    assert kept(tmp_path) == before
    assert is_serving(server)
    write_bundle(tmp_path / "good", seed=99)
    with VerifierClient(f"127.0.0.1:{server.port}") as client:
        client.submit_bundle(tmp_path / "good")
    assert len(kept(tmp_path)) == len(before) + 1


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
    assert is_serving(server)


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
            assert begun.acquire(timeout=10)

        def probe() -> None:
            # Ours may have held a slot when a slow one came, which was then refused: let that one come again.
            for index, call in enumerate(calls):
                if call.done():
                    calls[index] = stub.SubmitBundle.future(slow(), timeout=60)
                    assert begun.acquire(timeout=10)
            client.submit_bundle(bundle)

        _eventually(LimitError, "uploads are under way", probe)
        finish.set()
        assert len({call.result(timeout=30).bundle_digest for call in calls}) == 1
        client.submit_bundle(bundle)


def _eventually(kind: type[Error], message: str, call: Callable[[], object]) -> None:
    """The other calls are sent, but the server may take a moment to begin them."""
    for _ in range(200):
        try:
            call()
        except kind as error:
            assert message in error.message
            return
        threading.Event().wait(0.02)
    raise AssertionError(f"no {kind.__name__}")


# --- checks ---


HOSTILE: dict[str, tuple[dict[str, Any], type[Error]]] = {
    "a bundle that is not here": ({"bundle_digest": "sha256:" + "0" * 64}, NotFoundError),
    "a path for a bundle": ({"bundle_digest": "../../etc/passwd"}, NotFoundError),
    "a long digest": ({"bundle_digest": "x" * 10_000}, UsageError),
    "nonsense": ({"claim": "%&/()=?" * 30}, UsageError),
    "a long claim": ({"claim": "attn=" + "x" * 5000}, UsageError),
    "an unknown key": ({"claim": "colour=red"}, UsageError),
    "a download in a claim": ({"claim": "model=evil/weights"}, UnknownModelError),
    "a file in a lineup": ({"lineup": ["attn=eager", "model=/etc"]}, UnknownModelError),
    "a revision": ({"lineup": ["revision=refs/pr/1"]}, UsageError),
    "a long lineup": ({"lineup": ["attn=eager"] * 65}, UsageError),
    "an unknown mode": ({"mode": 9}, UsageError),
    "a long row": ({"row": "x" * 5000}, UsageError),
}


@pytest.mark.parametrize(("changes", "error"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_check_is_refused(
    server: RunningServer,
    client: VerifierClient,
    checker: Checker,
    bundle: Path,
    changes: dict[str, Any],
    error: type[Error],
) -> None:
    fields = {"bundle_digest": client.submit_bundle(bundle).bundle_digest} | changes
    with raw(server.port) as stub, pytest.raises(error), translated():
        list(stub.Check(pb.CheckRequest(**fields), timeout=30))
    assert checker.plans == []
    assert is_serving(server)


def test_a_failed_check_leaves_no_verdict(
    client: VerifierClient, auditor: AuditorClient, checker: Checker, bundle: Path
) -> None:
    digest = client.submit_bundle(bundle).bundle_digest
    for error, expected in (
        (ReplayError("out of memory", "smaller batch"), ReplayError),
        (KeyError("x"), UnavailableError),
    ):
        checker.error = error
        with pytest.raises(expected):
            client.check(digest, CheckPlan())
    assert list(auditor.list()) == []
    checker.error = None
    client.check(digest, CheckPlan())
    assert [verdict.predicate.sequence for verdict in auditor.list()] == [1]


class Leave(Exception):  # noqa: N818
    """The caller has had enough."""


def test_a_caller_who_leaves_gets_no_verdict(
    client: VerifierClient, auditor: AuditorClient, checker: Checker, bundle: Path
) -> None:
    digest = client.submit_bundle(bundle).bundle_digest
    checker.hold = True

    def leave(*_: object) -> None:
        raise Leave

    with pytest.raises(Leave):
        client.check(digest, CheckPlan(), leave)
    assert checker.cancelled.wait(10)
    checker.hold = False
    client.check(digest, CheckPlan())  # waits in line for the cancelled one to end
    assert [verdict.predicate.sequence for verdict in auditor.list()] == [1]


def test_a_check_has_a_deadline_of_the_servers(config: VerifierConfig, checker: Checker, bundle: Path) -> None:
    checker.hold = True
    with (
        serve_verifier(replace(config, max_seconds=0.2)) as server,
        VerifierClient(f"127.0.0.1:{server.port}") as client,
    ):
        digest = client.submit_bundle(bundle).bundle_digest
        for _ in range(2):  # the second finds the verifier free
            with pytest.raises(DeadlineError, match=r"check stopped: it took more than the 0\.2 seconds"):
                client.check(digest, CheckPlan())
        assert checker.cancelled.is_set()
        assert len(checker.plans) == 2
        with AuditorClient(f"127.0.0.1:{server.port}", VERIFIERS) as auditor:
            assert list(auditor.list()) == []


def test_a_stopping_verifier_ends_the_check_under_way_and_those_in_line(
    server: RunningServer, client: VerifierClient, checker: Checker, bundle: Path
) -> None:
    digest = client.submit_bundle(bundle).bundle_digest
    checker.hold = True
    waiting = threading.Event()

    def saw(stage: str, _done: int, _total: int) -> None:
        if stage.startswith("waiting"):
            waiting.set()

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(client.check, digest, CheckPlan())
        assert checker.holding.wait(10)
        second = pool.submit(client.check, digest, CheckPlan(), saw)
        assert waiting.wait(10)
        server.stop(grace=60)  # which nobody waits for
        for each in (first, second):
            with pytest.raises(UnavailableError, match="the verifier is stopping"):
                each.result(timeout=10)
    assert len(checker.plans) == 1


def test_a_verdict_too_large_to_sign_is_refused_before_the_replays(
    client: VerifierClient, checker: Checker, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = client.submit_bundle(bundle).bundle_digest
    with monkeypatch.context() as patch:
        patch.setattr(verdicts, "MAX_PAYLOAD_BYTES", 2000)
        with pytest.raises(LimitError, match="make a verdict of about") as caught:
            client.check(digest, CheckPlan())
    assert "--row" in caught.value.hint
    assert checker.plans == []
    client.check(digest, CheckPlan())


def test_each_submission_and_each_check_is_logged_in_one_line(
    config: VerifierConfig, checker: Checker, bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="fpforensics")
    write_bundle(tmp_path / "strange", key=STRANGER_KEY)
    checker.hold = True
    with serve_verifier(config) as server, VerifierClient(f"127.0.0.1:{server.port}") as client:
        digest = client.submit_bundle(bundle).bundle_digest
        with pytest.raises(SignatureError):
            client.submit_bundle(tmp_path / "strange")

        def leave(*_: object) -> None:
            raise Leave

        with pytest.raises(Leave):
            client.check(digest, CheckPlan(claim="attn=sdpa"), leave)
        assert checker.cancelled.wait(10)
        checker.hold = False
        verdict = open_verdict(client.check(digest, CheckPlan(claim="quant=none")), VERIFIERS)
        with pytest.raises(NotFoundError):
            client.check("sha256:" + "0" * 64, CheckPlan())
    peer = r"peer=127\.0\.0\.1:\d+"
    expected = {
        "taken": rf"submission {peer} outcome=done bytes={bundle.stat().st_size} bundle={digest} "
        rf"signer={PROVER_KEY.keyid} challenged=no seconds=\d+\.\d",
        "not taken": rf'submission {peer} outcome=refused bytes=\d+ error="SignatureError: .+" seconds=\d+\.\d',
        "left": rf"check {peer} bundle={digest} claim=attn=sdpa outcome=cancelled seconds=\d+\.\d",
        "checked": rf"check {peer} bundle={digest} claim=quant=none outcome=CONSISTENT "
        rf"verdict={verdict.predicate.verdict_id} sequence=1 seconds=\d+\.\d",
        "unknown": rf'check {peer} bundle=sha256:0+ claim="" outcome=refused error="NotFoundError: .+" seconds=\d+\.\d',
    }
    assert len(caplog.messages) == len(expected)
    for name, pattern in expected.items():
        assert sum(bool(re.fullmatch(pattern, line)) for line in caplog.messages) == 1, (name, caplog.messages)


def test_checks_wait_in_line(client: VerifierClient, auditor: AuditorClient, checker: Checker, bundle: Path) -> None:
    digest = client.submit_bundle(bundle).bundle_digest
    checker.hold = True
    waiting = threading.Event()

    def saw(stage: str, _done: int, _total: int) -> None:
        if stage.startswith("waiting"):
            waiting.set()

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(client.check, digest, CheckPlan())
        assert checker.holding.wait(10)
        second = pool.submit(client.check, digest, CheckPlan(), saw)
        assert waiting.wait(10)
        assert len(checker.plans) == 1
        checker.hold = False
        assert first.result(timeout=30) != second.result(timeout=30)
    assert len(list(auditor.list())) == 2


def test_a_bundle_damaged_on_disk_is_not_checked(client: VerifierClient, bundle: Path, tmp_path: Path) -> None:
    digest = client.submit_bundle(bundle).bundle_digest
    stored = tmp_path / "store" / "bundles" / f"{digest[7:]}.msgpack"
    content = bytearray(stored.read_bytes())
    content[200] ^= 1
    stored.write_bytes(content)
    with pytest.raises(EvidenceError):
        client.check(digest, CheckPlan())


def test_how_replays_run_is_not_the_callers_choice(client: VerifierClient) -> None:
    with pytest.raises(UsageError, match="in a remote check"):
        client.check("sha256:" + "0" * 64, CheckPlan(using="matmul=fp32-rounded"))


# --- auditors ---


def test_pages_join_up(client: VerifierClient, auditor: AuditorClient, bundle: Path, server: RunningServer) -> None:
    digest = client.submit_bundle(bundle).bundle_digest
    envelopes = [client.check(digest, CheckPlan()) for _ in range(5)]
    assert [verdict.envelope for verdict in auditor.list()] == envelopes
    assert [verdict.envelope for verdict in auditor.list(after=3)] == envelopes[3:]
    with raw(server.port) as stub:
        page = stub.ListVerdicts(pb.ListVerdictsRequest(limit=2), timeout=10)
        assert ([verdict.sequence for verdict in page.verdicts], page.more) == ([1, 2], True)
        for wrong in ({"limit": 101}, {"after": 2**63}):
            with pytest.raises(UsageError), translated():
                stub.ListVerdicts(pb.ListVerdictsRequest(**wrong), timeout=10)
    with pytest.raises(NotFoundError):
        auditor.get("no such verdict")


def test_a_watcher_sees_old_and_new_verdicts_until_the_server_stops(
    server: RunningServer, client: VerifierClient, auditor: AuditorClient, bundle: Path
) -> None:
    digest = client.submit_bundle(bundle).bundle_digest
    old = client.check(digest, CheckPlan())
    watching = auditor.watch(timeout=60)
    assert next(watching).envelope == old
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, watching)
        new = client.check(digest, CheckPlan())
        assert coming.result(timeout=10).envelope == new
        ending = pool.submit(next, watching)
        server.stop(grace=5)
        with pytest.raises(UnavailableError, match="stopping"):
            ending.result(timeout=10)


def test_watchers_are_bounded_and_a_leaving_one_makes_room(
    server: RunningServer, client: VerifierClient, bundle: Path
) -> None:
    digest = client.submit_bundle(bundle).bundle_digest
    first = client.check(digest, CheckPlan())
    with AuditorClient(f"127.0.0.1:{server.port}", VERIFIERS) as auditor:
        watchers = [auditor.watch(timeout=60) for _ in range(MAX_WATCHERS)]
        for watcher in watchers:
            assert next(watcher).envelope == first
        with pytest.raises(LimitError, match="watchers"):
            next(auditor.watch(timeout=60))
        client.check(digest, CheckPlan())  # watchers do not starve the rest
        watchers.pop().close()

        def one_more() -> bool:
            try:
                return next(auditor.watch(timeout=60)).envelope == first
            except LimitError:
                return False

        assert any(one_more() or threading.Event().wait(0.02) for _ in range(200))
        for watcher in watchers:
            watcher.close()


def test_a_quiet_watch_is_told_that_the_server_is_there(config: VerifierConfig) -> None:
    with serve_verifier(replace(config, heartbeat_seconds=0.01)) as server, raw(server.port) as stub:
        watching = stub.WatchVerdicts(pb.WatchVerdictsRequest(), timeout=60)
        assert [next(watching) for _ in range(3)] == [pb.Verdict()] * 3
        watching.cancel()


def test_a_follower_survives_a_restart_and_neither_loses_nor_repeats_a_verdict(
    config: VerifierConfig, bundle: Path
) -> None:
    said: list[tuple[int, float]] = []
    with ExitStack() as servers:
        server = servers.enter_context(serve_verifier(config))
        address = f"127.0.0.1:{server.port}"

        def one_more() -> None:
            with VerifierClient(address) as client:
                client.check(client.submit_bundle(bundle).bundle_digest, CheckPlan())

        def restart(_seconds: float) -> None:
            servers.enter_context(serve_verifier(replace(config, listen=Listen(address=address))))
            one_more()

        one_more()
        one_more()
        with AuditorClient(address, VERIFIERS) as auditor:
            following = auditor.follow(lost=lambda _error, after, wait: said.append((after, wait)), pause=restart)
            seen = [next(following).predicate.sequence for _ in range(2)]
            server.stop(grace=0)
            seen.append(next(following).predicate.sequence)
            one_more()
            seen.append(next(following).predicate.sequence)
            following.close()
    assert seen == [1, 2, 3, 4]
    assert said == [(2, 1.0)]


class Enough(Exception):  # noqa: N818
    """So many times."""


def test_a_follower_waits_longer_each_time_up_to_a_bound(tampering: tuple[Tampering, AuditorClient]) -> None:
    servicer, auditor = tampering
    servicer.shown, servicer.stopping_after = (shown(1),), 1
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 8:
            raise Enough

    following = auditor.follow(pause=pause)
    assert next(following).predicate.sequence == 1
    with pytest.raises(Enough):
        next(following)
    servicer.stopping_after = 0
    assert pauses == [1, 2, 4, 8, 16, 30, 30, 30]


def test_the_command_that_watches_says_what_it_lost(
    tampering: tuple[Tampering, AuditorClient], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    servicer, auditor = tampering
    servicer.shown, servicer.stopping_after = (shown(1), shown(2, name="two")), 1

    def back(_seconds: float) -> None:
        servicer.stopping_after = 2

    monkeypatch.setattr(AuditorClient, "follow", partialmethod(AuditorClient.follow, pause=back))
    (tmp_path / "key.pub").write_bytes(VERIFIER_KEY.public.pem())
    arguments = ["watch", "--count", "2", "--server", auditor.target, "--key", str(tmp_path / "key.pub")]
    done = CliRunner().invoke(commands, arguments, catch_exceptions=False)
    servicer.stopping_after = 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["1", "2"]
    assert done.stderr == "the verifier is stopping; watching again after number 1 in 1 s\n"


def test_nobody_follows_a_server_that_was_never_there(config: VerifierConfig) -> None:
    server = serve_verifier(config)
    server.stop(grace=0)
    pauses: list[float] = []
    with AuditorClient(f"127.0.0.1:{server.port}", VERIFIERS) as auditor, pytest.raises(UnavailableError):
        next(auditor.follow(pause=pauses.append))
    assert pauses == []


class Tampering(audit_pb2_grpc.VerifierServicer):
    """A verifier that shows what it is told to."""

    shown: tuple[pb.Verdict, ...] = ()
    more = False
    stopping_after = 0

    def GetVerdict(self, request: Any, context: Any) -> pb.Verdict:  # noqa: N802
        return self.shown[0]

    def ListVerdicts(self, request: Any, context: Any) -> pb.ListVerdictsReply:  # noqa: N802
        return pb.ListVerdictsReply(verdicts=self.shown, more=self.more)

    def WatchVerdicts(self, request: Any, context: Any) -> Iterator[pb.Verdict]:  # noqa: N802
        if not self.stopping_after:
            yield from self.shown
        else:
            yield from self.shown[request.after : self.stopping_after]
            raise UnavailableError("the verifier is stopping")


@pytest.fixture(scope="module")
def tampering() -> Iterator[tuple[Tampering, AuditorClient]]:
    servicer = Tampering()
    add: Any = audit_pb2_grpc.add_VerifierServicer_to_server
    with (
        start_server(Listen(), lambda it: add(servicer, it), SERVICE) as server,
        AuditorClient(f"127.0.0.1:{server.port}", VERIFIERS) as auditor,
    ):
        yield servicer, auditor


def shown(sequence: int = 1, *, key: PrivateKey = VERIFIER_KEY, name: str = "one", **changes: Any) -> pb.Verdict:
    digest = f"sha256:{'5' * 64}"
    envelope = sign_verdict(result_about(digest), key, sequence=sequence, verdict_id=name)
    made = pb.Verdict(
        sequence=sequence,
        verdict_id=name,
        bundle_digest=digest,
        outcome="CONSISTENT",
        envelope=dsse.to_json(envelope),
    )
    for field, value in changes.items():
        setattr(made, field, value)
    return made


def _edited() -> bytes:
    """A genuine envelope whose verdict was turned round."""
    envelope = dsse.from_json(shown().envelope)
    payload = envelope.payload.replace(b'"CONSISTENT"', b'"INCONSISTENT"')
    return dsse.to_json(msgspec.structs.replace(envelope, payload=payload))


TAMPERED: dict[str, pb.Verdict] = {
    "signed by a stranger": shown(key=STRANGER_KEY),
    "signed by the prover": shown(key=PROVER_KEY),
    "an edited payload": shown(envelope=_edited()),
    "another outcome": shown(outcome="INCONSISTENT"),
    "another bundle": shown(bundle_digest=f"sha256:{'6' * 64}"),
    "another id": shown(verdict_id="two"),
    "another sequence": shown(sequence=1, **{"envelope": shown(sequence=2).envelope}),
}


@pytest.mark.parametrize("lie", TAMPERED.values(), ids=TAMPERED)
def test_a_tampering_verifier_is_caught(tampering: tuple[Tampering, AuditorClient], lie: pb.Verdict) -> None:
    servicer, auditor = tampering
    servicer.shown, servicer.more = (shown(),), False
    assert auditor.get("one") == next(iter(auditor.list())) == next(auditor.watch())  # the control
    servicer.shown = (lie,)
    for look in (lambda: auditor.get("one"), lambda: list(auditor.list()), lambda: list(auditor.watch())):
        with pytest.raises(SignatureError):
            look()


def test_a_follower_believes_no_more_than_a_watcher(tampering: tuple[Tampering, AuditorClient]) -> None:
    servicer, auditor = tampering
    servicer.shown = (pb.Verdict(), shown(1, name="one"), pb.Verdict(), shown(2, name="two"), shown(4, name="four"))
    following = auditor.follow()
    assert [next(following).predicate.verdict_id for _ in range(2)] == ["one", "two"]
    with pytest.raises(SignatureError, match="shows verdict number 4 after number 2"):
        next(following)


def test_the_beginning_of_an_id_is_enough_if_only_one_verdict_has_it(
    tampering: tuple[Tampering, AuditorClient],
) -> None:
    servicer, auditor = tampering
    names = ("4f6c2a" + "0" * 26, "4f6c2b" + "0" * 26, "ab" * 16)
    servicer.shown = tuple(shown(number, name=name) for number, name in enumerate(names, start=1))
    servicer.more = False
    for name in ("4f6c2a", "4F6C2A", "4f6c2a…", names[0][:31]):
        assert auditor.find(name).predicate.verdict_id == names[0]
    assert auditor.find(names[0]).predicate.verdict_id == names[0]  # whole ids are asked for directly
    with pytest.raises(UsageError, match="too short"):
        auditor.find("4f6c2")
    with pytest.raises(NotFoundError, match="no verdict whose id begins with '00000000'"):
        auditor.find("00000000")
    servicer.shown = tuple(shown(number, name=f"4f6c2a{number}" + "0" * 25) for number in (1, 2, 3, 4))
    with pytest.raises(UsageError, match="4 verdicts have ids that begin with '4f6c2a'") as caught:
        auditor.find("4f6c2a")
    assert "4f6c2a1" in caught.value.hint


def test_a_verifier_that_answers_with_another_verdict_is_caught(
    tampering: tuple[Tampering, AuditorClient],
) -> None:
    servicer, auditor = tampering
    servicer.shown = (shown(name="two"),)
    with pytest.raises(SignatureError, match="when asked for one"):
        auditor.get("one")


@pytest.mark.parametrize("numbers", [(2,), (1, 3), (1, 1), (2, 1)])
def test_a_verifier_that_withholds_or_reorders_is_caught(
    tampering: tuple[Tampering, AuditorClient], numbers: tuple[int, ...]
) -> None:
    servicer, auditor = tampering
    servicer.shown, servicer.more = tuple(shown(number, name=f"v{number}") for number in numbers), False
    for look in (auditor.list, auditor.watch):
        with pytest.raises(SignatureError, match="shows verdict number"):
            list(look())


def test_a_verifier_that_promises_more_for_ever_is_caught(tampering: tuple[Tampering, AuditorClient]) -> None:
    servicer, auditor = tampering
    servicer.shown, servicer.more = (), True
    with pytest.raises(SignatureError, match="withholds"):
        list(auditor.list())


@pytest.mark.parametrize("envelope", [b"", b"{}", b"[" * 100_000, b'{"payloadType":"x"}', b"\xff" * 100])
def test_garbage_is_no_verdict(tampering: tuple[Tampering, AuditorClient], envelope: bytes) -> None:
    servicer, auditor = tampering
    servicer.shown, servicer.more = (shown(envelope=envelope),), False
    with pytest.raises(EvidenceError):
        auditor.get("one")


def test_an_auditor_needs_no_torch() -> None:
    code = (
        "import sys; import fpforensics.verifier.auditor, fpforensics.verifier.client; "
        "sys.exit(bool({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# --- crashes and full disks: a real process, really killed ---


SERVE = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from rpc_world import PROVER_KEY, VERIFIER_KEY, quick_check
from fpforensics.common.keys import Keyring
from fpforensics.verifier.service import VerifierConfig, serve_verifier
if len(sys.argv) > 3:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
config = VerifierConfig(
    key=VERIFIER_KEY, keyring=Keyring([PROVER_KEY.public]), store=Path(sys.argv[2]), check=quick_check
)
server = serve_verifier(config)
print(server.port, flush=True)
server.wait()
print("stopped", flush=True)
"""


@contextmanager
def verifier_process(store: Path, *file_limit: int) -> Iterator[tuple[subprocess.Popen[str], int]]:
    tests = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", SERVE, str(tests), str(store), *map(str, file_limit)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


def test_a_verifier_killed_in_mid_submit_forgets_the_half_and_keeps_the_whole(tmp_path: Path, bundle: Path) -> None:
    write_bundle(tmp_path / "large", seed=1, width=WIDE)
    sent, killed = threading.Event(), threading.Event()

    def half() -> Iterator[pb.SubmitRequest]:
        parts = list(upload((tmp_path / "large").read_bytes()))
        yield from parts[:3]
        sent.set()
        killed.wait(60)
        yield from parts[3:]

    with verifier_process(tmp_path / "store") as (process, port):
        with VerifierClient(f"127.0.0.1:{port}") as client:
            digest = client.submit_bundle(bundle).bundle_digest
            envelope = client.check(digest, CheckPlan())
        with raw(port) as stub:
            call = stub.SubmitBundle.future(half(), timeout=60)
            assert sent.wait(10)
            assert _spooled(tmp_path / "store")  # the half is really there when the process dies
            process.send_signal(signal.SIGKILL)
            process.wait(10)
            killed.set()
            assert isinstance(call.exception(timeout=30), grpc.RpcError)
    assert len(kept(tmp_path)) == 2

    with verifier_process(tmp_path / "store") as (_, port):
        assert kept(tmp_path) == [f"{digest[7:]}.msgpack"]
        with VerifierClient(f"127.0.0.1:{port}") as client, AuditorClient(f"127.0.0.1:{port}", VERIFIERS) as auditor:
            assert [verdict.envelope for verdict in auditor.list()] == [envelope]
            client.submit_bundle(tmp_path / "large")
            client.check(digest, CheckPlan())
            assert [verdict.predicate.sequence for verdict in auditor.list()] == [1, 2]


def _spooled(store: Path) -> bool:
    return any(
        any(path.is_file() and path.stat().st_size for path in (store / "spool").rglob("*"))
        or threading.Event().wait(0.02)
        for _ in range(500)
    )


def test_a_full_disk_is_said_and_survived(tmp_path: Path, bundle: Path) -> None:
    write_bundle(tmp_path / "large", width=WIDE)
    with verifier_process(tmp_path / "store", 1 << 20) as (_, port), VerifierClient(f"127.0.0.1:{port}") as client:
        with pytest.raises(LimitError, match="disk is full"):
            client.submit_bundle(tmp_path / "large")
        assert kept(tmp_path) == []
        client.submit_bundle(bundle)
        assert len(kept(tmp_path)) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_gracefully(tmp_path: Path, number: signal.Signals) -> None:
    with verifier_process(tmp_path / "store") as (process, port):
        with AuditorClient(f"127.0.0.1:{port}", VERIFIERS) as auditor, ThreadPoolExecutor(1) as pool:
            watcher = pool.submit(list, auditor.watch(timeout=60))
            assert list(auditor.list()) == []
            process.send_signal(number)
            with pytest.raises(UnavailableError):
                watcher.result(timeout=20)
        assert process.stdout is not None
        assert process.stdout.read() == "stopped\n"
        assert process.wait(20) == 0


def test_two_verifiers_do_not_share_a_store(config: VerifierConfig, server: RunningServer) -> None:
    with pytest.raises(UsageError, match="in use"):
        serve_verifier(config)


def test_a_refused_address_lets_go_of_the_store(config: VerifierConfig) -> None:
    with pytest.raises(UsageError, match="TLS"):
        serve_verifier(replace(config, listen=Listen(address="0.0.0.0:0")))
    serve_verifier(config).stop(grace=0)


def test_rows_of_any_held_model_are_taken_and_one_foreign_row_spoils_it(client: VerifierClient, tmp_path: Path) -> None:
    write_bundle(tmp_path / "good", configs=(ExecutionConfig(), ExecutionConfig(attention="eager")))
    client.submit_bundle(tmp_path / "good")
    write_bundle(
        tmp_path / "bad", configs=(ExecutionConfig(), ExecutionConfig(attention="eager", model="evil/weights"))
    )
    with pytest.raises(UnknownModelError):
        client.submit_bundle(tmp_path / "bad")


def test_a_stream_of_the_clients_own_chunks_is_what_the_server_takes(server: RunningServer, bundle: Path) -> None:
    content = bundle.read_bytes()
    parts = [header(content), *(pb.SubmitRequest(chunk=chunk) for chunk in chunk_file(bundle))]
    with raw(server.port) as stub:
        assert stub.SubmitBundle(iter(parts), timeout=30).bundle_digest.startswith("sha256:")
