"""What a remote party may ask of a prover, and what it may not."""

from __future__ import annotations

from typing import Any

import grpc
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prover_world import MODELS, PLAN, Runner
from service_world import is_serving, open_channel

from fpforensics.common.config import ExecutionConfig
from fpforensics.common.errors import (
    UsageError,
)
from fpforensics.common.serving import RunningServer
from fpforensics.common.signals import CapturePlan, Sampling
from fpforensics.proto import evidence_pb2 as pb
from fpforensics.proto import evidence_pb2_grpc
from fpforensics.prover.service import SERVICE
from fpforensics.prover.session import SessionPlan
from fpforensics.prover.wire import SessionLimits, plan_of, request_of


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
    with open_channel(server.port) as channel:
        stub: Any = evidence_pb2_grpc.ProverStub(channel)  # type: ignore[no-untyped-call]
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.RunSession(request(**changes), timeout=60))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details()
    assert runner.plans == []


def test_a_request_larger_than_any_honest_one_is_cut_off(server: RunningServer, runner: Runner) -> None:
    with open_channel(server.port) as channel:
        stub: Any = evidence_pb2_grpc.ProverStub(channel)  # type: ignore[no-untyped-call]
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.RunSession(request(instruction="x" * (8 << 20)), timeout=60))
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert runner.plans == []
    assert is_serving(server, SERVICE)


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
        temperature=st.just(0.0) | st.floats(1e-3, 100),
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
