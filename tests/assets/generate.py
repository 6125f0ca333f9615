"""Writes the golden bundle, the hostile ones and their index; the same bytes every time.

    PYTHONPATH=tests .venv/bin/python -m assets.generate [FOLDER]

Every hostile bundle but those about signatures is signed by the trusted (test) key: a signature alone
protects nobody.
"""

from __future__ import annotations

import copy
import hashlib
import json
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import msgspec
import numpy as np
from synthetic import OTHER_KEY, TEST_KEY, Size, write_synthetic

from fpforensics.common.bundle_file import BundleFile
from fpforensics.common.envelope import Envelope, sign
from fpforensics.common.evidence import PAYLOAD_TYPE, VERDICT_TYPE
from fpforensics.common.frame import blob_header, head
from fpforensics.common.keys import PrivateKey
from fpforensics.common.signals import Array

FOLDER = Path(__file__).parent
GOLDEN = "golden.msgpack"
GOLDEN_SIZE = Size(rows=2, references=2, layers=("1", "last"))
INDEX = "index.json"

Blobs = list[tuple[bytes, bytes]]
Edit = Callable[[dict[str, Any]], None]


class Case(msgspec.Struct, frozen=True):
    """What must happen to a hostile file: an error of this class, whose message contains this."""

    error: str
    message: str


class Hostile(NamedTuple):
    data: bytes
    error: str
    message: str


def generate(folder: Path) -> None:
    """Write everything below ``folder``."""
    (folder / "hostile").mkdir(parents=True, exist_ok=True)
    write_synthetic(folder / GOLDEN, GOLDEN_SIZE)
    index: dict[str, Case] = {}
    for name, hostile in Corpus().cases().items():
        (folder / "hostile" / f"{name}.msgpack").write_bytes(hostile.data)
        index[name] = Case(hostile.error, hostile.message)
    encoded = msgspec.json.format(msgspec.json.encode(index), indent=1)
    (folder / INDEX).write_bytes(encoded + b"\n")


class Corpus:
    """Starts from a small valid bundle and spoils one thing at a time."""

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "base.msgpack"
            write_synthetic(path, Size(prefill_layers=()))
            self.base = path.read_bytes()
            with BundleFile(path) as file:
                self.envelope = file.envelope
                self.blobs: Blobs = [
                    (bytes.fromhex(blob.sha256), self.base[blob.offset : blob.offset + blob.length])
                    for blob in file.blobs()
                ]
        self.manifest: dict[str, Any] = json.loads(self.envelope.payload)

    def cases(self) -> dict[str, Hostile]:
        """Every hostile file by name."""
        return {
            **self.frames(),
            **self.flips(),
            **self.signatures(),
            **self.documents(),
            **self.claims(),
            **self.texts(),
            **self.contents(),
            **self.blob_sets(),
        }

    def file(self, envelope: Envelope, blobs: Blobs | None = None) -> bytes:
        blobs = self.blobs if blobs is None else blobs
        return head(envelope, len(blobs)) + b"".join(blob_header(key, len(data)) + data for key, data in blobs)

    def signed(
        self,
        payload: bytes,
        blobs: Blobs | None = None,
        key: PrivateKey = TEST_KEY,
        payload_type: str = PAYLOAD_TYPE,
    ) -> bytes:
        return self.file(sign(payload, payload_type, key), blobs)

    def edited(self, edit: Edit, blobs: Blobs | None = None) -> bytes:
        manifest = copy.deepcopy(self.manifest)
        edit(manifest)
        return self.signed(compact(manifest), blobs)

    def replaced(self, where: Callable[[dict[str, Any]], dict[str, Any]], change: Callable[[Array], Array]) -> bytes:
        """One tensor's elements changed, its digest and its blob with them."""
        manifest = copy.deepcopy(self.manifest)
        tensor = where(manifest)
        dtype = {"i32": np.dtype("<i4"), "f32": np.dtype("<f4"), "bf16": np.dtype(ml_dtypes.bfloat16)}[tensor["dtype"]]
        old = bytes.fromhex(tensor["sha256"])
        array = np.frombuffer(dict(self.blobs)[old], dtype).reshape(tensor["shape"]).copy()
        data = change(array).astype(dtype).tobytes()
        new = hashlib.sha256(data).digest()
        tensor["sha256"] = new.hex()
        for subject in manifest["subject"]:
            if subject["digest"]["sha256"] == old.hex():
                subject["digest"]["sha256"] = new.hex()
        return self.signed(compact(manifest), [(new, data) if key == old else (key, blob) for key, blob in self.blobs])

    def around(self, envelope: bytes, *, beginning: bytes | None = None) -> bytes:
        """The base with other bytes for its envelope, or for all before it."""
        encoded = msgspec.msgpack.encode(self.envelope)
        start = self.base.index(encoded)
        before = self.base[:start] if beginning is None else beginning
        return before + envelope + self.base[start + len(encoded) :]

    def frames(self) -> dict[str, Hostile]:
        pack = msgspec.msgpack.encode
        prefix = self.base[: self.base.index(pack(self.envelope))]
        payload, (signature,) = self.envelope.payload, self.envelope.signatures
        fields = {
            "payloadType": pack(PAYLOAD_TYPE),
            "payload": pack(payload),
            "signatures": pack(self.envelope.signatures),
        }

        def envelope(*names: str, **changed: bytes) -> bytes:
            return bytes([0x80 | len(names)]) + b"".join(pack(n) + (fields | changed)[n] for n in names)

        three = ("payloadType", "payload", "signatures")
        blob_map = b"".join(blob_header(key, len(data)) + data for key, data in self.blobs)
        until_blobs = self.base[: -len(blob_map) - 1]
        return {
            "empty-file": Hostile(b"", "EvidenceError", "is empty"),
            "not-messagepack": Hostile(b"PK\x03\x04 this is a zip", "EvidenceError", "does not begin"),
            "other-format": Hostile(
                self.base.replace(b"fpforensics-bundle/1", b"fpforensics-bundle/9"),
                "EvidenceError",
                "fpforensics-bundle/9",
            ),
            "truncated-in-blobs": Hostile(self.base[:-20], "EvidenceError", "cut short"),
            "trailing-bytes": Hostile(self.base + b"\0\0\0", "EvidenceError", "3 bytes after its end"),
            "duplicate-key-frame": Hostile(
                prefix[: -len(pack("envelope"))] + self.base[1:], "EvidenceError", "found the key 'format'"
            ),
            "duplicate-key-envelope": Hostile(
                self.around(envelope("payloadType", "payload", "payload", "signatures")),
                "EvidenceError",
                "map of 4",
            ),
            "nested-frame": Hostile(prefix + b"\x91" * 10_000, "EvidenceError", "does not begin the envelope"),
            "nested-frame-from-start": Hostile(b"\x81" * 10_000, "EvidenceError", "a map of 1"),
            "padded-length": Hostile(
                self.around(envelope(*three, payload=b"\xc6" + struct.pack(">I", len(payload)) + payload)),
                "EvidenceError",
                "with padding",
            ),
            "huge-bin32-payload": Hostile(
                self.around(envelope(*three, payload=b"\xc6\xff\xff\xff\xff")),
                "EvidenceError",
                "4294967295 bytes",
            ),
            "huge-str32-payload-type": Hostile(
                self.around(envelope(*three, payloadType=b"\xdb\xff\xff\xff\xff")),
                "EvidenceError",
                "4294967295 bytes",
            ),
            "huge-map32-blobs": Hostile(
                until_blobs + b"\xdf\xff\xff\xff\xff" + blob_map, "EvidenceError", "claims 4294967295 blobs"
            ),
            "huge-bin32-blob": Hostile(
                until_blobs + b"\x8f" + b"\xc4\x20" + self.blobs[0][0] + b"\xc6\xff\xff\xff\xff" + b"x" * 64,
                "EvidenceError",
                "cut short",
            ),
            "no-signature": Hostile(
                self.around(envelope(*three, signatures=pack(()))), "EvidenceError", "0 signatures"
            ),
            "two-signatures": Hostile(
                self.around(envelope(*three, signatures=pack((signature, signature)))),
                "EvidenceError",
                "2 signatures",
            ),
        }

    def flips(self) -> dict[str, Hostile]:
        (signature,) = self.envelope.signatures

        def flip(offset: int, bit: int = 1) -> bytes:
            return self.base[:offset] + bytes([self.base[offset] ^ bit]) + self.base[offset + 1 :]

        return {
            "flipped-frame": Hostile(flip(3), "EvidenceError", "the key 'format'"),
            "flipped-manifest": Hostile(flip(self.base.index(b"synthetic")), "SignatureError", "does not fit"),
            "flipped-signature": Hostile(flip(self.base.index(signature.sig)), "SignatureError", "does not fit"),
            # not signed, a hint only: whatever it says, the key that signed is found and reported
            "flipped-keyid": Hostile(flip(self.base.index(signature.keyid.encode())), "", ""),
            "flipped-blob-digest": Hostile(
                flip(self.base.rindex(self.blobs[3][0])), "EvidenceError", "not in its manifest"
            ),
            "flipped-blob": Hostile(flip(self.base.index(self.blobs[3][1])), "EvidenceError", "digest differs"),
        }

    def signatures(self) -> dict[str, Hostile]:
        payload = self.envelope.payload
        forged = sign(payload, PAYLOAD_TYPE, OTHER_KEY)
        (theirs,) = forged.signatures
        (ours,) = self.envelope.signatures
        claimed = msgspec.structs.replace(theirs, keyid=ours.keyid)
        short = msgspec.structs.replace(ours, sig=ours.sig[:63])
        return {
            "unknown-key": Hostile(self.file(forged), "SignatureError", theirs.keyid),
            "forged-keyid": Hostile(
                self.file(msgspec.structs.replace(forged, signatures=(claimed,))),
                "SignatureError",
                "does not fit",
            ),
            "short-signature": Hostile(
                self.file(msgspec.structs.replace(self.envelope, signatures=(short,))),
                "EvidenceError",
                "63 bytes",
            ),
            "wrong-payload-type": Hostile(
                self.signed(payload, payload_type="text/plain"), "EvidenceError", "payload type 'text/plain'"
            ),
        }

    def documents(self) -> dict[str, Hostile]:
        text = self.envelope.payload

        def other(old: bytes, new: bytes) -> bytes:
            assert text.count(old) >= 1, old
            return self.signed(text.replace(old, new, 1))

        def verdict(manifest: dict[str, Any]) -> None:
            manifest["predicateType"] = VERDICT_TYPE

        return {
            "manifest-not-json": Hostile(self.signed(b"not json"), "EvidenceError", "is not JSON"),
            "nested-manifest": Hostile(self.signed(b"[" * 10_000), "EvidenceError", "nests deeper"),
            "duplicate-key-manifest": Hostile(
                other(b'"nonce":', b'"nonce":"00","nonce":'), "EvidenceError", "the key 'nonce' twice"
            ),
            "nan-in-manifest": Hostile(
                other(b'"wall_mean":2.0', b'"wall_mean":NaN'), "EvidenceError", "the number NaN"
            ),
            "infinity-in-manifest": Hostile(
                other(b'"wall_mean":2.0', b'"wall_mean":-Infinity'), "EvidenceError", "the number -Infinity"
            ),
            "overflow-in-manifest": Hostile(other(b'"wall_mean":2.0', b'"wall_mean":1e999'), "EvidenceError", "1e999"),
            "unknown-field": Hostile(
                other(b'"nonce":', b'"extra":1,"nonce":'), "EvidenceError", "unknown field `extra`"
            ),
            "verdict-as-evidence": Hostile(self.edited(verdict), "EvidenceError", VERDICT_TYPE),
        }

    def claims(self) -> dict[str, Hostile]:
        def case(edit: Edit, message: str) -> Hostile:
            return Hostile(self.edited(edit), "EvidenceError", message)

        def shape(where: Callable[[dict[str, Any]], dict[str, Any]], *sizes: int) -> Edit:
            return lambda manifest: where(manifest).update(shape=list(sizes))

        return {
            "no-rows": case(lambda m: m["predicate"].update(rows=[]), "rows: 0"),
            "no-references": case(lambda m: m["predicate"].update(references=[]), "references: 0"),
            "claims-2-40-elements": case(shape(decode("hidden_states/1"), 1 << 20, 1 << 20), "1099511627776 elements"),
            "shapes-disagree": case(shape(decode("logprobs"), 2, 3), "(3, 3) is expected"),
            "shape-without-bytes": case(
                lambda m: decode("hidden_states/1")(m).update(dtype="f32"), "its shape needs 96"
            ),
            "digest-is-a-path": case(
                lambda m: decode("logprobs")(m).update(sha256="../../etc/passwd"), "'../../etc/passwd'"
            ),
            "nonce-not-hex": case(lambda m: m["predicate"].update(nonce="challenge!"), "'challenge!'"),
            "replayed-nonce": Hostile(
                self.edited(lambda m: m["predicate"].update(nonce="ff" * 16)), "NonceError", "ff" * 16
            ),
        }

    def texts(self) -> dict[str, Hostile]:
        def config(field: str, value: str) -> bytes:
            return self.edited(lambda m: first_row(m)["config"].update({field: value}))

        nonsense = "awq; rm -rf ~ " * 14 + "!!!!"
        assert len(nonsense) == 200
        return {
            "nonsense-quantization": Hostile(config("quantization", nonsense), "EvidenceError", "rm -rf"),
            "long-model-name": Hostile(config("model", "m" * 5000), "EvidenceError", "5000 characters"),
            "control-characters": Hostile(config("model", "smol\x07\x00lm"), "EvidenceError", "smol��lm"),
            "ansi-escape": Hostile(
                config("model", "\x1b[2J\x1b[1;32mCONSISTENT"), "EvidenceError", "�[2J�[1;32mCONSISTENT"
            ),
            "right-to-left": Hostile(config("revision", "\u202emain"), "EvidenceError", "�main"),
        }

    def contents(self) -> dict[str, Hostile]:
        def case(where: Callable[[dict[str, Any]], dict[str, Any]], value: float, message: str) -> Hostile:
            return Hostile(self.replaced(where, put(value)), "EvidenceError", message)

        return {
            "prompt-outside-vocabulary": case(prompt_ids, 64, "prompt_ids holds 64"),
            "output-outside-vocabulary": case(output_ids, 1 << 30, "output_ids holds 1073741824"),
            "negative-token": case(output_ids, -1, "output_ids holds -1"),
            "top-id-outside-vocabulary": case(decode("logprob_ids"), 64, "logprob_ids holds 64"),
            "top-ids-repeat": Hostile(
                self.replaced(decode("logprob_ids"), np.zeros_like),
                "EvidenceError",
                "repeats a token id",
            ),
            "nan-logprob": case(decode("logprobs"), float("nan"), "logprobs holds nan"),
            "infinite-hidden-state": case(decode("hidden_states/1"), float("inf"), "hidden_states/1 holds inf"),
            "infinite-logprob": case(decode("chosen_logprobs"), float("-inf"), "chosen_logprobs holds -inf"),
            "positive-logprob": case(decode("logprobs"), 0.5, "logprobs holds 0.5"),
        }

    def blob_sets(self) -> dict[str, Hostile]:
        blobs = self.blobs
        extra = (hashlib.sha256(b"extra").digest(), b"extra")
        by_length = {len(data): number for number, (_, data) in enumerate(blobs)}
        same = next(n for n, (_, data) in enumerate(blobs) if by_length[len(data)] != n)
        other = by_length[len(blobs[same][1])]
        swapped = list(blobs)
        swapped[same], swapped[other] = (blobs[same][0], blobs[other][1]), (blobs[other][0], blobs[same][1])

        def case(changed: Blobs, message: str) -> Hostile:
            return Hostile(self.file(self.envelope, changed), "EvidenceError", message)

        return {
            "missing-blob": case(blobs[:-1], "is missing"),
            "extra-blob": case([*blobs, extra], "not in its manifest"),
            "duplicate-blob": case([*blobs, blobs[0]], "is there twice"),
            "swapped-blobs": case(swapped, "digest differs"),
            "reordered-blobs": case([*blobs[1:], blobs[0]], "another order"),
        }


def compact(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def first_row(manifest: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = manifest["predicate"]["rows"][0]
    return row


def first_trace(manifest: dict[str, Any]) -> dict[str, Any]:
    trace: dict[str, Any] = first_row(manifest)["traces"][0]
    return trace


def prompt_ids(manifest: dict[str, Any]) -> dict[str, Any]:
    tensor: dict[str, Any] = manifest["predicate"]["references"][0]["prompt_ids"]
    return tensor


def output_ids(manifest: dict[str, Any]) -> dict[str, Any]:
    tensor: dict[str, Any] = first_trace(manifest)["output_ids"]
    return tensor


def decode(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda manifest: first_trace(manifest)["decode"][name]


def put(value: float) -> Callable[[Array], Array]:
    """Overwrite the second element."""

    def change(array: Array) -> Array:
        array.reshape(-1)[1] = value
        return array

    return change


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
