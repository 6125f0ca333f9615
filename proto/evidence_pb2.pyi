from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Description(_message.Message):
    __slots__ = ("public_key_pem", "keyid", "tool_version", "models", "environment")
    PUBLIC_KEY_PEM_FIELD_NUMBER: _ClassVar[int]
    KEYID_FIELD_NUMBER: _ClassVar[int]
    TOOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    ENVIRONMENT_FIELD_NUMBER: _ClassVar[int]
    public_key_pem: str
    keyid: str
    tool_version: str
    models: _containers.RepeatedScalarFieldContainer[str]
    environment: Environment
    def __init__(self, public_key_pem: _Optional[str] = ..., keyid: _Optional[str] = ..., tool_version: _Optional[str] = ..., models: _Optional[_Iterable[str]] = ..., environment: _Optional[_Union[Environment, _Mapping]] = ...) -> None: ...

class Environment(_message.Message):
    __slots__ = ("hostname", "platform", "python", "cpu", "cpu_count", "cpu_flags", "gpus", "driver", "packages", "variables")
    class PackagesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class VariablesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    HOSTNAME_FIELD_NUMBER: _ClassVar[int]
    PLATFORM_FIELD_NUMBER: _ClassVar[int]
    PYTHON_FIELD_NUMBER: _ClassVar[int]
    CPU_FIELD_NUMBER: _ClassVar[int]
    CPU_COUNT_FIELD_NUMBER: _ClassVar[int]
    CPU_FLAGS_FIELD_NUMBER: _ClassVar[int]
    GPUS_FIELD_NUMBER: _ClassVar[int]
    DRIVER_FIELD_NUMBER: _ClassVar[int]
    PACKAGES_FIELD_NUMBER: _ClassVar[int]
    VARIABLES_FIELD_NUMBER: _ClassVar[int]
    hostname: str
    platform: str
    python: str
    cpu: str
    cpu_count: int
    cpu_flags: _containers.RepeatedScalarFieldContainer[str]
    gpus: _containers.RepeatedScalarFieldContainer[str]
    driver: str
    packages: _containers.ScalarMap[str, str]
    variables: _containers.ScalarMap[str, str]
    def __init__(self, hostname: _Optional[str] = ..., platform: _Optional[str] = ..., python: _Optional[str] = ..., cpu: _Optional[str] = ..., cpu_count: _Optional[int] = ..., cpu_flags: _Optional[_Iterable[str]] = ..., gpus: _Optional[_Iterable[str]] = ..., driver: _Optional[str] = ..., packages: _Optional[_Mapping[str, str]] = ..., variables: _Optional[_Mapping[str, str]] = ...) -> None: ...

class SessionRequest(_message.Message):
    __slots__ = ("nonce", "configs", "texts", "references", "prompt_tokens", "instruction", "sampling", "capture", "repetitions", "allow_nondeterminism")
    NONCE_FIELD_NUMBER: _ClassVar[int]
    CONFIGS_FIELD_NUMBER: _ClassVar[int]
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    REFERENCES_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    INSTRUCTION_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    CAPTURE_FIELD_NUMBER: _ClassVar[int]
    REPETITIONS_FIELD_NUMBER: _ClassVar[int]
    ALLOW_NONDETERMINISM_FIELD_NUMBER: _ClassVar[int]
    nonce: bytes
    configs: _containers.RepeatedScalarFieldContainer[str]
    texts: _containers.RepeatedCompositeFieldContainer[Document]
    references: int
    prompt_tokens: int
    instruction: str
    sampling: Sampling
    capture: Capture
    repetitions: int
    allow_nondeterminism: bool
    def __init__(self, nonce: _Optional[bytes] = ..., configs: _Optional[_Iterable[str]] = ..., texts: _Optional[_Iterable[_Union[Document, _Mapping]]] = ..., references: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., instruction: _Optional[str] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., capture: _Optional[_Union[Capture, _Mapping]] = ..., repetitions: _Optional[int] = ..., allow_nondeterminism: bool = ...) -> None: ...

class Document(_message.Message):
    __slots__ = ("name", "text")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    name: str
    text: str
    def __init__(self, name: _Optional[str] = ..., text: _Optional[str] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("max_new_tokens", "temperature", "top_p", "seed")
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    def __init__(self, max_new_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., seed: _Optional[int] = ...) -> None: ...

class Capture(_message.Message):
    __slots__ = ("layers", "prefill_positions", "decode_positions", "top_k", "full_logits", "layers_named")
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    DECODE_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    FULL_LOGITS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_NAMED_FIELD_NUMBER: _ClassVar[int]
    layers: _containers.RepeatedScalarFieldContainer[str]
    prefill_positions: int
    decode_positions: int
    top_k: int
    full_logits: bool
    layers_named: bool
    def __init__(self, layers: _Optional[_Iterable[str]] = ..., prefill_positions: _Optional[int] = ..., decode_positions: _Optional[int] = ..., top_k: _Optional[int] = ..., full_logits: bool = ..., layers_named: bool = ...) -> None: ...

class SessionEvent(_message.Message):
    __slots__ = ("progress", "chunk", "end")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    progress: Progress
    chunk: Chunk
    end: BundleEnd
    def __init__(self, progress: _Optional[_Union[Progress, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ..., end: _Optional[_Union[BundleEnd, _Mapping]] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("stage", "done", "total")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    stage: str
    done: int
    total: int
    def __init__(self, stage: _Optional[str] = ..., done: _Optional[int] = ..., total: _Optional[int] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("data", "running_sha256")
    DATA_FIELD_NUMBER: _ClassVar[int]
    RUNNING_SHA256_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    running_sha256: bytes
    def __init__(self, data: _Optional[bytes] = ..., running_sha256: _Optional[bytes] = ...) -> None: ...

class BundleEnd(_message.Message):
    __slots__ = ("size", "sha256", "bundle_digest")
    SIZE_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    size: int
    sha256: bytes
    bundle_digest: str
    def __init__(self, size: _Optional[int] = ..., sha256: _Optional[bytes] = ..., bundle_digest: _Optional[str] = ...) -> None: ...
