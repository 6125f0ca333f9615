"""``prover run``: what cannot work is said in one line and at once, before prompts are built or weights are read."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fpforensics.common.config import parse_config
from fpforensics.common.engines.base import Host
from fpforensics.common.errors import UsageError
from fpforensics.common.keys import generate
from fpforensics.common.signals import CapturePlan, Sampling
from fpforensics.prover import session
from fpforensics.prover.cli import main
from fpforensics.prover.session import SessionPlan, check_fit, check_plan, make_references

Run = Callable[..., tuple[object, str]]


@pytest.fixture
def prover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs ``prover run`` with a key and an output in the test's folder; returns exit code and what stderr said."""
    generate(tmp_path / "prover.key")
    monkeypatch.chdir(tmp_path)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("work was begun")

    monkeypatch.setattr(session, "load_tokenizer", refuse)
    monkeypatch.setattr(session, "start_engine", refuse)

    def run(*arguments: str) -> tuple[object, str]:
        given = ["--key", "prover.key", "-o", "bundle.msgpack", *arguments]
        monkeypatch.setattr(sys, "argv", ["prover", "run", *given])
        with pytest.raises(SystemExit) as left:
            main()
        assert not (tmp_path / "bundle.msgpack").exists()
        return left.value.code, capsys.readouterr().err

    return run


NEVER = [
    ("--seed -1", "seed -1 (from 0 to"),
    ("--top-k 100000000", "top-k 100000000 (from 1 to"),
    ("--top-k 0", "top-k 0 (from 1 to"),
    ("--new-tokens 1000000000", "new tokens 1000000000 (from 1 to"),
    ("--new-tokens 0", "new tokens 0 (from 1 to"),
    ("--prompt-tokens 0", "prompt tokens 0"),
    ("--references 100000", "references 100000 (from 1 to 4096)"),
    ("--repetitions 0", "repetitions 0"),
    ("--prefill-positions -1", "prefill positions -1"),
    ("--decode-positions -1", "decode positions -1"),
    ("--temperature nan", "temperature nan"),
    ("--temperature -1", "temperature -1.0"),
    ("--top-p 0", "top_p=0.0"),
    ("--layers 1,0", "layer '0'"),
    ("--layers 9999", "layer '9999' (a block number from 1 to 4096"),
    ("--layers 1,1", "name one twice"),
    ("--config tp=2", "tp=2 needs backend=vllm"),
    ("--config tp=2", "or emulate_tp=2"),
    ("--config backend=vllm,dtype=fp64", "backend vllm does not compute in fp64"),
    ("--config speculative=true", "config key 'speculative' is refused: a draft model"),
    ("--config quant=bnb-int8,matmul=fp32-rounded", "does not combine with quant=bnb-int8"),
    ("--config attn=sdpa --config attn=sdpa", "names the same config twice"),
    ("--python /nosuch", "--python /nosuch: no such interpreter"),
    ("-o /nosuch/x.msgpack", "cannot write /nosuch/x.msgpack: there is no folder /nosuch"),
    ("-o .", "cannot write .: it is a folder"),
    ("--key prover.key.pub", "prover.key.pub is a public key, the private one is needed (give prover.key)"),
    ("--model nosuch", "unknown model 'nosuch'"),
]


@pytest.mark.parametrize(("arguments", "said"), NEVER)
def test_nonsense_is_a_usage_error_at_once(prover: Run, arguments: str, said: str) -> None:
    code, error = prover(*arguments.split())
    assert code == 2
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "package", "said"),
    [
        ("attn=flash_attention_2", "flash_attn", "run: pip install '.[flash-attn]'"),
    ],
)
def test_a_missing_package_is_named_at_once(prover: Run, arguments: str, package: str, said: str) -> None:
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed here")
    code, error = prover("--config", arguments)
    assert code == 5
    assert said in error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--layers 1,99", "layer 99: the model has 4 blocks (name blocks from 1 to 4, or 'last')"),
        ("--top-k 513", "top-k 513: the model's vocabulary has 512 tokens"),
        ("--new-tokens 4000", "256 tokens in the prompt and 4000 new tokens are more than the 4096"),
    ],
)
def test_what_the_model_cannot_do_is_known_from_its_config(
    prover: Run, tiny_llama: Path, arguments: str, said: str
) -> None:
    code, error = prover("--model", "tiny", "--model-path", f"tiny={tiny_llama}", *arguments.split())
    assert code == 2
    assert said in error


def test_no_torch_is_imported_to_say_so(tmp_path: Path) -> None:
    generate(tmp_path / "prover.key")
    cases = [
        "--config tp=2",
        "--seed -1",
        "--python /nosuch",
        "-o /nosuch/x",
        "--config attn=flash_attention_2,dtype=fp32",
    ]
    code = f"""
import sys
from fpforensics.prover.cli import main
for case in {cases!r}:
    sys.argv = ["prover", "run", "--key", "prover.key", "-o", "bundle.msgpack", *case.split()]
    try:
        main()
    except SystemExit as left:
        print(left.code)
print(sorted({{"torch", "transformers"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split("\n")[:-1] == [*["2"] * len(cases), "[]"], done.stderr


def test_default_layers_go_as_deep_as_the_model(tiny_llama: Path) -> None:
    plan = SessionPlan(configs=(parse_config("model=tiny"),))
    assert "12" in plan.capture.layers
    check_fit(plan, tiny_llama)
    with pytest.raises(UsageError, match="layer 12: the model has 4 blocks"):
        check_fit(msgspec.structs.replace(plan, layers_named=True), tiny_llama)
    with pytest.raises(UsageError, match="layer 5: the model has 4 blocks"):
        check_fit(msgspec.structs.replace(plan, capture=CapturePlan(layers=("1", "5"))), tiny_llama)
    check_fit(msgspec.structs.replace(plan, capture=CapturePlan(layers=("4", "last")), layers_named=True), tiny_llama)


def test_a_model_that_does_not_say_is_not_second_guessed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 64}))
    check_fit(SessionPlan(configs=(parse_config(""),), layers_named=True), tmp_path)


def test_prompts_leave_room_for_the_new_tokens(tiny_llama: Path) -> None:
    """The frame around a text counts too, and so do conversations, which are as long as they are."""
    plan = SessionPlan(
        configs=(parse_config("model=tiny"),),
        references=1,
        prompt_tokens=4000,
        sampling=Sampling(max_new_tokens=96),
    )
    check_plan(plan)
    check_fit(plan, tiny_llama)
    with pytest.raises(UsageError, match=r"tokens in the prompt of ref_0 and 96 new tokens are more than the 4096"):
        make_references(plan, tiny_llama)


def test_a_checkpoint_stored_otherwise_is_refused(tmp_path: Path) -> None:
    stored = {"vocab_size": 64, "quantization_config": {"quant_method": "awq"}}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(UsageError, match="is stored quantized as awq, the config says quant=none"):
        check_fit(SessionPlan(configs=(parse_config(""),)), tmp_path)


@pytest.mark.parametrize("host", [Host(device="cpu"), Host(device="auto")])
def test_a_session_refuses_before_it_looks_for_the_model(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the model was looked for")

    monkeypatch.setattr(session, "resolve_model", refuse)
    generate(tmp_path / "prover.key")
    plan = SessionPlan(configs=(parse_config("ep=2"),))
    with pytest.raises(UsageError, match="ep=2 needs backend=vllm"):
        session.run_session(plan, host, session.PrivateKey.fresh(), tmp_path / "x.msgpack")
