"""Verdicts: what was signed is what is read, and nothing else is believed."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rpc_world import PROVER_KEY, STRANGER_KEY, VERIFIER_KEY, result_about

from fpforensics.common import envelope as dsse
from fpforensics.common.errors import Error, EvidenceError, LimitError, SignatureError
from fpforensics.common.evidence import EVIDENCE_TYPE, PAYLOAD_TYPE, VERDICT_TYPE
from fpforensics.common.keys import Keyring
from fpforensics.verifier.verdict import MAX_ENVELOPE_BYTES, open_verdict, sign_verdict, verify_verdict

DIGEST = f"sha256:{'5' * 64}"
KEYRING = Keyring([VERIFIER_KEY.public])


def test_what_was_signed_is_what_is_read() -> None:
    result = result_about(DIGEST, claim="quant=none")
    envelope = sign_verdict(result, VERIFIER_KEY, True, sequence=7)
    statement = verify_verdict(envelope, KEYRING)
    assert statement.predicate.result == result
    assert (statement.predicate.sequence, statement.predicate.challenged) == (7, True)
    assert statement.subject[0].digest == {"sha256": "5" * 64}

    opened = open_verdict(dsse.to_json(envelope), KEYRING)
    assert opened.statement == statement
    assert opened.signer == VERIFIER_KEY.public


def test_each_verdict_has_an_id_of_its_own() -> None:
    envelopes = [sign_verdict(result_about(DIGEST), VERIFIER_KEY) for _ in range(2)]
    ids = {verify_verdict(envelope, KEYRING).predicate.verdict_id for envelope in envelopes}
    assert len(ids) == 2


@pytest.mark.parametrize("keyring", [Keyring(), Keyring([PROVER_KEY.public, STRANGER_KEY.public])])
def test_a_key_that_is_not_trusted_signs_nothing(keyring: Keyring) -> None:
    with pytest.raises(SignatureError):
        verify_verdict(sign_verdict(result_about(DIGEST), VERIFIER_KEY), keyring)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_byte_of_a_signed_verdict_can_change(data: st.DataObject) -> None:
    envelope = sign_verdict(result_about(DIGEST), VERIFIER_KEY)
    at = data.draw(st.integers(0, len(envelope.payload) - 1))
    flip = data.draw(st.integers(1, 255))
    changed = bytearray(envelope.payload)
    changed[at] ^= flip
    with pytest.raises(SignatureError):
        verify_verdict(msgspec.structs.replace(envelope, payload=bytes(changed)), KEYRING)


def test_infinity_and_nan_are_never_signed() -> None:
    result = result_about(DIGEST)
    for number in (float("nan"), float("inf")):
        row = msgspec.structs.replace(result.rows[0], snr=number)
        with pytest.raises(Error, match="changes when it is written"):
            sign_verdict(msgspec.structs.replace(result, rows=(row,)), VERIFIER_KEY)


def test_a_verdict_too_large_to_be_read_is_not_signed() -> None:
    row = msgspec.structs.replace(result_about(DIGEST).rows[0], reasons=("x" * 1000,) * 6000)
    with pytest.raises(LimitError):
        sign_verdict(msgspec.structs.replace(result_about(DIGEST), rows=(row,)), VERIFIER_KEY)
    with pytest.raises(EvidenceError, match=f"verdict of {MAX_ENVELOPE_BYTES + 1} bytes"):
        open_verdict(b"{" * (MAX_ENVELOPE_BYTES + 1), KEYRING)


def _resigned(**changes: Any) -> dsse.Envelope:
    """A statement with top-level fields changed, genuinely signed by the verifier's key."""
    payload = json.loads(sign_verdict(result_about(DIGEST), VERIFIER_KEY).payload)
    payload.update(changes)
    return dsse.sign(json.dumps(payload).encode(), PAYLOAD_TYPE, VERIFIER_KEY)


@pytest.mark.parametrize(
    "changes",
    [
        {"predicateType": EVIDENCE_TYPE},
        {"_type": "https://in-toto.io/Statement/v0.1"},
        {"subject": []},
        {"subject": [{"name": "bundle", "digest": {"sha256": "6" * 64}}]},
        {"subject": [{"name": "bundle", "digest": {"sha1": "5" * 64}}]},
        {"surprise": 1},
        {"predicate": {}},
    ],
)
def test_a_signature_does_not_excuse_nonsense(changes: dict[str, Any]) -> None:
    assert verify_verdict(_resigned(), KEYRING).predicate_type == VERDICT_TYPE  # the control
    with pytest.raises(EvidenceError):
        verify_verdict(_resigned(**changes), KEYRING)


def test_another_payload_type_is_no_verdict() -> None:
    envelope = sign_verdict(result_about(DIGEST), VERIFIER_KEY)
    foreign = dsse.sign(envelope.payload, "application/json", VERIFIER_KEY)
    with pytest.raises(EvidenceError, match="payload type"):
        verify_verdict(foreign, KEYRING)
