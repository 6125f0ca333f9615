from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import OTHER_KEY, TEST_KEY

from fpforensics.common.envelope import from_json, pae, sign, to_json, verify
from fpforensics.common.errors import EvidenceError, SignatureError
from fpforensics.common.keys import Keyring, PrivateKey

KEYRING = Keyring([OTHER_KEY.public, TEST_KEY.public])
TYPE = "application/test"


def test_pae_is_that_of_the_specification() -> None:
    expected = b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    assert pae("http://example.com/HelloWorld", b"hello world") == expected


@settings(deadline=None)
@given(st.binary(max_size=500))
def test_what_was_signed_comes_back_with_its_signer(payload: bytes) -> None:
    envelope = sign(payload, TYPE, TEST_KEY)
    assert verify(envelope, KEYRING, TYPE) == (payload, TEST_KEY.public)
    assert from_json(to_json(envelope)) == envelope


def test_json_is_the_standard_form() -> None:
    plain = json.loads(to_json(sign(b"{}", TYPE, TEST_KEY)))
    assert plain["payloadType"] == TYPE
    assert plain["payload"] == "e30="
    assert set(plain["signatures"][0]) == {"keyid", "sig"}


@settings(deadline=None)
@given(st.text(max_size=64))
def test_the_keyid_is_only_a_hint(keyid: str) -> None:
    envelope = sign(b"payload", TYPE, TEST_KEY)
    hinted = msgspec.structs.replace(envelope.signatures[0], keyid=keyid)
    assert verify(msgspec.structs.replace(envelope, signatures=(hinted,)), KEYRING, TYPE)[1] == TEST_KEY.public


def test_an_unknown_key_is_named_with_the_way_to_trust_it() -> None:
    stranger = PrivateKey.fresh()
    with pytest.raises(SignatureError, match=stranger.keyid) as caught:
        verify(sign(b"payload", TYPE, stranger), KEYRING, TYPE)
    assert "--key FILE.pub" in caught.value.diagnostics()
    with pytest.raises(SignatureError):
        verify(sign(b"payload", TYPE, TEST_KEY), Keyring(), TYPE)


def test_changed_bytes_and_another_type_do_not_verify() -> None:
    envelope = sign(b"payload", TYPE, TEST_KEY)
    with pytest.raises(SignatureError, match="does not fit"):
        verify(msgspec.structs.replace(envelope, payload=b"Payload"), KEYRING, TYPE)
    # the type is signed too: an honest payload cannot be passed off as something else
    retyped = msgspec.structs.replace(envelope, payload_type="application/other")
    with pytest.raises(SignatureError):
        verify(retyped, KEYRING, "application/other")
    with pytest.raises(EvidenceError, match="payload type 'application/test'"):
        verify(envelope, KEYRING, "application/other")


@pytest.mark.parametrize("count", [0, 2])
def test_exactly_one_signature(count: int) -> None:
    envelope = sign(b"payload", TYPE, TEST_KEY)
    with pytest.raises(EvidenceError, match=f"{count} signatures"):
        verify(msgspec.structs.replace(envelope, signatures=envelope.signatures * count), KEYRING, TYPE)


@pytest.mark.parametrize("payload", ["e30", "e30=\n", "e31=", "====", "é", "e30=e30="])
def test_base64_has_one_form(payload: str) -> None:
    plain = json.loads(to_json(sign(b"{}", TYPE, TEST_KEY)))
    with pytest.raises(EvidenceError):
        from_json(json.dumps(plain | {"payload": payload}).encode())


@settings(deadline=None)
@given(st.binary(max_size=200) | st.from_regex(r'\{"payload.{0,80}', fullmatch=True).map(str.encode))
def test_garbage_is_an_evidence_error(data: bytes) -> None:
    with pytest.raises(EvidenceError):
        from_json(data)
