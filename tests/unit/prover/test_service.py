"""The prover's service over real gRPC: what it offers, what it refuses, and that nothing stays behind."""

from __future__ import annotations

import hashlib
import logging
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest
from click.testing import CliRunner
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import given, settings
from hypothesis import strategies as st
from rpc_world import NONCE, PROVER_KEY, STRANGER_KEY, write_bundle

from fpforensics.common.access import Listen
from fpforensics.common.config import ExecutionConfig
from fpforensics.common.engines.base import Host
from fpforensics.common.environment import describe_environment
from fpforensics.common.errors import (
    CancelledError,
    DeadlineError,
    EvidenceError,
    LimitError,
    NondeterminismError,
    SignatureError,
    UnavailableError,
    UsageError,
)
from fpforensics.common.keys import Keyring, PrivateKey
from fpforensics.common.rpc import translated
from fpforensics.common.serving import RunningServer, start_server
from fpforensics.common.signals import CapturePlan, Sampling
from fpforensics.proto import evidence_pb2 as pb
from fpforensics.proto import evidence_pb2_grpc
from fpforensics.prover.client import ProverClient
from fpforensics.prover.service import SERVICE, ProverConfig, serve_prover
from fpforensics.prover.session import SessionPlan, SessionProgress
from fpforensics.prover.wire import SessionLimits, plan_of, request_of
from fpforensics.verifier.cli.session import session
from fpforensics.verifier.intake import open_bundle

PLAN = SessionPlan(configs=(ExecutionConfig(attention="eager"),), nonce=NONCE)
MODELS = ("smollm2-135m",)
WIDE = 400_000  # hidden states of several MiB: several chunks


class Runner:
    """Stands where a session would run a model: writes a genuine bundle of synthetic numbers."""

    def __init__(self) -> None:
        self.plans: list[SessionPlan] = []
        self.error: Exception | None = None
        self.hold = False
        self.holding = threading.Event()
        self.cancelled = threading.Event()

    def __call__(
        self,
        plan: SessionPlan,
        host: Host,
        key: PrivateKey,
        output: Path,
        progress: Callable[[SessionProgress], None] | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> str:
        self.plans.append(plan)
        assert progress is not None
        progress(SessionProgress("repetition 1 of 1", 1, 1))
        (output.parent / "leftover").write_bytes(b"spooled")
        if self.error:
            raise self.error
        self.holding.set()
        while self.hold:
            if cancelled():
                self.cancelled.set()
                raise CancelledError("cancelled")
            threading.Event().wait(0.01)  # a model's next step
        return write_bundle(output, key=key, nonce=plan.nonce, configs=plan.configs, width=WIDE)


@pytest.fixture
def runner() -> Runner:
    return Runner()


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


@pytest.fixture
def config(runner: Runner, scratch: Path) -> ProverConfig:
    return ProverConfig(key=PROVER_KEY, run=runner, scratch=scratch)


@pytest.fixture
def server(config: ProverConfig) -> Iterator[RunningServer]:
    with serve_prover(config) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[ProverClient]:
    with ProverClient(f"127.0.0.1:{server.port}") as connected:
        yield connected


def is_serving(server: RunningServer) -> bool:
    with grpc.insecure_channel(f"127.0.0.1:{server.port}", [("grpc.enable_http_proxy", 0)]) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=10)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def test_it_says_who_it_is(client: ProverClient) -> None:
    said = client.describe()
    assert said.keyid == PROVER_KEY.keyid
    assert said.public_key_pem == PROVER_KEY.public.pem().decode()
    assert said.models == MODELS
    assert said.environment == describe_environment()


def test_a_session_ends_in_a_bundle_that_the_intake_accepts(
    client: ProverClient, runner: Runner, scratch: Path, tmp_path: Path
) -> None:
    seen: list[tuple[str, int, int]] = []
    output = tmp_path / "fetched.msgpack"
    digest = client.run_session(PLAN, output, report=lambda *progress: seen.append(progress))
    assert output.stat().st_size > 4 << 20
    with open_bundle(output, Keyring([PROVER_KEY.public]), expected_nonce=NONCE) as bundle:
        bundle.verify_all()
        assert bundle.digest == digest
        assert [row.config for row in bundle.evidence.rows] == list(PLAN.configs)
    assert seen == [("repetition 1 of 1", 1, 1)]
    assert runner.plans == [PLAN]
    assert list(scratch.iterdir()) == []
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["fetched.msgpack"]


def test_one_session_at_a_time_and_the_next_after_it(client: ProverClient, runner: Runner, tmp_path: Path) -> None:
    runner.hold = True
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.run_session, PLAN, tmp_path / "first")
        assert runner.holding.wait(10)
        with pytest.raises(LimitError, match="already under way"):
            client.run_session(PLAN, tmp_path / "second")
        runner.hold = False
        first.result(timeout=30)
    client.run_session(PLAN, tmp_path / "third")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["first", "third"]


class Leave(Exception):  # noqa: N818
    """The caller has had enough."""


def test_a_caller_who_leaves_stops_the_work(
    server: RunningServer, client: ProverClient, runner: Runner, scratch: Path, tmp_path: Path
) -> None:
    runner.hold = True

    def leave(*_: object) -> None:
        raise Leave

    with pytest.raises(Leave):
        client.run_session(PLAN, tmp_path / "left", report=leave)
    assert runner.cancelled.wait(10)
    runner.hold = False
    _until_free(client, tmp_path / "after")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["after"]
    assert list(scratch.iterdir()) == []
    assert is_serving(server)


def test_a_deadline_stops_the_work_too(client: ProverClient, runner: Runner, tmp_path: Path) -> None:
    runner.hold = True
    with pytest.raises(UnavailableError, match="deadline"):
        client.run_session(PLAN, tmp_path / "late", timeout=0.5)
    assert runner.cancelled.wait(10)


def test_a_stopping_server_cancels_its_session(server: RunningServer, runner: Runner, tmp_path: Path) -> None:
    runner.hold = True
    with ProverClient(f"127.0.0.1:{server.port}") as client, ThreadPoolExecutor(1) as pool:
        session = pool.submit(client.run_session, PLAN, tmp_path / "never")
        assert runner.holding.wait(10)
        server.stop(grace=60)  # which nobody waits for: the work is ended at once
        assert runner.cancelled.is_set()
        with pytest.raises(UnavailableError, match="the prover is stopping"):
            session.result(timeout=10)
    assert not (tmp_path / "never").exists()


def test_the_server_has_a_deadline_of_its_own(config: ProverConfig, runner: Runner, tmp_path: Path) -> None:
    runner.hold = True
    with serve_prover(replace(config, max_seconds=0.2)) as server, ProverClient(f"127.0.0.1:{server.port}") as client:
        for _ in range(2):  # the second finds the prover free
            with pytest.raises(DeadlineError, match=r"session stopped: it took more than the 0\.2 seconds"):
                client.run_session(PLAN, tmp_path / "late")
    assert runner.cancelled.is_set()
    assert len(runner.plans) == 2
    assert not (tmp_path / "late").exists()


def test_a_session_that_is_quiet_for_long_repeats_its_progress(
    config: ProverConfig, runner: Runner, tmp_path: Path
) -> None:
    runner.hold = True
    seen: list[tuple[str, int, int]] = []

    def saw(stage: str, done: int, total: int) -> None:
        seen.append((stage, done, total))
        runner.hold = len(seen) < 4

    with (
        serve_prover(replace(config, heartbeat_seconds=0.01)) as server,
        ProverClient(f"127.0.0.1:{server.port}") as client,
    ):
        client.run_session(PLAN, tmp_path / "fetched", report=saw)
    assert set(seen[:4]) <= {("repetition 1 of 1", 1, 1), ("session under way", 0, 0)}
    assert seen[3] == ("repetition 1 of 1", 1, 1)


def test_each_session_is_logged_in_one_line(
    config: ProverConfig, runner: Runner, scratch: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="fpforensics")
    texts = (("report", "a secret prompt"),)
    plan = msgspec.structs.replace(PLAN, texts=texts, instruction="a secret instruction")
    with serve_prover(config) as server, ProverClient(f"127.0.0.1:{server.port}") as client:
        digest = client.run_session(plan, tmp_path / "done")
        with pytest.raises(UsageError):
            client.run_session(msgspec.structs.replace(PLAN, repetitions=1000), tmp_path / "refused")
        runner.hold, runner.holding = True, threading.Event()

        def leave(*_: object) -> None:
            raise Leave

        with pytest.raises(Leave):
            client.run_session(PLAN, tmp_path / "left", report=leave)
        assert runner.cancelled.wait(10)
        runner.hold = False
        _until_free(client, tmp_path / "after")
        runner.hold, runner.holding = True, threading.Event()
        with ThreadPoolExecutor(1) as pool:
            last = pool.submit(client.run_session, PLAN, tmp_path / "aborted")
            assert runner.holding.wait(10)
            server.stop()
            assert isinstance(last.exception(timeout=10), UnavailableError)
    lines = [line for line in caplog.messages if line.startswith("session ") and "already under way" not in line]
    done, refused, left, after, aborted = lines
    assert re.fullmatch(
        r"session peer=127\.0\.0\.1:\d+ configs=attn=eager outcome=done model=smollm2-135m references=4 new_tokens=32 "
        rf"bundle={digest} seconds=\d+\.\d",
        done,
    )
    assert 'outcome=refused error="UsageError: repetitions 1000"' in refused
    assert "outcome=cancelled" in left
    assert "outcome=done" in after
    assert "outcome=aborted" in aborted
    assert "the prover is stopping" in aborted
    assert not any("secret" in line or NONCE in line for line in lines)


def test_a_verifiers_session_asks_who_it_is_before_the_work(
    server: RunningServer, runner: Runner, tmp_path: Path
) -> None:
    trusted, stranger = tmp_path / "prover.pub", tmp_path / "stranger.pub"
    trusted.write_bytes(PROVER_KEY.public.pem())
    stranger.write_bytes(STRANGER_KEY.public.pem())

    def ask(key: Path) -> BaseException | None:
        output = str(tmp_path / "bundle")
        arguments = [
            "--prover",
            f"127.0.0.1:{server.port}",
            "--key",
            str(key),
            "--output",
            output,
            "--claim",
            "quant=none",
        ]
        return CliRunner().invoke(session, arguments).exception

    error = ask(stranger)
    assert isinstance(error, SignatureError)
    assert "which is not trusted here" in error.message
    assert STRANGER_KEY.keyid[:16] in error.message
    assert runner.plans == []
    # The control: this key is trusted, so the work is done, and its stand-in is no answer to what was asked.
    assert isinstance(ask(trusted), EvidenceError)
    assert len(runner.plans) == 1


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (NondeterminismError("repetition 2 differs", "find the cause"), NondeterminismError),
        (RuntimeError("CUDA exploded at /home/secret"), UnavailableError),
    ],
)
def test_a_failed_session_says_why_and_leaves_nothing(
    server: RunningServer,
    client: ProverClient,
    runner: Runner,
    scratch: Path,
    tmp_path: Path,
    raised: Exception,
    expected: type[Exception],
) -> None:
    runner.error = raised
    with pytest.raises(expected) as caught:
        client.run_session(PLAN, tmp_path / "failed")
    assert "secret" not in str(caught.value)
    assert list(scratch.iterdir()) == []
    assert not (tmp_path / "failed").exists()
    runner.error = None
    client.run_session(PLAN, tmp_path / "good")
    assert is_serving(server)


def _until_free(client: ProverClient, output: Path) -> None:
    """The lane is free once the cancelled work has ended, which may be a moment after it noticed."""
    for _ in range(200):
        try:
            client.run_session(PLAN, output)
        except LimitError:
            threading.Event().wait(0.02)
        else:
            return
    raise AssertionError("the prover stays busy")


def request(**changes: Any) -> pb.SessionRequest:
    asked = request_of(PLAN)
    for name, value in changes.items():
        asked.ClearField(name)
        if isinstance(value, list):
            getattr(asked, name).extend(value)
        elif isinstance(value, (pb.Sampling, pb.Capture)):
            getattr(asked, name).CopyFrom(value)
        else:
            setattr(asked, name, value)
    return asked


HOSTILE: dict[str, dict[str, Any]] = {
    "no config": {"configs": []},
    "too many configs": {"configs": ["attn=eager"] * 33},
    "nonsense": {"configs": ["!" * 200]},
    "long config": {"configs": ["attn=" + "x" * 5000]},
    "a file as model": {"configs": ["model=/etc/passwd"]},
    "a download": {"configs": ["model=evil/weights"]},
    "a revision": {"configs": ["revision=../../x"]},
    "short nonce": {"nonce": b"x"},
    "long nonce": {"nonce": b"x" * 65},
    "no references": {"references": 0},
    "references": {"references": 2**31},
    "prompt tokens": {"prompt_tokens": 2**31},
    "repetitions": {"repetitions": 1000},
    "instruction": {"instruction": "x" * 5000},
    "a path as text name": {"texts": [pb.Document(name="../x", text="words")]},
    "an empty text": {"texts": [pb.Document(name="x", text=" ")]},
    "too much text": {"texts": [pb.Document(name="x", text="x" * (1 << 19))] * 3},
    "too many texts": {"texts": [pb.Document(name="x", text="x")] * 300},
    "NaN temperature": {"sampling": pb.Sampling(temperature=float("nan"))},
    "negative temperature": {"sampling": pb.Sampling(temperature=-1)},
    "top_p": {"sampling": pb.Sampling(top_p=0)},
    "new tokens": {"sampling": pb.Sampling(max_new_tokens=2**31)},
    "seed": {"sampling": pb.Sampling(seed=2**63)},
    "layer": {"capture": pb.Capture(layers=["0"])},
    "layer name": {"capture": pb.Capture(layers=["../1"])},
    "layer twice": {"capture": pb.Capture(layers=["1", "1"])},
    "top_k": {"capture": pb.Capture(top_k=2**31)},
}


@pytest.mark.parametrize("changes", HOSTILE.values(), ids=HOSTILE)
def test_what_a_remote_party_may_not_ask_is_refused(
    server: RunningServer, runner: Runner, changes: dict[str, Any]
) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{server.port}", [("grpc.enable_http_proxy", 0)]) as channel:
        stub: Any = evidence_pb2_grpc.ProverStub(channel)  # type: ignore[no-untyped-call]
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.RunSession(request(**changes), timeout=10))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details()
    assert runner.plans == []


def test_a_request_larger_than_any_honest_one_is_cut_off(server: RunningServer, runner: Runner) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{server.port}", [("grpc.enable_http_proxy", 0)]) as channel:
        stub: Any = evidence_pb2_grpc.ProverStub(channel)  # type: ignore[no-untyped-call]
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.RunSession(request(instruction="x" * (8 << 20)), timeout=10))
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert runner.plans == []
    assert is_serving(server)


def test_left_out_fields_take_the_provers_defaults() -> None:
    plan = plan_of(pb.SessionRequest(configs=["attn=eager"]), MODELS, SessionLimits())
    assert plan == SessionPlan(configs=(ExecutionConfig(attention="eager"),))


def test_a_client_sends_texts_and_never_paths() -> None:
    texts = (("report.md", "Some words."),)
    plan = msgspec.structs.replace(PLAN, texts=texts)
    assert plan_of(request_of(plan), MODELS, SessionLimits()).texts == texts
    with pytest.raises(UsageError, match="opens no files"):
        request_of(msgspec.structs.replace(PLAN, documents=("/etc/passwd",)))


PLANS = st.builds(
    SessionPlan,
    configs=st.lists(
        st.builds(
            ExecutionConfig,
            dtype=st.sampled_from(["bf16", "fp16", "fp32"]),
            attention=st.sampled_from(["eager", "sdpa", "flex"]),
            quantization=st.sampled_from(["none", "bnb-nf4"]),
            batch_size=st.integers(1, 64),
            compile=st.booleans(),
            matmul=st.sampled_from(["native", "fp32-rounded"]),
            emulate_tensor_parallel=st.integers(1, 64),
        ),
        min_size=1,
        max_size=4,
    ).map(tuple),
    references=st.integers(1, 256),
    prompt_tokens=st.integers(1, 32_768),
    instruction=st.text(st.characters(codec="utf-8"), max_size=50),
    capture=st.builds(
        CapturePlan,
        layers=st.sampled_from([("1", "last"), ("2",), ("1", "2", "4", "12", "last")]),
        prefill_positions=st.integers(0, 32_768),
        decode_positions=st.integers(0, 8192),
        top_k=st.integers(1, 1024),
        full_logits=st.booleans(),
    ),
    sampling=st.builds(
        Sampling,
        max_new_tokens=st.integers(1, 8192),
        temperature=st.floats(0, 100),
        top_p=st.floats(0, 1, exclude_min=True),
        seed=st.integers(0, 2**63 - 1),
    ),
    repetitions=st.integers(1, 20),
    allow_nondeterminism=st.booleans(),
    layers_named=st.booleans(),
    nonce=st.one_of(st.just(""), st.binary(min_size=16, max_size=64).map(bytes.hex)),
)


@settings(max_examples=100, deadline=None)
@given(plan=PLANS)
def test_a_plan_crosses_the_wire_unchanged(plan: SessionPlan) -> None:
    sent = pb.SessionRequest.FromString(request_of(plan).SerializeToString())
    assert plan_of(sent, MODELS, SessionLimits()) == plan


class Lying(evidence_pb2_grpc.ProverServicer):
    """Sends the events it is given."""

    events: tuple[pb.SessionEvent, ...] = ()

    def RunSession(self, request: Any, context: Any) -> Iterator[pb.SessionEvent]:  # noqa: N802
        yield from self.events


def chunk(data: bytes, covered: bytes | None = None) -> pb.SessionEvent:
    digest = hashlib.sha256(data if covered is None else covered).digest()
    return pb.SessionEvent(chunk=pb.Chunk(data=data, running_sha256=digest))


def end(size: int, data: bytes) -> pb.SessionEvent:
    sha256 = hashlib.sha256(data).digest()
    return pb.SessionEvent(end=pb.BundleEnd(size=size, sha256=sha256, bundle_digest="sha256:1"))


LIES: dict[str, tuple[tuple[pb.SessionEvent, ...], type[Exception]]] = {
    "nothing": ((), EvidenceError),
    "no end": ((chunk(b"ab"),), EvidenceError),
    "damaged": ((chunk(b"ab", b"aX"), end(2, b"ab")), EvidenceError),
    "truncated": ((chunk(b"ab"), end(3, b"abc")), EvidenceError),
    "wrong digest": ((chunk(b"ab"), end(2, b"aX")), EvidenceError),
    "more after the end": ((chunk(b"ab"), end(2, b"ab"), chunk(b"c", b"abc")), EvidenceError),
    "an empty event": ((pb.SessionEvent(),), EvidenceError),
    "too much": ((chunk(b"x" * 1001), end(1001, b"x" * 1001)), LimitError),
}


@pytest.mark.parametrize(("events", "error"), LIES.values(), ids=LIES)
def test_a_lying_prover_writes_nothing(
    tmp_path: Path, events: tuple[pb.SessionEvent, ...], error: type[Exception]
) -> None:
    servicer = Lying()
    add: Any = evidence_pb2_grpc.add_ProverServicer_to_server
    with (
        start_server(Listen(), lambda it: add(servicer, it), SERVICE) as server,
        ProverClient(f"127.0.0.1:{server.port}") as client,
    ):
        servicer.events = (chunk(b"ab"), end(2, b"ab"))
        assert client.run_session(PLAN, tmp_path / "control", max_bytes=1000) == "sha256:1"
        servicer.events = events
        with pytest.raises(error):
            client.run_session(PLAN, tmp_path / "lie", max_bytes=1000)
    assert [path.name for path in tmp_path.iterdir()] == ["control"]


def test_only_rpc_failures_are_translated() -> None:
    with pytest.raises(ZeroDivisionError), translated():
        _ = 1 / 0
