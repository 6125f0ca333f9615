"""Where prompts come from: the built-in corpus, text files, PDFs, and JSONL files of conversations."""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from fpforensics.common.cache import local_path
from fpforensics.common.errors import MissingDependencyError, UsageError, did_you_mean, shorten

BUILTIN = "builtin"
SUFFIXES = (".jsonl", ".md", ".pdf", ".txt")
_CORPUS = ("alice_in_wonderland.txt", "as_you_like_it.txt")


class Message(msgspec.Struct, frozen=True):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str


class _Conversation(msgspec.Struct, frozen=True):
    messages: list[Message]


@dataclass(frozen=True)
class Document:
    """A source of references: a text that many are cut from, or one conversation that is taken whole."""

    name: str
    text: str = ""
    messages: tuple[Message, ...] = ()


def read_documents(sources: Sequence[str]) -> list[Document]:
    """The documents behind ``sources``, in order: ``builtin`` (two books) or files.

    ``.txt`` and ``.md`` are UTF-8 and taken as they are; ``.pdf`` gives its extractable text; each line of
    a ``.jsonl`` file is ``{"messages": [{"role": …, "content": …}, …]}`` and becomes a document of its own,
    named ``file:line``. Raises :class:`UsageError` naming the file, and the line where there is one, and
    :class:`MissingDependencyError`.
    """
    documents = [document for source in sources for document in _read(source)]
    if not documents:
        raise UsageError("no documents were given", f"give {BUILTIN!r} or files ({', '.join(SUFFIXES)})")
    return documents


def _read(source: str) -> list[Document]:
    if source == BUILTIN:
        folder = importlib.resources.files("fpforensics.common.corpus")
        return [Document(name, (folder / name).read_text("utf-8")) for name in _CORPUS]
    path = local_path(source)
    if path is None or not path.is_file():
        hint = f"give a file that exists, or {BUILTIN!r}" if "." in source else did_you_mean(source, [BUILTIN])
        raise UsageError(f"no document at {shorten(source, 200)!r}", hint)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(f"document {shorten(source, 200)!r} is of unknown type", f"known: {', '.join(SUFFIXES)}")
    if suffix == ".jsonl":
        return _conversations(path)
    text = _pdf_text(path) if suffix == ".pdf" else _utf8(path)
    if not text.strip():
        what = "holds no extractable text" if suffix == ".pdf" else "is empty"
        raise UsageError(f"document {path} {what}", "give one with text (a scanned PDF needs OCR first)")
    return [Document(path.name, text)]


def _utf8(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"document {path} is not UTF-8 at byte {error.start}", "convert it to UTF-8") from error
    except OSError as error:
        raise UsageError(f"cannot read document {path}: {error.strerror}", "give a readable file") from error


def _conversations(path: Path) -> list[Document]:
    documents: list[Document] = []
    # Only a newline ends a line: JSON strings may hold Unicode's other line separators.
    for number, line in enumerate(_utf8(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            messages = tuple(msgspec.json.decode(line, type=_Conversation).messages)
        except (msgspec.DecodeError, RecursionError) as error:
            raise UsageError(f"{path}, line {number}: {error}", _LINE_SHAPE) from error
        if not messages or messages[-1].role == "assistant":
            what = "has no messages" if not messages else "ends with the assistant's own message"
            raise UsageError(f"{path}, line {number}: the conversation {what}", "end it with the user's message")
        documents.append(Document(f"{path.name}:{number}", messages=messages))
    if not documents:
        raise UsageError(f"document {path} is empty", _LINE_SHAPE)
    return documents


_LINE_SHAPE = 'each line is {"messages": [{"role": "user", "content": "…"}]}'


def _pdf_text(path: Path) -> str:
    try:
        import pypdf
    except ImportError as error:
        raise MissingDependencyError(f"document {path}", "pypdf", "pip install '.[pdf]'") from error
    try:
        pages = [page.extract_text() for page in pypdf.PdfReader(path).pages]
    except Exception as error:  # a malformed PDF fails in too many ways to list
        reason = shorten(f"{type(error).__name__}: {error}", 200)
        raise UsageError(f"cannot read PDF {path}: {reason}", "give a PDF that is whole and not encrypted") from error
    # Fonts with broken tables yield lone surrogates, which no tokenizer takes.
    return "\n".join(pages).encode("utf-8", "replace").decode("utf-8")
