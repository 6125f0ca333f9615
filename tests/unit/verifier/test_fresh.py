"""Prompts that a challenge chooses: both sides cut the same ones, another challenge cuts others, and others are refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from fpforensics.common.config import ExecutionConfig
from fpforensics.common.errors import EvidenceError, UsageError
from fpforensics.prover.session import SessionPlan, make_references
from fpforensics.prover.wire import SessionLimits, plan_of, request_of
from fpforensics.verifier.fresh import require_prompts, with_texts


def plan(nonce: str = "0a" * 32, documents: tuple[str, ...] = ("builtin",)) -> SessionPlan:
    config = ExecutionConfig(model="tiny")
    return SessionPlan(configs=(config,), references=5, prompt_tokens=64, nonce=nonce, documents=documents)


def answer(asked: SessionPlan, checkpoint: Path) -> object:
    made = make_references(asked, checkpoint)
    return SimpleNamespace(references=lambda: made)


def test_the_challenge_chooses_where_prompts_begin(tiny_llama: Path) -> None:
    once, again, other = with_texts(plan()), with_texts(plan()), with_texts(plan("0b" * 32))
    assert once.texts == again.texts
    first, second = make_references(once, tiny_llama), make_references(other, tiny_llama)
    assert len(first) == 5
    assert not any(np.array_equal(a.prompt_ids, b.prompt_ids) for a in first for b in second)
    assert with_texts(plan(), fresh=False).texts == ()
    assert plan_of(request_of(once), {"tiny"}, SessionLimits()).texts == once.texts, "a prover takes them"


def test_the_prompts_that_were_asked_for_are_taken_and_others_refused(tiny_llama: Path) -> None:
    asked = with_texts(plan())
    require_prompts(answer(asked, tiny_llama), asked, tiny_llama)  # type: ignore[arg-type]
    with pytest.raises(EvidenceError, match="the prompt of ref_0 is not the one that was asked"):
        require_prompts(answer(plan(), tiny_llama), asked, tiny_llama)  # type: ignore[arg-type]


def test_files_travel_as_texts_and_conversations_do_not(tmp_path: Path) -> None:
    (tmp_path / "a text (1).txt").write_text("words " * 300)
    sent = with_texts(plan(documents=(str(tmp_path / "a text (1).txt"),)))
    assert sent.texts == (("a text _1_.txt", "words " * 300),)
    (tmp_path / "talk.jsonl").write_text('{"messages": [{"role": "user", "content": "hello"}]}\n')
    with pytest.raises(UsageError, match=r"conversation 'talk\.jsonl:1' in a session"):
        with_texts(plan(documents=(str(tmp_path / "talk.jsonl"),)))
