"""Checks over gRPC: hostile ones, those that fail, are left or take too long, and those that wait."""

from __future__ import annotations

import logging
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rpc_world import (
    PROVER_KEY,
    STRANGER_KEY,
    write_bundle,
)
from service_world import Leave, is_serving
from verifier_world import (
    VERIFIERS,
    Checker,
    raw,
)

from fpforensics.common.errors import (
    DeadlineError,
    Error,
    EvidenceError,
    LimitError,
    NotFoundError,
    ReplayError,
    SignatureError,
    UnavailableError,
    UnknownModelError,
    UsageError,
)
from fpforensics.common.rpc import translated
from fpforensics.common.serving import RunningServer
from fpforensics.proto import audit_pb2 as pb
from fpforensics.verifier import verdict as verdicts
from fpforensics.verifier.auditor import AuditorClient
from fpforensics.verifier.check import CheckPlan
from fpforensics.verifier.client import VerifierClient
from fpforensics.verifier.service import SERVICE, VerifierConfig, serve_verifier
from fpforensics.verifier.verdict import open_verdict

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
    assert is_serving(server, SERVICE)


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


def test_a_caller_who_leaves_gets_no_verdict(
    client: VerifierClient, auditor: AuditorClient, checker: Checker, bundle: Path
) -> None:
    digest = client.submit_bundle(bundle).bundle_digest
    checker.hold = True

    def leave(*_: object) -> None:
        raise Leave

    with pytest.raises(Leave):
        client.check(digest, CheckPlan(), leave)
    assert checker.cancelled.wait(60)
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
        assert checker.holding.wait(60)
        second = pool.submit(client.check, digest, CheckPlan(), saw)
        assert waiting.wait(60)
        server.stop(grace=60)  # which nobody waits for
        for each in (first, second):
            with pytest.raises(UnavailableError, match="the verifier is stopping"):
                each.result(timeout=60)
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
        assert checker.cancelled.wait(60)
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
        assert checker.holding.wait(60)
        second = pool.submit(client.check, digest, CheckPlan(), saw)
        assert waiting.wait(60)
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
