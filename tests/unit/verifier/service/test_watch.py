"""What auditors list, watch and follow."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partialmethod
from pathlib import Path

import pytest
from click.testing import CliRunner
from rpc_world import (
    VERIFIER_KEY,
)
from verifier_world import (
    VERIFIERS,
    Tampering,
    raw,
    shown,
)

from fpforensics.common.access import Listen
from fpforensics.common.errors import (
    LimitError,
    NotFoundError,
    UnavailableError,
    UsageError,
)
from fpforensics.common.rpc import translated
from fpforensics.common.serving import RunningServer
from fpforensics.proto import audit_pb2 as pb
from fpforensics.verifier.auditor import AuditorClient
from fpforensics.verifier.check import CheckPlan
from fpforensics.verifier.cli.verdicts import verdicts as commands
from fpforensics.verifier.client import VerifierClient
from fpforensics.verifier.service import MAX_WATCHERS, VerifierConfig, serve_verifier

# --- auditors ---


def test_pages_join_up(client: VerifierClient, auditor: AuditorClient, bundle: Path, server: RunningServer) -> None:
    digest = client.submit_bundle(bundle).bundle_digest
    envelopes = [client.check(digest, CheckPlan()) for _ in range(5)]
    assert [verdict.envelope for verdict in auditor.list()] == envelopes
    assert [verdict.envelope for verdict in auditor.list(after=3)] == envelopes[3:]
    with raw(server.port) as stub:
        page = stub.ListVerdicts(pb.ListVerdictsRequest(limit=2), timeout=60)
        assert ([verdict.sequence for verdict in page.verdicts], page.more) == ([1, 2], True)
        for wrong in ({"limit": 101}, {"after": 2**63}):
            with pytest.raises(UsageError), translated():
                stub.ListVerdicts(pb.ListVerdictsRequest(**wrong), timeout=60)
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
        assert coming.result(timeout=60).envelope == new
        ending = pool.submit(next, watching)
        server.stop(grace=5)
        with pytest.raises(UnavailableError, match="stopping"):
            ending.result(timeout=60)


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
