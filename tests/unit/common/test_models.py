"""Names of models: the user's own, the embedded one, folders, Hugging Face ids; and what nonsense is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import SPECIAL_TOKENS, VOCAB_SIZE, make_tiny_model

from fpforensics.common.errors import Error, UsageError
from fpforensics.common.models import (
    context_length,
    load_tokenizer,
    num_layers,
    resolve_model,
    vocab_size,
    weights_digest,
)


def test_embedded(smollm2: Path) -> None:
    checkpoint = resolve_model("smollm2-135m")
    assert checkpoint.name == "smollm2-135m"
    assert checkpoint.path.resolve() == smollm2.resolve()
    assert checkpoint.revision.startswith("gguf-")


def test_folder_and_own_names(tiny_llama: Path, tiny_qwen3: Path) -> None:
    assert resolve_model(str(tiny_llama)).path == tiny_llama.resolve()
    mapped = resolve_model("house-model", models={"house-model": str(tiny_qwen3)})
    assert (mapped.name, mapped.path, mapped.revision) == ("house-model", tiny_qwen3.resolve(), "")
    # the user's own mapping comes first, even for a name that means something else
    assert resolve_model("smollm2-135m", models={"smollm2-135m": str(tiny_llama)}).path == tiny_llama.resolve()


def test_hugging_face_cache(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--example--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / commit).symlink_to(tiny_llama)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for revision in ("", "main", commit):
        checkpoint = resolve_model("example/tiny", revision, allow_download=False)
        assert (checkpoint.name, checkpoint.revision) == ("example/tiny", commit)
        assert weights_digest(checkpoint.path) == weights_digest(tiny_llama)


@pytest.mark.parametrize("allow_download", [True, False])
def test_absent_hugging_face_id(allow_download: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UsageError, match="model example/absent is not on this machine") as caught:
        resolve_model("example/absent", allow_download=allow_download)
    assert ("downloads are off here" in caught.value.hint) is not allow_download


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("smollm2-135n", "did you mean 'smollm2-135m'?"),
        ("hous-model", "did you mean 'house-model'?"),
        ("zzz", "known: house-model, smollm2-135m; or give a folder, or a Hugging Face id"),
        ("smollm2-135n", "'smollm2-135m'? Or give a folder"),
        ("", "empty"),
        ("a" * 2000, "too long"),
        ("a\x00b", "unprintable"),
        ("a" * 300, "unknown model"),
        ("~nobody-of-that-name/x", "unknown model"),
        ("../../etc/passwd", "unknown model"),
        ("https://example.org/model", "unknown model"),
    ],
)
def test_unknown_names(name: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve_model(name, models={"house-model": "/nowhere"}, allow_download=False)
    assert says in caught.value.diagnostics()
    assert len(caught.value.diagnostics()) < 300


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(name=st.text(max_size=40), revision=st.text(max_size=20))
def test_any_name_is_answered(name: str, revision: str) -> None:
    with pytest.raises(Error):
        resolve_model(f"no-such-{name}", revision, allow_download=False)


@pytest.mark.parametrize("revision", ["../../secret", "-x", "a//b", "a b", "/etc/passwd", "x" * 2000])
def test_revisions_that_are_paths_are_refused(revision: str) -> None:
    with pytest.raises(UsageError, match="is no branch, tag or commit"):
        resolve_model("example/tiny", revision, allow_download=False)


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no config\.json"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_qwen3", "tiny_qwen3_moe"])
def test_tiny_checkpoints(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder: Path = request.getfixturevalue(kind)
    again = make_tiny_model(tmp_path / "again", kind.removeprefix("tiny_"))  # type: ignore[arg-type]
    other = make_tiny_model(tmp_path / "other", kind.removeprefix("tiny_"), seed=1)  # type: ignore[arg-type]
    assert weights_digest(again) == weights_digest(folder) != weights_digest(other)
    assert vocab_size(folder) == VOCAB_SIZE == len(load_tokenizer(folder))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(text=st.text(st.characters(codec="utf-8")))
def test_tiny_tokenizer_round_trips(tiny_llama: Path, text: str) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    ids = tokenizer(text + SPECIAL_TOKENS[2], split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids) == text + SPECIAL_TOKENS[2]


def test_vocab_size_of_nested_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"vocab_size": 7}}))
    assert vocab_size(tmp_path) == 7


@pytest.mark.parametrize(
    "content", ["{}", '{"vocab_size": "7"}', '{"vocab_size": true}', '{"vocab_size": 0}', "[]", "{", None]
)
def test_vocab_size_of_bad_config(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UsageError, match=r"config\.json"):
        vocab_size(tmp_path)


@pytest.mark.parametrize(
    ("content", "layers", "context"),
    [
        ({"num_hidden_layers": 30, "max_position_embeddings": 8192}, 30, 8192),
        ({"n_layer": 12, "n_positions": 1024}, 12, 1024),
        ({"text_config": {"num_hidden_layers": 4, "max_position_embeddings": 100}}, 4, 100),
        ({"max_position_embeddings": 100, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, None, 400),
        ({"max_position_embeddings": 100, "rope_parameters": {"rope_type": "default"}}, None, 100),
        ({"max_position_embeddings": 100, "rope_parameters": {"factor": "4"}}, None, 100),
        ({"num_hidden_layers": True, "max_position_embeddings": -1}, None, None),
        ({}, None, None),
    ],
)
def test_depth_and_context_are_read_where_they_are_stated(
    tmp_path: Path, content: dict[str, object], layers: int | None, context: int | None
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert num_layers(tmp_path) == layers
    assert context_length(tmp_path) == context


def test_folder_without_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 7}))
    with pytest.raises(UsageError, match="no usable tokenizer"):
        load_tokenizer(tmp_path)
