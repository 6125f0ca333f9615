"""The verifier over gRPC: takes challenges and bundles from provers, replays, and shows its signed verdicts to
auditors.

Bytes become a bundle only through the intake. A remote party chooses no file, no download and no interpreter: models
are the verifier's own, and how replays run (``host``, ``using``) is its operator's choice.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import grpc

from fpforensics.common import envelope as dsse
from fpforensics.common.access import Listen
from fpforensics.common.config import DEFAULT_MODEL, MAX_SPEC_LENGTH, parse_claim
from fpforensics.common.engines.base import Host
from fpforensics.common.errors import (
    EvidenceError,
    LimitError,
    UnavailableError,
    UnknownModelError,
    UsageError,
    did_you_mean,
    shorten,
)
from fpforensics.common.journal import logged
from fpforensics.common.keys import Keyring, PrivateKey
from fpforensics.common.lane import HEARTBEAT_SECONDS, WORK_SECONDS, Cancelled, Lane, Report, Slots, deadline
from fpforensics.common.rpc import MAX_BUNDLE_BYTES, receive_chunks, require_short
from fpforensics.common.serving import RunningServer, start_server
from fpforensics.proto import audit_pb2 as pb
from fpforensics.proto import audit_pb2_grpc
from fpforensics.proto.evidence_pb2 import Chunk
from fpforensics.verifier.check import MAX_LINEUP, CheckPlan, CheckResult, check_bundle
from fpforensics.verifier.intake import VerifiedBundle, open_bundle
from fpforensics.verifier.measured import MeasuredProfile
from fpforensics.verifier.store import Store, StoredBundle, StoredVerdict
from fpforensics.verifier.verdict import new_verdict_id, require_signable, sign_verdict

SERVICE = pb.DESCRIPTOR.services_by_name["Verifier"].full_name
MAX_UPLOADS, MAX_WATCHERS, MAX_WAITING_CHECKS = 8, 24, 8
PAGE_LIMIT, PAGE_BYTES = 100, 4 << 20
MAX_SEQUENCE = 2**63 - 1  # what SQLite holds
_MAX_ID = 128
_MODES: dict[int, Any] = {
    pb.REPLAY_MODE_UNSPECIFIED: "decode",
    pb.REPLAY_MODE_DECODE: "decode",
    pb.REPLAY_MODE_PREFILL: "prefill",
}


class Checker(Protocol):
    """:func:`fpforensics.verifier.check.check_bundle`, or what stands in for it."""

    def __call__(
        self,
        bundle: VerifiedBundle,
        plan: CheckPlan,
        host: Host,
        report: Report = ...,
        cancelled: Cancelled = ...,
    ) -> CheckResult:
        """Replay ``bundle`` and decide."""
        ...


@dataclass(frozen=True, kw_only=True)
class VerifierConfig:
    """How to serve. ``key`` signs verdicts; ``keyring`` says whose bundles are taken; ``store`` is a folder.

    ``require_challenge`` takes only bundles that answer this verifier's own challenge within ``nonce_seconds``; an
    upload may last ``upload_seconds``, a check ``max_seconds`` once its turn has come. What has nothing new to say for
    ``heartbeat_seconds`` says so. ``using`` is how replays run and ``profile`` what they are judged by (see :class:`CheckPlan`).
    """

    key: PrivateKey
    keyring: Keyring
    store: Path
    listen: Listen = field(default_factory=Listen)
    host: Host = field(default_factory=Host)
    using: str = ""
    profile: MeasuredProfile | None = None
    require_challenge: bool = False
    nonce_seconds: int = 6 * 3600
    upload_seconds: float = 3600.0
    max_seconds: float = WORK_SECONDS
    heartbeat_seconds: float = HEARTBEAT_SECONDS
    max_bundle_bytes: int = MAX_BUNDLE_BYTES
    check: Checker = check_bundle


def serve_verifier(config: VerifierConfig) -> RunningServer:
    """Start serving. Raises :class:`UsageError` if the address needs guarding or is taken, or the store is in use."""
    store = Store(config.store)
    try:
        servicer = VerifierServicer(config, store)
        add: Any = audit_pb2_grpc.add_VerifierServicer_to_server
        return start_server(
            config.listen,
            lambda server: add(servicer, server),
            SERVICE,
            on_stopping=servicer.stop,
            on_stopped=servicer.close,
        )
    except BaseException:
        store.close()
        raise


class VerifierServicer(audit_pb2_grpc.VerifierServicer):
    """The handlers; see proto/audit.proto."""

    def __init__(self, config: VerifierConfig, store: Store) -> None:
        self._config = config
        self._store = store
        self._models = {DEFAULT_MODEL, *config.host.models}
        self._checks = Lane(
            "check", waiting=MAX_WAITING_CHECKS, seconds=config.max_seconds, heartbeat=config.heartbeat_seconds
        )
        self._uploads = Slots("uploads", MAX_UPLOADS)
        self._watchers = Slots("watchers", MAX_WATCHERS)
        self._stopping = threading.Event()

    def stop(self) -> None:
        """End the check under way and those that wait, and let the watchers go."""
        self._checks.stop(UnavailableError("the verifier is stopping", "check again when it serves"))
        self._stopping.set()
        self._store.wake()

    def close(self) -> None:
        """Wait for the check under way to end, then close the store."""
        self._checks.close()
        self._store.close()

    def RequestNonce(self, request: pb.NonceRequest, context: grpc.ServicerContext) -> pb.Nonce:  # noqa: N802
        """A fresh challenge."""
        seconds = self._config.nonce_seconds
        return pb.Nonce(nonce=bytes.fromhex(self._store.issue_nonce(seconds)), lifetime_seconds=seconds)

    def SubmitBundle(  # noqa: N802
        self, requests: Iterator[pb.SubmitRequest], context: grpc.ServicerContext
    ) -> pb.SubmitReply:
        """Receive, run the whole intake, and only then keep."""
        config = self._config
        with (
            logged("submission", context) as entry,
            self._uploads.taken(),
            deadline(context, config.upload_seconds),
            self._store.spool() as spool,
        ):
            header = _header(requests, config.max_bundle_bytes)
            entry.note(bytes=header.size)
            received = receive_chunks(_chunks(requests), spool.file, limit=header.size)
            received.require(header.size, header.sha256)
            spool.file.flush()
            with open_bundle(spool.path, config.keyring) as bundle:
                entry.note(bundle=bundle.digest, signer=bundle.signer.keyid)
                self._require_models({row.config.model for row in bundle.evidence.rows})
                bundle.verify_all()
                kept = self._store.adopt(
                    spool,
                    bundle.digest,
                    bundle.signer.keyid,
                    bundle.evidence.nonce,
                    require_challenge=config.require_challenge,
                )
            entry.note(challenged="yes" if kept.challenged else "no")
        return pb.SubmitReply(bundle_digest=kept.digest, signer=kept.signer, challenged=kept.challenged)

    def Check(self, request: pb.CheckRequest, context: grpc.ServicerContext) -> Iterator[pb.CheckEvent]:  # noqa: N802
        """Progress while the replays run, then the verdict."""
        with logged("check", context, bundle=request.bundle_digest, claim=request.claim) as entry:
            plan = self._plan(request)
            stored = self._store.bundle(require_short("bundle digest", request.bundle_digest, _MAX_ID))

            def work(report: Report, cancelled: Cancelled) -> CheckResult:
                # Opened again: the file may have changed on disk since it was taken.
                with open_bundle(stored.path, self._config.keyring) as bundle:
                    require_signable(bundle.evidence, plan)
                    return self._config.check(bundle, plan, self._config.host, report, cancelled)

            result = yield from self._checks.run(context, work, lambda now: pb.CheckEvent(progress=now))
            verdict = self._store.append_verdict(lambda sequence: self._seal(result, stored, sequence))
            entry.note(outcome=verdict.outcome, verdict=verdict.verdict_id, sequence=verdict.sequence)
        yield pb.CheckEvent(verdict=_message(verdict))  # given, whether or not anyone still waits for it

    def GetVerdict(self, request: pb.GetVerdictRequest, context: grpc.ServicerContext) -> pb.Verdict:  # noqa: N802
        """One verdict."""
        return _message(self._store.verdict(require_short("verdict id", request.verdict_id, _MAX_ID)))

    def ListVerdicts(  # noqa: N802
        self, request: pb.ListVerdictsRequest, context: grpc.ServicerContext
    ) -> pb.ListVerdictsReply:
        """A page."""
        after, limit = _sequence(request.after), request.limit or PAGE_LIMIT
        if limit > PAGE_LIMIT:
            raise UsageError(f"a page of {limit} verdicts", f"at most {PAGE_LIMIT}")
        page = self._store.verdicts(after, limit, PAGE_BYTES)
        last = page[-1].sequence if page else after
        return pb.ListVerdictsReply(
            verdicts=[_message(verdict) for verdict in page], more=last < self._store.last_sequence()
        )

    def WatchVerdicts(  # noqa: N802
        self, request: pb.WatchVerdictsRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.Verdict]:
        """Every verdict after a sequence number, as they come; an empty one at once and whenever it was quiet for long."""
        after = _sequence(request.after)
        gone = threading.Event()

        def leave() -> None:
            gone.set()
            self._store.wake()

        def stop() -> bool:
            return gone.is_set() or self._stopping.is_set()

        with self._watchers.taken():
            if not context.add_callback(leave):
                return
            yield pb.Verdict()
            while not stop():
                if self._store.wait_beyond(after, stop, self._config.heartbeat_seconds):
                    for verdict in self._store.verdicts(after, PAGE_LIMIT, PAGE_BYTES):
                        yield _message(verdict)
                        after = verdict.sequence
                elif not stop():
                    yield pb.Verdict()
        if not gone.is_set():
            raise UnavailableError("the verifier is stopping", f"watch again after sequence number {after}")

    def _plan(self, request: pb.CheckRequest) -> CheckPlan:
        if request.mode not in _MODES:
            raise UsageError(f"replay mode {request.mode}", "prefill or decode")
        if len(request.lineup) > MAX_LINEUP:
            raise UsageError(f"a lineup of {len(request.lineup)} configs", f"at most {MAX_LINEUP}")
        for spec in filter(None, (request.claim, *request.lineup)):
            asserted = parse_claim(require_short("claim or config", spec, MAX_SPEC_LENGTH)).assertions
            self._require_models({str(asserted["model"])} if "model" in asserted else set())
            if asserted.get("revision"):
                raise UsageError(
                    f"revision {shorten(str(asserted['revision']))!r}", "the verifier's operator chooses it"
                )
        return CheckPlan(
            claim=request.claim,
            lineup=tuple(request.lineup),
            mode=_MODES[request.mode],
            row=require_short("row", request.row, MAX_SPEC_LENGTH),
            using=self._config.using,
            profile=self._config.profile,
        )

    def _require_models(self, models: set[str]) -> None:
        for model in sorted(models - self._models):
            raise UnknownModelError(
                f"this verifier does not hold model {shorten(model)!r}", did_you_mean(model, self._models)
            )

    def _seal(self, result: CheckResult, stored: StoredBundle, sequence: int) -> StoredVerdict:
        if result.bundle_digest != stored.digest:
            raise ValueError(f"a result about {result.bundle_digest} for bundle {stored.digest}")
        verdict_id = new_verdict_id()
        envelope = sign_verdict(result, self._config.key, stored.challenged, sequence=sequence, verdict_id=verdict_id)
        return StoredVerdict(sequence, verdict_id, stored.digest, result.verdict, dsse.to_json(envelope))


def _header(requests: Iterator[pb.SubmitRequest], limit: int) -> pb.SubmitHeader:
    first = next(requests, None)
    if first is None or first.WhichOneof("part") != "header":
        raise EvidenceError("the upload does not begin with a header", "send size and SHA-256 first")
    header = first.header
    if header.size > limit:
        raise LimitError(f"a bundle of {header.size} bytes", f"this verifier takes at most {limit}")
    if header.size == 0 or len(header.sha256) != 32:
        raise EvidenceError("the upload's header is incomplete", "send size and SHA-256")
    return header


def _chunks(requests: Iterator[pb.SubmitRequest]) -> Iterator[Chunk]:
    for request in requests:
        if request.WhichOneof("part") != "chunk":
            raise EvidenceError("the upload holds something that is no chunk", "is it the same version?")
        yield request.chunk


def _sequence(value: int) -> int:
    if value > MAX_SEQUENCE:
        raise UsageError(f"sequence number {value}", f"at most {MAX_SEQUENCE}")
    return value


def _message(verdict: StoredVerdict) -> pb.Verdict:
    return pb.Verdict(
        sequence=verdict.sequence,
        verdict_id=verdict.verdict_id,
        bundle_digest=verdict.bundle_digest,
        outcome=verdict.outcome,
        envelope=verdict.envelope,
    )
