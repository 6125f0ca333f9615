"""The worker's wire: arrays keep every bit, errors keep their class, and nothing is unpickled or trusted."""

from __future__ import annotations

import socket

import ml_dtypes
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from fpforensics.common import errors
from fpforensics.common.engines import wire
from fpforensics.common.errors import Error, MissingDependencyError, ReplayError, UsageError
from fpforensics.common.signals import CapturePlan, Forcing, PhaseTrace, Reference, Sampling, Trace, first_divergence


def through(message: wire.Reply) -> wire.Reply:
    left, right = socket.socketpair()
    with left, right:
        wire.send(left, message)
        left.shutdown(socket.SHUT_WR)
        received = wire.receive_reply(right)
        assert received is not None and wire.receive_reply(right) is None
        return received


def phase_trace(bits: np.ndarray) -> PhaseTrace:
    count = len(bits)
    return PhaseTrace(
        positions=np.arange(count, dtype=np.int32),
        logprob_ids=np.zeros((count, 2), np.int32),
        logprobs=np.zeros((count, 2), np.float32),
        chosen_logprobs=np.zeros(count, np.float32),
        hidden_states={"1": bits.view(ml_dtypes.bfloat16), "last": bits.astype(np.float32)},
        key_vectors={"2": bits.astype(np.float64).T.copy().T},
    )


@given(arrays(np.uint16, array_shapes(min_dims=2, max_dims=2, max_side=5)))
def test_traces_keep_every_bit(bits: np.ndarray) -> None:
    trace = Trace("ref_0", np.arange(3, dtype=np.int32), phase_trace(bits), phase_trace(bits[:0]))
    received = through(wire.Traces([trace]))
    assert isinstance(received, wire.Traces)
    assert first_divergence(trace, received.traces[0]) is None
    assert received.traces[0].prefill.hidden_states["1"].dtype == ml_dtypes.bfloat16


def test_requests_arrive_as_they_were() -> None:
    reference = Reference("ref_0", np.arange(4, dtype=np.int32), "here")
    forcing = Forcing(
        reference,
        np.arange(2, dtype=np.int32),
        {"decode": np.array([4], np.int32)},
        {"decode": np.zeros((1, 3), np.int32)},
    )
    left, right = socket.socketpair()
    with left, right:
        wire.send(left, wire.TeacherForce([forcing], CapturePlan(), "decode"))
        wire.send(left, wire.Generate([reference], Sampling(seed=2**63 - 1), CapturePlan()))
        first, second = wire.receive_request(right), wire.receive_request(right)
    assert isinstance(first, wire.TeacherForce) and isinstance(second, wire.Generate)
    assert np.array_equal(first.forcings[0].claimed_ids["decode"], np.zeros((1, 3)))
    assert second.references[0].source == "here" and second.sampling.seed == 2**63 - 1


@pytest.mark.parametrize(
    "error",
    [
        UsageError("bad", "do this"),
        MissingDependencyError("a", "b", "c"),
        ReplayError("x"),
        errors.CancelledError("no"),
    ],
)
def test_errors_keep_class_message_and_hint(error: Error) -> None:
    received = through(wire.Failed.of(error))
    assert isinstance(received, wire.Failed)
    again = received.error()
    assert type(again) is type(error)
    assert (again.message, again.hint, str(again)) == (error.message, error.hint, str(error))


@pytest.mark.parametrize("kind", ["SystemExit", "did_you_mean", "nonsense", "Exception"])
def test_an_unknown_error_class_becomes_a_replay_error(kind: str) -> None:
    assert type(wire.Failed(kind, "m", "h").error()) is ReplayError


@given(st.binary(max_size=60))
def test_garbage_is_refused_not_interpreted(body: bytes) -> None:
    left, right = socket.socketpair()
    with left, right:
        left.sendall(len(body).to_bytes(8, "big") + body)
        with pytest.raises((msgspec.DecodeError, msgspec.ValidationError)):
            wire.receive_reply(right)


def test_an_oversized_frame_is_refused_before_it_is_read() -> None:
    left, right = socket.socketpair()
    with left, right:
        left.sendall((2**60).to_bytes(8, "big"))
        with pytest.raises(ReplayError, match=str(2**60)):
            wire.receive_reply(right)


@pytest.mark.parametrize("cut", [0, 3, 8, 12])
def test_a_stream_that_ends_early_is_an_end(cut: int) -> None:
    left, right = socket.socketpair()
    with right:
        with left:
            left.sendall(((20).to_bytes(8, "big") + b"x" * 20)[:cut])
        assert wire.receive_reply(right) is None
