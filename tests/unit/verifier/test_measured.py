"""A profile of one's own as a file: read back as it was signed, and refused when anybody else wrote it or it makes no sense."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from small_profile import BUNDLES, CONTENT, CPU, ENTRY, SCOPE, profile_bytes

from fpforensics.common import envelope as dsse
from fpforensics.common.errors import EvidenceError, LimitError, SignatureError, UsageError
from fpforensics.common.keys import Keyring, PrivateKey
from fpforensics.verifier import measured as module
from fpforensics.verifier.measured import (
    CALIBRATION_TYPE,
    PAYLOAD_TYPE,
    load_profile,
    open_profile,
    sign_profile,
)

KEY, STRANGER = PrivateKey.from_seed(b"k" * 32), PrivateKey.from_seed(b"x" * 32)
TRUSTED = Keyring([KEY.public])


def written(key: PrivateKey = KEY) -> bytes:
    return profile_bytes(key)


def signed_anyway(change: Callable[[dict[str, Any]], object], kind: str = PAYLOAD_TYPE) -> bytes:
    """Whatever ``change`` makes of a good statement, under a good signature."""
    payload = msgspec.json.decode(sign_profile(CONTENT, BUNDLES, KEY).payload)
    change(payload)
    return dsse.to_json(dsse.sign(msgspec.json.encode(payload), kind, KEY))


def test_what_was_signed_is_read_back() -> None:
    profile = open_profile(written(), TRUSTED)
    assert (profile.content, profile.signer) == (CONTENT, KEY.public)
    assert profile.bundles == ("a" * 64, "b" * 64)
    assert profile.digest.startswith("sha256:") and len(profile.digest) == 71
    assert profile.find(SCOPE, 0.5) == ENTRY


def test_a_strangers_profile_is_refused() -> None:
    with pytest.raises(SignatureError, match="no trusted key signed this"):
        open_profile(written(key=STRANGER), TRUSTED)


def test_a_changed_profile_is_refused() -> None:
    envelope = dsse.from_json(written())
    other = envelope.payload.replace(b'"prompts":3', b'"prompts":9')
    assert other != envelope.payload
    with pytest.raises(SignatureError, match="does not fit"):
        open_profile(dsse.to_json(msgspec.structs.replace(envelope, payload=other)), TRUSTED)
    with pytest.raises(EvidenceError, match="envelope with 0 signatures"):
        open_profile(dsse.to_json(msgspec.structs.replace(envelope, signatures=())), TRUSTED)


def _in(*path: Any) -> Callable[[Any], Callable[[dict[str, Any]], object]]:
    def setting(value: Any) -> Callable[[dict[str, Any]], object]:
        def change(payload: dict[str, Any]) -> None:
            at: Any = payload["predicate"]
            for key in path[:-1]:
                at = at[key]
            at[path[-1]] = value

        return change

    return setting


ONE = ("measured", 0)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda payload: payload.update(_type="x"), "statement type 'x'"),
        (lambda payload: payload.update(predicateType="x"), f"where '{CALIBRATION_TYPE}' is expected"),
        (lambda payload: payload.pop("subject"), "is malformed"),
        (_in("format")(9), "has format 9"),
        (_in("surprise")(1), "is malformed"),
        (_in("name")(""), "has a name of 0 characters"),
        (_in("measured")([]), "holds 0 calibrations"),
        (_in(*ONE, "pools")([]), "holds no pools"),
        (_in(*ONE, "pools", 0, "floors")([0.3, 0.1, 0.2]), "is empty or not sorted"),
        (_in(*ONE, "pools", 0, "margin")([]), "is empty or not sorted"),
        (_in(*ONE, "pools", 0, "prompts")(4), "is empty or not sorted"),
        (_in(*ONE, "pools", 0, "noise_prompts")(0), "is empty or not sorted"),
        (_in(*ONE, "prompts")(2), "counts more prompts in a pool"),
        (_in(*ONE, "cells", 0, "quantiles")([0.1]), "without 7 quantiles"),
        (_in(*ONE, "scope", "config", "dtype")("int3"), "is malformed"),
        (lambda payload: payload["predicate"]["measured"].append(payload["predicate"]["measured"][0]), "in one scope"),
    ],
)
def test_a_signed_profile_that_makes_no_sense_is_refused(change: Any, told: str) -> None:
    with pytest.raises(EvidenceError, match=told):
        open_profile(signed_anyway(change), TRUSTED)


def test_a_profile_of_another_version_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_bytes(signed_anyway(_in("format")(0)))
    with pytest.raises(EvidenceError) as refused:
        load_profile(path, TRUSTED)
    assert "old.json: the profile has format 0, this version reads format 1" in refused.value.message
    assert refused.value.hint == "calibrate again with this version"


def test_without_rivals_there_are_no_margins() -> None:
    def alone(payload: dict[str, Any]) -> None:
        payload["predicate"]["measured"][0]["rivals"] = []
        payload["predicate"]["measured"][0]["pools"][0]["margin"] = []

    (entry,) = open_profile(signed_anyway(alone), TRUSTED).content.measured
    assert entry.pools[0].p_margin(-9.0) == 1.0


def test_another_kind_of_statement_is_no_profile() -> None:
    with pytest.raises(EvidenceError, match="payload type"):
        open_profile(signed_anyway(lambda _: None, "application/vnd.in-toto+json"), TRUSTED)


def test_size_is_bounded_before_parsing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_bytes(written())
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 100)
    with pytest.raises(EvidenceError, match="of 101 bytes"):
        load_profile(path, TRUSTED)
    monkeypatch.setattr(module, "MAX_PAYLOAD_BYTES", 100)
    with pytest.raises(LimitError, match="at most 100 are signed"):
        written()


def test_a_file_is_named_in_its_errors(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    with pytest.raises(UsageError, match="no profile") as missing:
        load_profile(path, TRUSTED)
    assert "verifier calibrate" in missing.value.hint
    path.write_bytes(written(key=STRANGER))
    with pytest.raises(SignatureError, match=r"profile .*profile\.json: no trusted key") as refused:
        load_profile(path, TRUSTED)
    assert "--profile-key FILE.pub" in refused.value.hint
    path.write_bytes(b"not json")
    with pytest.raises(EvidenceError, match=r"profile\.json: .*is not JSON"):
        load_profile(path, TRUSTED)


def test_only_the_same_scope_is_found() -> None:
    profile = open_profile(written(), TRUSTED)
    other = msgspec.structs.replace(SCOPE, mode="prefill")
    assert profile.find(other, 0.5) is None
    assert profile.missing(other, 0.5) == ("replay mode prefill where decode was measured",)
    assert profile.find(SCOPE, 0.9) is None
    assert profile.missing(SCOPE, 0.9) == ("90% of the positions are generated ones where 50% were measured",)
    unknown = msgspec.structs.replace(SCOPE, config=msgspec.structs.replace(SCOPE.config, weights_digest=""))
    assert profile.find(unknown, 0.5) is None
    # what a machine is configured with is said elsewhere, and does not refuse
    threads = msgspec.structs.replace(CPU, details={"torch": "2.14.0"})
    assert profile.find(msgspec.structs.replace(SCOPE, prover=threads), 0.5) == ENTRY
