"""A verdict as a signed statement: an in-toto Statement about one bundle, in a DSSE envelope.

To believe a verdict we must:
 0. bound its size                     1. parse the envelope only
 2. check a trusted key's signature    3. parse the signed bytes, strictly
 4. check statement and predicate type 5. check that subject and result name the same bundle
Whether the result is the one that was asked for is the caller's question (see
``fpforensics.verifier.auditor``).
"""

from __future__ import annotations

import re
import secrets
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version

import msgspec

from fpforensics.common import envelope as dsse
from fpforensics.common.config import parse_claim
from fpforensics.common.envelope import Envelope
from fpforensics.common.errors import Error, EvidenceError, LimitError, shorten
from fpforensics.common.evidence import PAYLOAD_TYPE, STATEMENT_TYPE, VERDICT_TYPE, Evidence, Subject, TraceEntry
from fpforensics.common.keys import Keyring, PrivateKey, PublicKey
from fpforensics.common.strict import Limits, decode_json
from fpforensics.common.words import counted
from fpforensics.verifier.check import CheckPlan, CheckResult

MAX_PAYLOAD_BYTES = 5 << 20
MAX_ENVELOPE_BYTES = 8 << 20  # base64 makes three bytes four
_WAY_OUT = "check one row at a time (--row), or fewer references or configs"
# What JSON takes for a distance, and for a pair of configs: measured, on the low side.
_NUMBER_BYTES, _PAIR_BYTES = 18, 310
_DEFAULT_MEMBERS = 8  # of a lineup that nobody chose: how many can run at least
_LIMITS = Limits(manifest_bytes=MAX_ENVELOPE_BYTES, string=16 * 1024)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class VerdictPredicate(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a verifier states. ``challenged``: the bundle answered this verifier's own fresh challenge, in time.

    ``sequence`` counts one store's verdicts from 1 without gaps, so that a withheld one is noticed; 0 is a verdict that
    is in no store.
    """

    verdict_id: str
    sequence: int
    issued_at: str
    tool_version: str
    challenged: bool
    result: CheckResult


class VerdictStatement(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An in-toto v1 Statement; its one subject is the bundle."""

    type_: str = msgspec.field(name="_type")
    subject: tuple[Subject, ...]
    predicate_type: str = msgspec.field(name="predicateType")
    predicate: VerdictPredicate


@dataclass(frozen=True)
class VerifiedVerdict:
    """A statement, the trusted key that signed it, and the exact bytes of its envelope (DSSE, JSON)."""

    statement: VerdictStatement
    signer: PublicKey
    envelope: bytes

    @property
    def predicate(self) -> VerdictPredicate:
        """What the verifier states."""
        return self.statement.predicate


def new_verdict_id() -> str:
    """A name that no other verdict has."""
    return secrets.token_hex(16)


def require_signable(evidence: Evidence, plan: CheckPlan) -> None:
    """Raise :class:`LimitError` for a check whose verdict would be too large to sign: before the replays, not after them.

    Only distances are counted, so it passes what may fit, and :func:`sign_verdict` has the last word.
    """
    size = distances_bytes(evidence, plan)
    if size > MAX_PAYLOAD_BYTES:
        raise LimitError(
            f"{counted(len(evidence.rows), 'row')}, {counted(len(evidence.references), 'reference')} and this lineup make a verdict of about "
            f"{size} bytes, at most {MAX_PAYLOAD_BYTES} are signed",
            _WAY_OUT,
        )


def distances_bytes(evidence: Evidence, plan: CheckPlan) -> int:
    """About how many bytes the distances of such a check take in its verdict, on the low side."""
    rows = [row for row in evidence.rows if plan.row in ("", row.config_id)]
    if plan.claim and not plan.row:
        claim = parse_claim(plan.claim)
        rows = [row for row in rows if claim.holds_for(row.config)] or rows
    if not rows or not rows[0].traces:
        return 0
    members = max(len(rows), len(set(plan.lineup)) if plan.lineup else _DEFAULT_MEMBERS)
    pairs = len(rows) * (members - len(rows)) + len(rows) * (len(rows) - 1) // 2
    distances = len(rows) * members * len(evidence.references)
    return _matrices(rows[0].traces[0]) * (distances * _NUMBER_BYTES + pairs * _PAIR_BYTES)


def _matrices(trace: TraceEntry) -> int:
    """How many matrices a check makes of such traces: logprobs, each layer of each other signal, and their mean, by phase."""
    count = 0
    for tensors in (trace.prefill, trace.decode):
        if tensors["positions"].shape[0]:
            layers = Counter(name.partition("/")[0] for name in tensors if "/" in name)
            count += 1 + sum(number + 1 for number in layers.values())
    return count


def sign_verdict(
    result: CheckResult, key: PrivateKey, challenged: bool = False, *, sequence: int = 0, verdict_id: str = ""
) -> Envelope:
    """``result`` as a signed statement, with a new id unless one is given.

    Raises :class:`LimitError` for a result that is too large, :class:`Error` for one that could not be read back.
    """
    statement = VerdictStatement(
        type_=STATEMENT_TYPE,
        subject=(Subject(name="bundle", digest={"sha256": result.bundle_digest.removeprefix("sha256:")}),),
        predicate_type=VERDICT_TYPE,
        predicate=VerdictPredicate(
            verdict_id=verdict_id or new_verdict_id(),
            sequence=sequence,
            issued_at=datetime.now(UTC).isoformat(timespec="seconds"),
            tool_version=version("fpforensics"),
            challenged=challenged,
            result=result,
        ),
    )
    payload = msgspec.json.encode(statement)
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise LimitError(f"a verdict of {len(payload)} bytes, at most {MAX_PAYLOAD_BYTES} are signed", _WAY_OUT)
    # NaN would become null on the way: never sign what says something else when it is read.
    if _parse(payload) != statement:
        raise Error("the result changes when it is written and read", "it holds NaN, infinity or a foreign type")
    return dsse.sign(payload, PAYLOAD_TYPE, key)


def verify_verdict(envelope: Envelope, keyring: Keyring) -> VerdictStatement:
    """The statement that a key in ``keyring`` signed.

    Raises :class:`~fpforensics.common.errors.SignatureError` if none did, :class:`EvidenceError` if it is no verdict.
    """
    return _verified(envelope, keyring)[0]


def open_verdict(data: bytes, keyring: Keyring) -> VerifiedVerdict:
    """Like :func:`verify_verdict`, from an envelope's JSON; also says who signed."""
    if len(data) > MAX_ENVELOPE_BYTES:
        raise EvidenceError(f"a verdict of {len(data)} bytes", f"at most {MAX_ENVELOPE_BYTES} are read")
    statement, signer = _verified(dsse.from_json(data, _LIMITS), keyring)
    return VerifiedVerdict(statement, signer, data)


def _verified(envelope: Envelope, keyring: Keyring) -> tuple[VerdictStatement, PublicKey]:
    payload, signer = dsse.verify(envelope, keyring, PAYLOAD_TYPE)
    return _parse(payload), signer


def _parse(payload: bytes) -> VerdictStatement:
    kind = decode_json(payload, _Kind, "statement", _LIMITS)
    for name, found, expected in (
        ("statement type", kind.type_, STATEMENT_TYPE),
        ("predicate type", kind.predicate_type, VERDICT_TYPE),
    ):
        if found != expected:
            raise EvidenceError(f"{name} {shorten(found)!r} where {expected!r} is expected", "is this a verdict?")
    statement = decode_json(payload, VerdictStatement, "verdict", _LIMITS)
    digests = [subject.digest for subject in statement.subject]
    about = statement.predicate.result.bundle_digest
    if not _DIGEST.fullmatch(about) or digests != [{"sha256": about.removeprefix("sha256:")}]:
        raise EvidenceError(
            f"a verdict whose subject is not the bundle of its result ({shorten(about, 64)!r})",
            "do not rely on it; tell the verifier's operator",
        )
    return statement


class _Kind(msgspec.Struct, frozen=True):
    """Enough of a statement to say what it is."""

    type_: str = msgspec.field(name="_type")
    predicate_type: str = msgspec.field(name="predicateType")
