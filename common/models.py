"""From a model's name to a checkpoint in a local folder, and what can be read of it without torch.

A name is the user's own (mapped to a folder or a Hugging Face id), the embedded ``smollm2-135m``, a folder, or
a Hugging Face id. Only safetensors, JSON and tokenizer files are ever fetched: nothing pickled, no code.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from fpforensics.common import embedded
from fpforensics.common.cache import local_path
from fpforensics.common.errors import MissingDependencyError, UsageError, did_you_mean, shorten
from fpforensics.common.weights import weights_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Checkpoint",
    "context_length",
    "download_bytes",
    "load_tokenizer",
    "num_layers",
    "resolve_model",
    "vocab_size",
    "weights_digest",
]

INSTALL_HF = "pip install '.[hf]'"
MAX_NAME_LENGTH = 1024
_MAX_CONFIG_BYTES = 1 << 24
_MOST_STRETCHED = 1 << 10
_ASK_SECONDS = 10.0
ANOTHER = "name another checkpoint: model=NAME and --model-path NAME=/path/to/checkpoint"
IMPORTING = threading.Lock()  # transformers imports by need: two threads that are first find half of it
_FETCHED = ["*.safetensors", "*.json", "tokenizer.model", "*.tiktoken", "merges.txt", "vocab.txt", "*.jinja"]
_HF_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_HF_REVISION = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)*", re.ASCII)


@dataclass(frozen=True)
class Checkpoint:
    """A model's files. ``revision`` is the commit for one from Hugging Face, empty for a plain folder."""

    name: str
    path: Path
    revision: str


def resolve_model(
    name: str,
    revision: str = "",
    models: Mapping[str, str] | None = None,
    *,
    allow_download: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Checkpoint:
    """The checkpoint that ``name`` stands for.

    ``models`` maps the user's names to folders or Hugging Face ids and comes first. ``revision`` counts for
    Hugging Face ids only. ``progress`` hears of (tensors done, tensors in all) when the embedded model is
    converted. Raises :class:`UsageError` for a name that is none of these or cannot be had, and
    :class:`MissingDependencyError`.
    """
    if not name or len(name) > MAX_NAME_LENGTH or not name.isprintable():
        raise UsageError(f"model name {shorten(name)!r} is empty, too long or unprintable", "give a folder or an id")
    own = models or {}
    target = own.get(name, name)
    if target == embedded.SMOLLM2:
        return Checkpoint(name, embedded.embedded_checkpoint(progress), embedded.SMOLLM2_REVISION)
    folder = local_path(target)
    if folder is not None and folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UsageError(f"folder {target} holds no config.json", "give the folder of a checkpoint")
        return Checkpoint(name, folder.resolve(), "")
    if not _HF_ID.fullmatch(target):
        near = did_you_mean(target, {embedded.SMOLLM2, *own})
        joined = f"{near} Or" if near.endswith("?") else f"{near}; or"
        hint = f"{joined} give a folder, or a Hugging Face id 'organization/name'"
        what = (
            f"model {shorten(name)!r} is {shorten(target)!r}" if name in own else f"unknown model {shorten(target)!r}"
        )
        raise UsageError(f"{what}: no such folder, and not a Hugging Face id", hint)
    return _from_hub(name, target, revision, allow_download)


def download_bytes(name: str, revision: str = "", models: Mapping[str, str] | None = None) -> int | None:
    """How many bytes :func:`resolve_model` would fetch from Hugging Face for ``name``; None where nobody says."""
    target = (models or {}).get(name, name)
    if not _HF_ID.fullmatch(target):
        return None
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import filter_repo_objects

        said = HfApi().model_info(target, revision=revision or None, files_metadata=True, timeout=_ASK_SECONDS)
    except Exception:  # whatever keeps it from answering, by whichever HTTP library: then it is not known
        return None
    wanted = filter_repo_objects(said.siblings or [], allow_patterns=_FETCHED, key=lambda each: each.rfilename)
    return sum(each.size or 0 for each in wanted)


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a checkpoint's folder, from its files alone: no network, no code.

    Raises :class:`UsageError` where there is none that works, and :class:`MissingDependencyError`.
    """
    try:
        with IMPORTING:
            from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingDependencyError("a tokenizer", "transformers", INSTALL_HF) from error
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = shorten(str(error).partition("\n")[0], 200)
        raise UsageError(f"no usable tokenizer in {path}: {reason}", "give a folder with tokenizer.json") from error
    return tokenizer


def stored_quantization(path: Path) -> dict[str, Any]:
    """What the checkpoint in folder ``path`` says of how it is quantized, by its ``config.json``; empty where it is not. Or :class:`UsageError`."""
    declared = read_config(path).get("quantization_config") or {}
    if not isinstance(declared, dict):
        file = path / "config.json"
        raise UsageError(f"{file}: quantization_config is {shorten(str(declared))!r}, not an object", ANOTHER)
    return declared


def vocab_size(path: Path) -> int:
    """How many token ids the model in folder ``path`` knows, by its ``config.json``; or :class:`UsageError`."""
    config = read_config(path)
    inner = config.get("text_config")
    size = config.get("vocab_size", inner.get("vocab_size") if isinstance(inner, dict) else None)
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise UsageError(f"{path / 'config.json'} gives no vocab_size", "give the folder of a language model")
    return size


def num_layers(path: Path) -> int | None:
    """How many blocks the model in folder ``path`` has, by its ``config.json``; None where it does not say."""
    return _stated(read_config(path), ("num_hidden_layers", "n_layer", "num_layers", "n_layers"))


def has_experts(path: Path) -> bool:
    """Whether the model in folder ``path`` is a mixture of experts, by its ``config.json``."""
    return (
        _stated(read_config(path), ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"))
        is not None
    )


def narrow_experts(path: Path, ranks: int) -> bool:
    """Whether a rank's share of an expert in folder ``path`` is no wider than one group of its quantized weights, by its ``config.json``; so too where that does not say."""
    config = read_config(path)
    declared = stored_quantization(path)
    group = declared.get("group_size", declared.get("q_group_size"))
    width = _stated(config, ("moe_intermediate_size", "intermediate_size"))
    return not isinstance(group, int) or width is None or (group > 0 and width // ranks <= group)


def context_length(path: Path) -> int | None:
    """How many tokens the model in folder ``path`` takes, by its ``config.json``; None where it does not say.

    Stretched rotary embeddings count with their factor: configs state the length before or after it.
    """
    config = read_config(path)
    stated = _stated(config, ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"))
    if stated is None:
        return None
    inner = config.get("text_config")
    longest = stated
    for holder in (config, inner if isinstance(inner, dict) else {}):
        for name in ("rope_scaling", "rope_parameters"):
            scaling = holder.get(name)
            factor = scaling.get("factor") if isinstance(scaling, dict) else None
            if isinstance(factor, int | float) and 1 <= factor <= _MOST_STRETCHED:
                longest = max(longest, int(stated * factor))
    return longest


def _stated(config: dict[str, Any], names: tuple[str, ...]) -> int | None:
    inner = config.get("text_config")
    for holder in (config, inner if isinstance(inner, dict) else {}):
        for name in names:
            value = holder.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def read_config(path: Path) -> dict[str, Any]:
    """A checkpoint's ``config.json``. Raises :class:`UsageError` where missing or malformed."""
    file = path / "config.json"
    try:
        if file.stat().st_size > _MAX_CONFIG_BYTES:
            raise UsageError(f"{file} has more than {_MAX_CONFIG_BYTES} bytes", "give the folder of a checkpoint")
        return msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError) as error:
        raise UsageError(f"cannot read {file}: {error}", "give the folder of a checkpoint") from error


def _from_hub(name: str, target: str, revision: str, allow_download: bool) -> Checkpoint:
    if revision and (not _HF_REVISION.fullmatch(revision) or len(revision) > MAX_NAME_LENGTH):
        raise UsageError(f"revision {shorten(revision)!r} is no branch, tag or commit", "give the commit's hash")
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError as error:
        raise MissingDependencyError(f"model {target}", "huggingface_hub", INSTALL_HF) from error
    what = f"model {target}" + (f" at revision {revision}" if revision else "")
    try:
        path = Path(
            snapshot_download(
                target,
                revision=revision or None,
                allow_patterns=_FETCHED,
                local_files_only=not allow_download,
            )
        )
    except errors.GatedRepoError as error:
        raise UsageError(f"{what} asks for its licence to be accepted", "accept it on its page, then log in") from error
    except errors.RevisionNotFoundError as error:
        raise UsageError(f"{what} does not exist", "give a branch, tag or commit that does") from error
    except errors.RepositoryNotFoundError as error:
        raise UsageError(f"{what} does not exist on Hugging Face, or is private", "log in, or give a folder") from error
    except errors.LocalEntryNotFoundError as error:
        way_out = "fetch it first, or give a folder" if allow_download else "fetch it first; downloads are off here"
        raise UsageError(f"{what} is not on this machine and could not be fetched", way_out) from error
    except (OSError, ValueError, errors.EntryNotFoundError) as error:
        raise UsageError(f"{what} could not be fetched: {shorten(str(error), 200)}", "give a folder") from error
    if not (path / "config.json").is_file():
        raise UsageError(f"{what} holds no config.json", "give a model with safetensors weights")
    return Checkpoint(name, path, path.name)
