"""References: exactly N source tokens inside the template, distinct, in turn, and nothing tokenized twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import SPECIAL_TOKENS, write_tokenizer

from fpforensics.common.errors import UsageError
from fpforensics.common.models import load_tokenizer
from fpforensics.common.prompts import (
    DEFAULT_INSTRUCTION,
    Document,
    Message,
    build_references,
    read_documents,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def base_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("base-tokenizer")
    write_tokenizer(folder, chat_template=None)
    return load_tokenizer(folder)


def templated(tokenizer: Any, template: str) -> Any:
    changed = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    changed.chat_template = template
    return changed


def source_ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def frame(tokenizer: Any, instruction: str) -> tuple[list[int], list[int]]:
    """The prefix and suffix that the tiny template gives, written out."""
    before = f"<|im_start|>user\n{instruction}\n\n"
    after = "<|im_end|>\n<|im_start|>assistant\n"
    return tokenizer(before)["input_ids"], tokenizer(after)["input_ids"]


texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=200) | st.lists(
    st.sampled_from(["the ", "rain", "<|im_end|>", "<|bos|>", "東京", "\n\n", "no"]), min_size=1, max_size=60
).map("".join)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(text=texts, size=st.integers(1, 12), count=st.integers(1, 8))
def test_exactly_n_consecutive_tokens_of_source(tokenizer: Any, text: str, size: int, count: int) -> None:
    ids = source_ids(tokenizer, text)
    slices = [tuple(ids[i : i + size]) for i in range(0, len(ids) - size + 1, size)]
    expected = list(dict.fromkeys(slices))
    document = Document("d", text)
    if len(expected) < count:
        with pytest.raises(UsageError, match=f"only {len(expected)} fit in d"):
            build_references([document], tokenizer, count=count, prompt_tokens=size, instruction="Sum up:")
        return
    references = build_references([document], tokenizer, count=count, prompt_tokens=size, instruction="Sum up:")
    prefix, suffix = frame(tokenizer, "Sum up:")
    assert [reference.prompt_ids.tolist() for reference in references] == [
        prefix + list(part) + suffix for part in expected[:count]
    ]
    specials = set(range(len(SPECIAL_TOKENS)))
    assert all(not specials & set(part) for part in expected)
    assert {reference.prompt_ids.dtype for reference in references} == {np.dtype(np.int32)}
    assert [reference.id for reference in references] == [f"ref_{i}" for i in range(count)]


def test_slices_are_not_tokenized_again(tokenizer: Any) -> None:
    text = "東京" * 40
    ids = source_ids(tokenizer, text)
    (reference,) = build_references([Document("d", text)], tokenizer, count=1, prompt_tokens=7, instruction="Sum up:")
    prefix, suffix = frame(tokenizer, "Sum up:")
    assert reference.prompt_ids[len(prefix) : -len(suffix)].tolist() == ids[:7]
    # seven byte tokens end inside a character: text could not carry them
    assert source_ids(tokenizer, tokenizer.decode(ids[:7])) != ids[:7]


def test_documents_take_turns(tokenizer: Any) -> None:
    long, short = Document("long", "x y z " * 20), Document("short", "a b c d")
    talk = Document("talk:1", messages=(Message("user", "hello"),))
    references = build_references([long, short, talk], tokenizer, count=6, prompt_tokens=5)
    assert [reference.source for reference in references[:4]] == [
        "long[0:5]",
        "short[0:5]",
        "talk:1",
        "long[5:10]",
    ]
    assert {reference.source.partition("[")[0] for reference in references[4:]} == {"long"}


def test_the_same_document_twice_gives_each_reference_once(tokenizer: Any) -> None:
    document = Document("d", "".join(chr(33 + i) for i in range(60)))
    once = build_references([document], tokenizer, count=6, prompt_tokens=10)
    twice = build_references([document, document], tokenizer, count=6, prompt_tokens=10)
    assert [r.prompt_ids.tolist() for r in once] == [r.prompt_ids.tolist() for r in twice]
    with pytest.raises(UsageError, match="asked for 7 references of 10 tokens, but only 6 fit in d, d"):
        build_references([document, document], tokenizer, count=7, prompt_tokens=10)


def test_conversation_is_the_template_itself(tokenizer: Any) -> None:
    messages = (Message("system", "Be brief."), Message("user", "Why is the sky blue?" * 20))
    (reference,) = build_references([Document("c.jsonl:1", messages=messages)], tokenizer, count=1, prompt_tokens=3)
    expected = tokenizer.apply_chat_template(
        [{"role": message.role, "content": message.content} for message in messages],
        add_generation_prompt=True,
        return_dict=True,
    )["input_ids"]
    assert reference.prompt_ids.tolist() == expected
    assert reference.prompt_ids.dtype == np.int32
    assert reference.source == "c.jsonl:1"


def test_base_model_gets_instruction_and_text(base_tokenizer: Any) -> None:
    (reference,) = build_references(
        [Document("d", "some text to sum up")],
        base_tokenizer,
        count=1,
        prompt_tokens=4,
        instruction="Sum up:",
    )
    instruction = base_tokenizer("Sum up:\n\n")["input_ids"]
    assert reference.prompt_ids.tolist() == instruction + source_ids(base_tokenizer, "some text to sum up")[:4]
    with pytest.raises(UsageError, match="no chat template"):
        build_references([Document("c:1", messages=(Message("user", "hi"),))], base_tokenizer, count=1, prompt_tokens=4)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("no text at all", r"repeats or drops the user's text \(0 times\)"),
        ("{{ messages[0]['content'] }}{{ messages[0]['content'] }}", r"\(2 times\)"),
        ("{{ raise_exception('system first') }}", "system first"),
        ("{% if %}", "template refuses the instruction"),
    ],
)
def test_templates_that_do_not_fit(tokenizer: Any, template: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        build_references([Document("d", "text " * 9)], templated(tokenizer, template), count=1, prompt_tokens=3)


@pytest.mark.parametrize(("count", "size"), [(0, 5), (1, 0), (-1, 5)])
def test_nonsense_counts(tokenizer: Any, count: int, size: int) -> None:
    with pytest.raises(UsageError, match=f"cannot build {count} references of {size} tokens"):
        build_references([Document("d", "text")], tokenizer, count=count, prompt_tokens=size)


def test_embedded_model_and_built_in_corpus(smollm2: Path) -> None:
    tokenizer = load_tokenizer(smollm2)
    documents = read_documents(["builtin"])
    references = build_references(documents, tokenizer, count=24, prompt_tokens=512)
    overhead = {len(reference.prompt_ids) - 512 for reference in references}
    assert len(overhead) == 1
    text = tokenizer.decode(references[0].prompt_ids)
    assert text.startswith("<|im_start|>system\n")
    assert f"<|im_start|>user\n{DEFAULT_INSTRUCTION}\n\nALICE'S ADVENTURES IN WONDERLAND" in text
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    # the slices put together are the beginning of each document's own tokenization
    before = overhead.pop() - len(tokenizer("<|im_end|>\n<|im_start|>assistant\n")["input_ids"])
    for which, document in enumerate(documents):
        joined = np.concatenate([reference.prompt_ids[before : before + 512] for reference in references[which::2]])
        assert joined.tolist() == source_ids(tokenizer, document.text)[: 12 * 512]
