"""A verifier that lies to auditors is caught."""

from __future__ import annotations

import msgspec
import pytest
from rpc_world import (
    PROVER_KEY,
    STRANGER_KEY,
)
from verifier_world import (
    Tampering,
    shown,
)

from fpforensics.common import envelope as dsse
from fpforensics.common.errors import (
    EvidenceError,
    NotFoundError,
    SignatureError,
    UsageError,
)
from fpforensics.proto import audit_pb2 as pb
from fpforensics.verifier.auditor import AuditorClient


def _edited() -> bytes:
    """A genuine envelope whose verdict was turned round."""
    envelope = dsse.from_json(shown().envelope)
    payload = envelope.payload.replace(b'"CONSISTENT"', b'"INCONSISTENT"')
    return dsse.to_json(msgspec.structs.replace(envelope, payload=payload))


TAMPERED: dict[str, pb.Verdict] = {
    "signed by a stranger": shown(key=STRANGER_KEY),
    "signed by the prover": shown(key=PROVER_KEY),
    "an edited payload": shown(envelope=_edited()),
    "another outcome": shown(outcome="INCONSISTENT"),
    "another bundle": shown(bundle_digest=f"sha256:{'6' * 64}"),
    "another id": shown(verdict_id="two"),
    "another sequence": shown(sequence=1, **{"envelope": shown(sequence=2).envelope}),
}


@pytest.mark.parametrize("lie", TAMPERED.values(), ids=TAMPERED)
def test_a_tampering_verifier_is_caught(tampering: tuple[Tampering, AuditorClient], lie: pb.Verdict) -> None:
    servicer, auditor = tampering
    servicer.shown, servicer.more = (shown(),), False
    assert auditor.get("one") == next(iter(auditor.list())) == next(auditor.watch())  # the control
    servicer.shown = (lie,)
    for look in (lambda: auditor.get("one"), lambda: list(auditor.list()), lambda: list(auditor.watch())):
        with pytest.raises(SignatureError):
            look()


def test_a_follower_believes_no_more_than_a_watcher(tampering: tuple[Tampering, AuditorClient]) -> None:
    servicer, auditor = tampering
    servicer.shown = (pb.Verdict(), shown(1, name="one"), pb.Verdict(), shown(2, name="two"), shown(4, name="four"))
    following = auditor.follow()
    assert [next(following).predicate.verdict_id for _ in range(2)] == ["one", "two"]
    with pytest.raises(SignatureError, match="shows verdict number 4 after number 2"):
        next(following)


def test_the_beginning_of_an_id_is_enough_if_only_one_verdict_has_it(
    tampering: tuple[Tampering, AuditorClient],
) -> None:
    servicer, auditor = tampering
    names = ("4f6c2a" + "0" * 26, "4f6c2b" + "0" * 26, "ab" * 16)
    servicer.shown = tuple(shown(number, name=name) for number, name in enumerate(names, start=1))
    servicer.more = False
    for name in ("4f6c2a", "4F6C2A", "4f6c2a…", names[0][:31]):
        assert auditor.find(name).predicate.verdict_id == names[0]
    assert auditor.find(names[0]).predicate.verdict_id == names[0]  # whole ids are asked for directly
    with pytest.raises(UsageError, match="too short"):
        auditor.find("4f6c2")
    with pytest.raises(NotFoundError, match="no verdict whose id begins with '00000000'"):
        auditor.find("00000000")
    servicer.shown = tuple(shown(number, name=f"4f6c2a{number}" + "0" * 25) for number in (1, 2, 3, 4))
    with pytest.raises(UsageError, match="4 verdicts have ids that begin with '4f6c2a'") as caught:
        auditor.find("4f6c2a")
    assert "4f6c2a1" in caught.value.hint


def test_a_verifier_that_answers_with_another_verdict_is_caught(
    tampering: tuple[Tampering, AuditorClient],
) -> None:
    servicer, auditor = tampering
    servicer.shown = (shown(name="two"),)
    with pytest.raises(SignatureError, match="when asked for one"):
        auditor.get("one")


@pytest.mark.parametrize("numbers", [(2,), (1, 3), (1, 1), (2, 1)])
def test_a_verifier_that_withholds_or_reorders_is_caught(
    tampering: tuple[Tampering, AuditorClient], numbers: tuple[int, ...]
) -> None:
    servicer, auditor = tampering
    servicer.shown, servicer.more = tuple(shown(number, name=f"v{number}") for number in numbers), False
    for look in (auditor.list, auditor.watch):
        with pytest.raises(SignatureError, match="shows verdict number"):
            list(look())


def test_a_verifier_that_promises_more_for_ever_is_caught(tampering: tuple[Tampering, AuditorClient]) -> None:
    servicer, auditor = tampering
    servicer.shown, servicer.more = (), True
    with pytest.raises(SignatureError, match="withholds"):
        list(auditor.list())


@pytest.mark.parametrize("envelope", [b"", b"{}", b"[" * 100_000, b'{"payloadType":"x"}', b"\xff" * 100])
def test_garbage_is_no_verdict(tampering: tuple[Tampering, AuditorClient], envelope: bytes) -> None:
    servicer, auditor = tampering
    servicer.shown, servicer.more = (shown(envelope=envelope),), False
    with pytest.raises(EvidenceError):
        auditor.get("one")
