"""From documents to references: token ids of a request around exactly N tokens of source text.

A prompt is ``prefix + slice + suffix``: the chat template with the instruction, tokenized once without the
text, around N consecutive tokens of the document, which is tokenized once as a whole. Ids are only ever cut and
joined; nothing is decoded and tokenized again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from fpforensics.common.documents import Document, Message, read_documents
from fpforensics.common.errors import UsageError, shorten
from fpforensics.common.signals import Array, Reference
from fpforensics.common.words import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["DEFAULT_INSTRUCTION", "Document", "Message", "build_references", "read_documents"]

DEFAULT_INSTRUCTION = "Provide a summary of the following text:"
# Stands for the text while the template is rendered; private-use characters that no template contains.
_MARKER = "\ue000fpforensics\ue001"


@dataclass(frozen=True)
class _Frame:
    """The ids before and after the source text: chat template, instruction, template's end."""

    prefix: Array  # int32
    suffix: Array  # int32

    def around(self, slice_ids: Array) -> Array:
        return np.concatenate([self.prefix, slice_ids, self.suffix]).astype(np.int32)


def build_references(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int,
    prompt_tokens: int,
    instruction: str = DEFAULT_INSTRUCTION,
) -> list[Reference]:
    """``count`` distinct references ``ref_0`` …, taken from the documents in turn.

    A text gives consecutive slices that don't overlap, of exactly ``prompt_tokens`` tokens each, with
    ``instruction`` before them; special tokens spelled out in it are plain text. A conversation gives one
    reference: itself, in the model's chat template, whole, however long, without ``instruction``.
    ``prompt_ids`` are int32.
    Raises :class:`UsageError` where the documents hold fewer references, saying how many fit.
    """
    if count < 1 or prompt_tokens < 1:
        raise UsageError(f"cannot build {count} references of {prompt_tokens} tokens", "both are at least 1")
    frame = _frame(tokenizer, instruction) if any(not document.messages for document in documents) else None
    offered = _in_turn([_references_of(document, tokenizer, frame, prompt_tokens) for document in documents])
    chosen = list(islice(_distinct(offered), count))
    if len(chosen) < count:
        raise UsageError(
            f"asked for {counted(count, 'reference')} of {counted(prompt_tokens, 'token')}, but only {len(chosen)} fit in "
            f"{', '.join(shorten(document.name) for document in documents[:4])}{' …' * (len(documents) > 4)}",
            "give more or longer documents, or ask for fewer references or tokens",
        )
    return [Reference(f"ref_{i}", ids, source) for i, (ids, source) in enumerate(chosen)]


def _references_of(
    document: Document, tokenizer: PreTrainedTokenizerBase, frame: _Frame | None, size: int
) -> Iterator[tuple[Array, str]]:
    if document.messages:
        yield _conversation_ids(document, tokenizer), document.name
        return
    assert frame is not None
    ids = _plain_ids(tokenizer, document.text)
    for start in range(0, len(ids) - size + 1, size):
        yield frame.around(ids[start : start + size]), f"{document.name}[{start}:{start + size}]"


def _in_turn(sources: Sequence[Iterator[tuple[Array, str]]]) -> Iterator[tuple[Array, str]]:
    waiting = list(sources)
    while waiting:
        still: list[Iterator[tuple[Array, str]]] = []
        for source in waiting:
            for item in islice(source, 1):
                yield item
                still.append(source)
        waiting = still


def _distinct(offered: Iterator[tuple[Array, str]]) -> Iterator[tuple[Array, str]]:
    seen: set[bytes] = set()
    for ids, source in offered:
        key = ids.tobytes()
        if key not in seen:
            seen.add(key)
            yield ids, source


def _frame(tokenizer: PreTrainedTokenizerBase, instruction: str) -> _Frame:
    request = f"{instruction}\n\n" if instruction else ""
    if not tokenizer.chat_template:
        ids = list(tokenizer(request, verbose=False)["input_ids"])
        # Some tokenizers close what they encode; the text goes on here.
        while ids and ids[-1] == tokenizer.eos_token_id:
            ids.pop()
        return _Frame(np.asarray(ids, dtype=np.int32), np.empty(0, dtype=np.int32))
    rendered = _render(tokenizer, [{"role": "user", "content": request + _MARKER}], "the instruction")
    if rendered.count(_MARKER) != 1:
        times = rendered.count(_MARKER)
        raise UsageError(f"the model's chat template repeats or drops the user's text ({times} times)", _OTHER_MODEL)
    before, _, after = rendered.partition(_MARKER)
    return _Frame(_template_ids(tokenizer, before), _template_ids(tokenizer, after))


def _conversation_ids(document: Document, tokenizer: PreTrainedTokenizerBase) -> Array:
    if not tokenizer.chat_template:
        raise UsageError(f"{document.name} is a conversation, and this model has no chat template", "give text files")
    messages = [{"role": message.role, "content": message.content} for message in document.messages]
    return _template_ids(tokenizer, _render(tokenizer, messages, document.name))


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], what: str) -> str:
    from jinja2.exceptions import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except (TemplateError, ValueError, TypeError) as error:
        reason = shorten(str(error), 200)
        raise UsageError(f"the model's chat template refuses {what}: {reason}", _OTHER_MODEL) from error


_OTHER_MODEL = "give other messages, or a model with another chat template"


def _template_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> Array:
    """Template text: special tokens in it are meant, and it brings its own beginning-of-text."""
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=False, verbose=False)["input_ids"]
    return np.asarray(ids, dtype=np.int32)


def _plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> Array:
    """Source text: nothing in it is special."""
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    return np.asarray(ids, dtype=np.int32)
