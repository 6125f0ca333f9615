"""A calibration of one's own: what honest bundles measured, in a statement that whoever measured it signs.

To believe one we must:
 0. bound its size                     1. parse the envelope only
 2. check the payload's type           3. check a trusted key's signature over the exact bytes
 4. parse them, strictly               5. check statement and predicate type, format and pools
That the bundles were honest is the signer's word; so is what hardware they came from, which is the provers'.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from fpforensics.common import envelope as dsse
from fpforensics.common.bundle import payload_digest
from fpforensics.common.envelope import Envelope
from fpforensics.common.errors import EvidenceError, LimitError, UsageError, shorten
from fpforensics.common.evidence import STATEMENT_TYPE, Subject
from fpforensics.common.keys import Keyring, PrivateKey, PublicKey
from fpforensics.common.signals import PHASES, Phase
from fpforensics.common.strict import Limits, convert, parse_json
from fpforensics.verifier.distance import Cell
from fpforensics.verifier.profile import Pool, pool_for, require_format, require_pools
from fpforensics.verifier.scope import Scope, differences

PAYLOAD_TYPE = "application/vnd.fpforensics.calibration+json"
CALIBRATION_TYPE = "https://fpforensics.dev/calibration/v1"
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
MAX_PAYLOAD_BYTES = 24 << 20
MAX_FILE_BYTES = 32 << 20  # base64 makes three bytes four
MAX_NAME = 100
MIXTURE = 0.1
"""How far the share of generated positions may be from that which was measured."""
_MAX_ENTRIES = 256
_LIMITS = Limits(manifest_bytes=MAX_FILE_BYTES)
_WAY_OUT = "make one: verifier calibrate BUNDLE … --sign KEY -o FILE"


class CellNoise(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Honest distances in one cell, for people: the decision rests on the pools. ``floor`` is the mean noise floor (L2),
    ``quantiles`` the distance of ``prompts`` prompts in each one's own floors, at :data:`QUANTILES`."""

    cell: Cell
    prompts: int
    floor: float
    quantiles: tuple[float, ...]


class Measured(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One scope's calibration. ``decode_share`` is how much of the positions were generated ones, which do not scatter like
    the prompt's; ``prompt_tokens`` are the shortest and the longest prompt's. ``rivals`` are the configs that margins were measured over, ``nearest`` is how many of the
    ``prompts`` lay nearer to their own config than to every rival. ``cells`` are by phase, signal and layer. ``phases`` holds pools of one phase's positions alone, where every prompt has both."""

    scope: Scope
    prompts: int
    decode_share: float
    prompt_tokens: tuple[int, int]
    rivals: tuple[str, ...]
    nearest: int
    pools: tuple[Pool, ...]
    phases: dict[Phase, tuple[Pool, ...]]
    cells: tuple[CellNoise, ...]

    def lacks(self, scope: Scope, decode_share: float) -> Iterator[str]:
        """What keeps this from speaking for a check, each in words; nothing if it does."""
        yield from differences(self.scope, scope)
        if abs(decode_share - self.decode_share) > MIXTURE:
            yield f"{decode_share:.0%} of the positions are generated ones where {self.decode_share:.0%} were measured"

    def pool(self, positions: int) -> Pool | None:
        """See :func:`fpforensics.verifier.profile.pool_for`."""
        return pool_for(self.pools, positions)

    def part(self, name: str, positions: int) -> Pool | None:
        """The pool for a part of some evidence: one phase alone, or one prompt."""
        return pool_for(self.phases.get(name, ()), positions) if name in PHASES else self.pool(positions)


class Calibrated(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The predicate."""

    format: int
    name: str
    created_at: str
    tool_version: str
    measured: tuple[Measured, ...]


class CalibrationStatement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An in-toto v1 Statement; its subjects are the honest bundles."""

    type_: str = msgspec.field(name="_type")
    subject: tuple[Subject, ...]
    predicate_type: str = msgspec.field(name="predicateType")
    predicate: Calibrated


@dataclass(frozen=True)
class MeasuredProfile:
    """A calibration that a trusted key signed; ``digest`` is ``sha256:<hex>`` of the signed bytes. See :func:`open_profile`."""

    content: Calibrated
    bundles: tuple[str, ...]
    signer: PublicKey
    digest: str

    def find(self, scope: Scope, decode_share: float) -> Measured | None:
        """What was measured in exactly this scope, on about this mixture of positions."""
        return next((each for each in self.content.measured if not any(each.lacks(scope, decode_share))), None)

    def missing(self, scope: Scope, decode_share: float) -> tuple[str, ...]:
        """How a check differs from the nearest that was measured, each difference in words."""
        return min((tuple(each.lacks(scope, decode_share)) for each in self.content.measured), key=len)


def sign_profile(content: Calibrated, bundles: Sequence[str], key: PrivateKey) -> Envelope:
    """``content`` as a signed statement about ``bundles`` (``sha256:<hex>``).

    Raises :class:`LimitError` for one that is too large, :class:`EvidenceError` for one that could not be read back.
    """
    statement = CalibrationStatement(
        type_=STATEMENT_TYPE,
        subject=tuple(
            Subject(name="bundle", digest={"sha256": digest.removeprefix("sha256:")}) for digest in sorted(set(bundles))
        ),
        predicate_type=CALIBRATION_TYPE,
        predicate=content,
    )
    payload = msgspec.json.encode(statement)
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise LimitError(
            f"a profile of {len(payload)} bytes, at most {MAX_PAYLOAD_BYTES} are signed",
            "calibrate fewer configs in one file, or fewer prompts",
        )
    _parse(payload)
    return dsse.sign(payload, PAYLOAD_TYPE, key)


def open_profile(data: bytes, keyring: Keyring) -> MeasuredProfile:
    """Read what :func:`sign_profile` made.

    Raises :class:`~fpforensics.common.errors.SignatureError` if no key in ``keyring`` signed it, :class:`EvidenceError` if it
    is no profile.
    """
    if len(data) > MAX_FILE_BYTES:
        raise EvidenceError(f"a profile of {len(data)} bytes", f"at most {MAX_FILE_BYTES} are read")
    payload, signer = dsse.verify(dsse.from_json(data, _LIMITS), keyring, PAYLOAD_TYPE)
    statement = _parse(payload)
    bundles = tuple(subject.digest.get("sha256", "") for subject in statement.subject)
    return MeasuredProfile(statement.predicate, bundles, signer, payload_digest(payload))


def load_profile(path: Path, keyring: Keyring, *, option: str = "--profile-key") -> MeasuredProfile:
    """:func:`open_profile` of a file; errors name it, and the command line's ``option`` for keys."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise UsageError(f"no profile {path}", _WAY_OUT) from None
    except OSError as error:
        raise UsageError(f"cannot read profile {path}: {error.strerror}", _WAY_OUT) from None
    try:
        return open_profile(data, keyring)
    except EvidenceError as error:
        hint = error.hint.replace("--key FILE.pub", f"{option} FILE.pub")
        raise type(error)(f"profile {path}: {error.message}", hint) from None


def _parse(payload: bytes) -> CalibrationStatement:
    found = parse_json(payload, "the profile", _LIMITS)
    kind = convert(found, _Kind, "statement")
    for name, stated, expected in (
        ("statement type", kind.type_, STATEMENT_TYPE),
        ("predicate type", kind.predicate_type, CALIBRATION_TYPE),
    ):
        if stated != expected:
            raise EvidenceError(f"{name} {shorten(stated)!r} where {expected!r} is expected", _WAY_OUT)
    require_format(convert(found, _Versioned, "the profile").predicate.format, "the profile")
    statement = convert(found, CalibrationStatement, "the profile")
    for problem in _problems(statement.predicate):
        raise EvidenceError(f"the profile {problem}", "calibrate again")
    return statement


def _problems(content: Calibrated) -> Iterator[str]:
    if not 1 <= len(content.measured) <= _MAX_ENTRIES:
        yield f"holds {len(content.measured)} calibrations, 1 to {_MAX_ENTRIES} are read"
    if not 1 <= len(content.name) <= MAX_NAME:
        yield f"has a name of {len(content.name)} characters, 1 to {MAX_NAME} are read"
    for index, each in enumerate(content.measured):
        for pools in (each.pools, *each.phases.values()):
            require_pools(pools, "the profile", margins=bool(each.rivals))
        if any(pool.prompts > each.prompts for pool in each.pools):
            yield f"counts more prompts in a pool of {shorten(each.scope.label)} than it measured"
        if any(len(cell.quantiles) != len(QUANTILES) for cell in each.cells):
            yield f"has cells of {shorten(each.scope.label)} without {len(QUANTILES)} quantiles"
        if any(not any(differences(other.scope, each.scope)) for other in content.measured[:index]):
            yield f"holds two calibrations of {shorten(each.scope.label)} in one scope"


class _Kind(msgspec.Struct, frozen=True):
    """Enough of a statement to say what it is."""

    type_: str = msgspec.field(name="_type")
    predicate_type: str = msgspec.field(name="predicateType")


class _Format(msgspec.Struct, frozen=True):
    format: int


class _Versioned(msgspec.Struct, frozen=True):
    """Enough of it to say which version wrote it."""

    predicate: _Format
