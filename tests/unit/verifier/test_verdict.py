"""Verdicts: what was signed is what is read, and nothing else is believed."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from rpc_world import PROVER_KEY, STRANGER_KEY, VERIFIER_KEY, result_about, write_bundle

from fpforensics.common import envelope as dsse
from fpforensics.common.errors import Error, EvidenceError, LimitError, SignatureError
from fpforensics.common.evidence import EVIDENCE_TYPE, PAYLOAD_TYPE, VERDICT_TYPE
from fpforensics.common.keys import Keyring
from fpforensics.common.signals import PHASES
from fpforensics.verifier.check import CheckPlan
from fpforensics.verifier.cli import cli
from fpforensics.verifier.distance import Cell
from fpforensics.verifier.intake import open_bundle
from fpforensics.verifier.matrix import Measurement, build_matrices
from fpforensics.verifier.verdict import (
    MAX_ENVELOPE_BYTES,
    MAX_PAYLOAD_BYTES,
    distances_bytes,
    open_verdict,
    require_signable,
    sign_verdict,
    verify_verdict,
)

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


def test_verify_says_first_whose_the_signature_is(tmp_path: Path) -> None:
    for name, key in (("verifier", VERIFIER_KEY), ("stranger", STRANGER_KEY)):
        (tmp_path / f"{name}.pub").write_bytes(key.public.pem())
    path = tmp_path / "verdict.json"
    path.write_bytes(dsse.to_json(sign_verdict(result_about(DIGEST), VERIFIER_KEY, True)))

    def verify(key: str) -> Result:
        return CliRunner().invoke(cli, ["verdicts", "verify", str(path), "--key", str(tmp_path / f"{key}.pub")])

    said = verify("verifier").stdout.splitlines()
    assert said[0] == f"✓ The signature holds: by the verifier's key {VERIFIER_KEY.keyid}"
    assert said[1].endswith("the bundle answered a fresh challenge") and "VERDICT" in said
    refused = verify("stranger")
    assert isinstance(refused.exception, SignatureError)  # main() prints it, exit code 4
    assert "holds" not in refused.output and "VERDICT" not in refused.output


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


@pytest.mark.parametrize(("rows", "members", "references"), [(1, 8, 200), (3, 12, 20), (24, 24, 2), (8, 40, 4)])
def test_a_verdicts_size_is_known_before_the_replays(tmp_path: Path, rows: int, members: int, references: int) -> None:
    write_bundle(tmp_path / "bundle")
    with open_bundle(tmp_path / "bundle", Keyring([PROVER_KEY.public])) as bundle:
        small = bundle.evidence
    (row,), (reference,) = small.rows, small.references
    names = [f"attn=sdpa,dtype=bf16,batch={number}" for number in range(1, members + 1)]
    evidence = msgspec.structs.replace(
        small,
        rows=tuple(msgspec.structs.replace(row, config_id=name) for name in names[:rows]),
        references=(reference,) * references,
    )
    rng = np.random.default_rng(0)
    cells = [Cell(phase, "logprobs") for phase in PHASES]
    cells += [Cell(phase, signal, "1") for phase in PHASES for signal in ("key_vectors", "hidden_states")]
    matrices = build_matrices(
        Measurement(
            row=a, column=b, reference_id=f"ref_{number}", distances={cell: float(rng.random()) for cell in cells}
        )
        for a, b, number in itertools.product(names[:rows], names, range(references))
    )
    result = msgspec.structs.replace(result_about(DIGEST), matrices=tuple(each.to_report() for each in matrices))
    plan = CheckPlan(lineup=tuple(names))
    estimate, actual = distances_bytes(evidence, plan), len(sign_verdict(result, VERIFIER_KEY).payload)
    assert 0.7 * actual < estimate < actual
    require_signable(evidence, plan)
    times = MAX_PAYLOAD_BYTES // estimate + 1
    with pytest.raises(LimitError, match="make a verdict of about"):
        require_signable(msgspec.structs.replace(evidence, references=(reference,) * references * times * 10), plan)
    # One row of many fits again, which is the way out that the hint names.
    assert distances_bytes(evidence, CheckPlan(lineup=plan.lineup, row=names[0])) <= estimate
    assert distances_bytes(evidence, CheckPlan(row="no such row")) == 0


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
