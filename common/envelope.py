"""DSSE: a signature over exact bytes and their type (https://github.com/secure-systems-lab/dsse).

What was signed is verified before it is parsed and is never serialized again to verify it.
"""

from __future__ import annotations

import base64

import msgspec

from fpforensics.common.errors import EvidenceError, SignatureError, shorten
from fpforensics.common.keys import Keyring, PrivateKey, PublicKey
from fpforensics.common.strict import Limits, decode_json

SIGNATURE_BYTES = 64
MAX_KEYID = 128
MAX_PAYLOAD_TYPE = 128


class Signature(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An Ed25519 signature. ``keyid`` is a hint which key made it, and is itself not signed."""

    keyid: str
    sig: bytes


class Envelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A payload, its type, and exactly one signature over both.

    Encoded with msgspec this is DSSE's own JSON (bytes in base64), and with MessagePack the envelope of a
    bundle.
    """

    payload_type: str = msgspec.field(name="payloadType")
    payload: bytes
    signatures: tuple[Signature, ...]


def pae(payload_type: str, payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding: the bytes that are signed."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def sign(payload: bytes, payload_type: str, key: PrivateKey) -> Envelope:
    """``payload`` in an envelope, signed by ``key``."""
    signature = Signature(key.keyid, key.sign(pae(payload_type, payload)))
    return Envelope(payload_type, payload, (signature,))


def verify(envelope: Envelope, keyring: Keyring, payload_type: str) -> tuple[bytes, PublicKey]:
    """The payload and the trusted key that signed it; only these bytes may be parsed.

    Raises :class:`EvidenceError` for another payload type or a malformed signature, and
    :class:`SignatureError` when no key in ``keyring`` signed: the message says whether the named key is
    unknown or the bytes were changed.
    """
    check_form(envelope, payload_type)
    (signature,) = envelope.signatures
    message = pae(envelope.payload_type, envelope.payload)
    hinted = keyring.get(signature.keyid)
    # The hint is not signed, so it only decides which key is tried first.
    for key in (*([hinted] if hinted else []), *(key for key in keyring if key is not hinted)):
        try:
            key.verify(signature.sig, message)
        except SignatureError:
            continue
        return envelope.payload, key
    named = shorten(signature.keyid, 64)
    if hinted:
        raise SignatureError(
            f"the signature of key {named} does not fit: the bytes are not those that were signed",
            "fetch them again",
        )
    count = f"{len(keyring)} key{'s' * (len(keyring) != 1)}"
    raise SignatureError(
        f"no trusted key signed this: it names key {named!r}, and the keyring ({count}) lacks it",
        "if you trust its owner, add their .pub file to the keyring: --key FILE.pub",
    )


def check_form(envelope: Envelope, payload_type: str) -> None:
    """Refuse another payload type, or anything but one well-formed signature, whoever made it."""
    if envelope.payload_type != payload_type:
        raise EvidenceError(
            f"payload type {shorten(envelope.payload_type)!r} where {payload_type!r} is expected",
            "is this the right kind of file?",
        )
    if len(envelope.signatures) != 1:
        raise EvidenceError(f"envelope with {len(envelope.signatures)} signatures", "exactly one is expected")
    (signature,) = envelope.signatures
    if len(signature.sig) != SIGNATURE_BYTES:
        raise EvidenceError(f"signature of {len(signature.sig)} bytes", f"Ed25519 has {SIGNATURE_BYTES}")
    if len(signature.keyid) > MAX_KEYID:
        raise EvidenceError(f"keyid of {len(signature.keyid)} characters", f"at most {MAX_KEYID}")


def to_json(envelope: Envelope) -> bytes:
    """DSSE's JSON form, one line."""
    return msgspec.json.encode(envelope)


def from_json(data: bytes, limits: Limits | None = None) -> Envelope:
    """Read DSSE's JSON form, strictly. The result is not verified yet.

    Raises :class:`EvidenceError`; base64 must be standard, padded and canonical.
    """
    limits = limits or Limits()
    # The payload is one long base64 string in here, so the bound on strings is that on the whole.
    text = decode_json(data, _Text, "envelope", msgspec.structs.replace(limits, string=limits.manifest_bytes))
    signatures = tuple(Signature(one.keyid, _base64(one.sig, "signature")) for one in text.signatures)
    return Envelope(text.payload_type, _base64(text.payload, "payload"), signatures)


class _TextSignature(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    sig: str
    keyid: str = ""


class _Text(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    payload_type: str = msgspec.field(name="payloadType")
    payload: str
    signatures: tuple[_TextSignature, ...]


def _base64(text: str, what: str) -> bytes:
    try:
        raw = base64.b64decode(text, validate=True)
    except ValueError:
        raw = b""
    if base64.b64encode(raw).decode() != text:
        raise EvidenceError(f"{what} {shorten(text)!r} is not canonical base64", "write it padded, without spaces")
    return raw
