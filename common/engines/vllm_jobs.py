"""What the engine and vLLM's workers say to each other: msgpack of structs, in the wire's form of arrays. No torch.

B is the requests of one forward, M the captured positions of one request, K the ids reported at each, D a width.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from fpforensics.common.engines import wire
from fpforensics.common.engines.base import ConcurrentWork
from fpforensics.common.signals import Array, Phase, Sampling

T = TypeVar("T")


class Task(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One request: what is fed, who names its tokens, and which rows are wanted of it.

    ``fed_ids`` (P,) is its prompt as vLLM sees it. ``forced_ids`` (N,) names its tokens, if they are forced; else they are
    sampled, or with ``greedy`` always the most likely. ``positions`` (M,) are absolute, increasing. ``claimed_ids`` (M, K)
    are the ids to report; None reports the top ones.
    """

    key: str
    reference_id: str
    fed_ids: Array
    positions: Array
    forced_ids: Array | None = None
    claimed_ids: Array | None = None
    greedy: bool = False


class Job(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Requests that run together. ``blocks`` are 0-based; ``capture`` False records nothing at all."""

    tasks: list[Task]
    blocks: list[int]
    top_k: int
    full_logits: bool
    sampling: Sampling
    capture: bool = True


class Rows(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What one rank recorded of one request, in the order of its positions; a tensor-parallel rank has its own heads' keys."""

    key: str
    ids: Array | None = None  # (M, K)
    logprobs: Array | None = None  # (M, K)
    chosen: Array | None = None  # (M,)
    logits: Array | None = None  # (M, V)
    hidden: dict[int, Array] = {}  # block -> (M, D)
    keys: dict[int, Array] = {}  # block -> (M, heads of this rank * head_dim)


class Report(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What one rank says of a job. ``failed`` is empty, or why its rows are no evidence.

    ``finite``: every number in ``rows`` is one. ``steps`` are (requests, tokens) of each forward; ``phases`` says whether fed tokens (prefill) and made ones
    (decode) were among them.
    """

    pipeline_rank: int
    tensor_rank: int
    steps: list[tuple[int, int]]
    phases: list[Phase]
    rows: list[Rows]
    finite: bool = True
    failed: str = ""
    hint: str = ""


class WorkerFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What one rank resolved. ``key_heads`` counts a rank's KV heads, ``total_key_heads`` the model's."""

    pipeline_rank: int
    tensor_rank: int
    gpu: str
    architecture: str
    vocab_size: int
    num_layers: int
    hidden_size: int
    head_dim: int
    key_heads: int
    total_key_heads: int
    attention: list[str]
    quantization: list[str]
    experts: list[str]
    products: list[str]
    numerics: dict[str, str] = {}


def pack(message: Job | Report | WorkerFacts | ConcurrentWork) -> bytes:
    """The message as bytes: raw tensors arrive as lists over the workers' own calls."""
    return _encoder.encode(message)


def unpack(data: bytes, kind: type[T]) -> T:
    """The inverse of :func:`pack`."""
    return msgspec.msgpack.decode(data, type=kind, dec_hook=wire.from_blob)


_encoder = msgspec.msgpack.Encoder(enc_hook=wire.to_blob)
