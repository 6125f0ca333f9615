from fpforensics.proto import evidence_pb2 as _evidence_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ReplayMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REPLAY_MODE_UNSPECIFIED: _ClassVar[ReplayMode]
    REPLAY_MODE_PREFILL: _ClassVar[ReplayMode]
    REPLAY_MODE_DECODE: _ClassVar[ReplayMode]
REPLAY_MODE_UNSPECIFIED: ReplayMode
REPLAY_MODE_PREFILL: ReplayMode
REPLAY_MODE_DECODE: ReplayMode

class NonceRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Nonce(_message.Message):
    __slots__ = ("nonce", "lifetime_seconds")
    NONCE_FIELD_NUMBER: _ClassVar[int]
    LIFETIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    nonce: bytes
    lifetime_seconds: int
    def __init__(self, nonce: _Optional[bytes] = ..., lifetime_seconds: _Optional[int] = ...) -> None: ...

class SubmitRequest(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: SubmitHeader
    chunk: _evidence_pb2.Chunk
    def __init__(self, header: _Optional[_Union[SubmitHeader, _Mapping]] = ..., chunk: _Optional[_Union[_evidence_pb2.Chunk, _Mapping]] = ...) -> None: ...

class SubmitHeader(_message.Message):
    __slots__ = ("size", "sha256")
    SIZE_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    size: int
    sha256: bytes
    def __init__(self, size: _Optional[int] = ..., sha256: _Optional[bytes] = ...) -> None: ...

class SubmitReply(_message.Message):
    __slots__ = ("bundle_digest", "signer", "challenged")
    BUNDLE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIGNER_FIELD_NUMBER: _ClassVar[int]
    CHALLENGED_FIELD_NUMBER: _ClassVar[int]
    bundle_digest: str
    signer: str
    challenged: bool
    def __init__(self, bundle_digest: _Optional[str] = ..., signer: _Optional[str] = ..., challenged: bool = ...) -> None: ...

class CheckRequest(_message.Message):
    __slots__ = ("bundle_digest", "claim", "lineup", "mode", "row")
    BUNDLE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CLAIM_FIELD_NUMBER: _ClassVar[int]
    LINEUP_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    ROW_FIELD_NUMBER: _ClassVar[int]
    bundle_digest: str
    claim: str
    lineup: _containers.RepeatedScalarFieldContainer[str]
    mode: ReplayMode
    row: str
    def __init__(self, bundle_digest: _Optional[str] = ..., claim: _Optional[str] = ..., lineup: _Optional[_Iterable[str]] = ..., mode: _Optional[_Union[ReplayMode, str]] = ..., row: _Optional[str] = ...) -> None: ...

class CheckEvent(_message.Message):
    __slots__ = ("progress", "verdict")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    progress: _evidence_pb2.Progress
    verdict: Verdict
    def __init__(self, progress: _Optional[_Union[_evidence_pb2.Progress, _Mapping]] = ..., verdict: _Optional[_Union[Verdict, _Mapping]] = ...) -> None: ...

class Verdict(_message.Message):
    __slots__ = ("sequence", "verdict_id", "bundle_digest", "outcome", "envelope")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    VERDICT_ID_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    ENVELOPE_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    verdict_id: str
    bundle_digest: str
    outcome: str
    envelope: bytes
    def __init__(self, sequence: _Optional[int] = ..., verdict_id: _Optional[str] = ..., bundle_digest: _Optional[str] = ..., outcome: _Optional[str] = ..., envelope: _Optional[bytes] = ...) -> None: ...

class GetVerdictRequest(_message.Message):
    __slots__ = ("verdict_id",)
    VERDICT_ID_FIELD_NUMBER: _ClassVar[int]
    verdict_id: str
    def __init__(self, verdict_id: _Optional[str] = ...) -> None: ...

class ListVerdictsRequest(_message.Message):
    __slots__ = ("after", "limit")
    AFTER_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    after: int
    limit: int
    def __init__(self, after: _Optional[int] = ..., limit: _Optional[int] = ...) -> None: ...

class ListVerdictsReply(_message.Message):
    __slots__ = ("verdicts", "more")
    VERDICTS_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    verdicts: _containers.RepeatedCompositeFieldContainer[Verdict]
    more: bool
    def __init__(self, verdicts: _Optional[_Iterable[_Union[Verdict, _Mapping]]] = ..., more: bool = ...) -> None: ...

class WatchVerdictsRequest(_message.Message):
    __slots__ = ("after",)
    AFTER_FIELD_NUMBER: _ClassVar[int]
    after: int
    def __init__(self, after: _Optional[int] = ...) -> None: ...
