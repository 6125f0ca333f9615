"""Prompts that nobody could know before: a challenge makes a signature fresh, only a prompt makes what was signed fresh.

Excerpts of the built-in corpus begin where the challenge says: of two books there are some ten thousand such places each, at the least, too many
to have computed in advance, and both sides cut the same ones.
"""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import numpy as np

from fpforensics.common.documents import BUILTIN, Document, read_documents
from fpforensics.common.errors import EvidenceError, UsageError, shorten
from fpforensics.common.words import counted
from fpforensics.prover.session import SessionPlan, make_references
from fpforensics.verifier.intake import VerifiedBundle

_LEAST_ROOM = 1 << 14  # places where an excerpt may begin
_CHARACTERS = 8  # of English for each token, at most; what is cut too generously is left over


def with_texts(plan: SessionPlan, *, fresh: bool = True) -> SessionPlan:
    """``plan`` with its documents' texts in it, as a remote prover needs them; ``fresh``: built-in ones are cut at the challenge.

    Raises :class:`UsageError` for documents that are conversations, or that have no text.
    """
    if plan.documents == (BUILTIN,):
        return msgspec.structs.replace(plan, texts=excerpts(plan)) if fresh else plan
    documents = read_documents(plan.documents)
    for document in documents:
        if document.messages:
            raise UsageError(
                f"conversation {shorten(document.name)!r} in a session", "a remote prover takes plain texts"
            )
    return msgspec.structs.replace(plan, texts=tuple((_name(document), document.text) for document in documents))


def excerpts(plan: SessionPlan) -> tuple[tuple[str, str], ...]:
    """One excerpt of each book of the corpus, (name, text) each, long enough for the plan."""
    rng = np.random.default_rng(int(plan.nonce, 16))
    documents = read_documents((BUILTIN,))
    wanted = math.ceil(plan.references / len(documents)) * (plan.prompt_tokens + 1) * _CHARACTERS
    cut = []
    for document in documents:
        room = len(document.text) - wanted
        if room < _LEAST_ROOM:
            raise UsageError(
                f"{counted(plan.references, 'prompt')} of {counted(plan.prompt_tokens, 'token')} from the built-in corpus cannot be fresh",
                "ask for fewer, give longer texts of your own (--prompts), or take the same ones each time (--same-prompts)",
            )
        start = int(rng.integers(0, room + 1))
        cut.append((f"{document.name}.{start}", document.text[start : start + wanted]))
    return tuple(cut)


def require_prompts(bundle: VerifiedBundle, plan: SessionPlan, checkpoint: Path) -> None:
    """Raise :class:`EvidenceError` naming the first prompt that is not the plan's, by the tokenizer in the folder ``checkpoint``."""
    asked = make_references(plan, checkpoint)
    for ours, theirs in zip(asked, bundle.references(), strict=False):
        if not np.array_equal(ours.prompt_ids, theirs.prompt_ids):
            raise EvidenceError(
                f"the bundle does not answer this session: the prompt of {shorten(theirs.id)} is not the one that was asked "
                f"({ours.source})",
                "do not rely on it; run the session again",
            )


def _name(document: Document) -> str:
    """As the protocol allows names to be."""
    kept = "".join(c if c.isascii() and (c.isalnum() or c in " .-_") else "_" for c in Path(document.name).name)
    return kept[:64] or "text"
