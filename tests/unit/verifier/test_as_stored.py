"""A claim that no checkpoint here can bear is refused before anything is loaded, as what it is: the claim."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from fake_engine import fake_checkpoint, fake_engine
from safetensors.numpy import save_file

from fpforensics.common.config import parse_config
from fpforensics.common.engines.base import Host
from fpforensics.common.engines.preflight import check_checkpoint
from fpforensics.common.errors import UsageError
from fpforensics.common.keys import Keyring, PrivateKey
from fpforensics.common.signals import CapturePlan, Sampling
from fpforensics.prover.session import SessionPlan, run_session
from fpforensics.verifier.check import CheckPlan, check_bundle
from fpforensics.verifier.intake import open_bundle


def never(*_: object) -> NoReturn:
    raise AssertionError("a worker was started")


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (CheckPlan(claim="quant=awq"), "claim quant=awq: the checkpoint of tiny is stored unquantized"),
        (CheckPlan(claim="quant=awq", using="matmul=fp32-rounded"), "claim quant=awq: the checkpoint of tiny"),
        (CheckPlan(lineup=("quant=gptq",)), "quant=gptq: the checkpoint of tiny is stored unquantized"),
        (
            CheckPlan(claim="emulate_tp=5"),
            "claim emulate_tp=5: the 2 inputs of model.layers.0.self_attn.o_proj",
        ),
    ],
)
def test_it_is_the_claim_that_is_refused(tmp_path: Path, plan: CheckPlan, said: str) -> None:
    path = fake_checkpoint(tmp_path / "tiny")
    save_file({"model.layers.0.self_attn.o_proj.weight": np.zeros((2, 2), np.float32)}, path / "model.safetensors")
    host, key = Host(models={"tiny": str(path)}), PrivateKey.fresh()
    session = SessionPlan(
        configs=(parse_config("model=tiny"),),
        references=1,
        prompt_tokens=16,
        capture=CapturePlan(layers=("1", "2"), prefill_positions=3, top_k=4),
        sampling=Sampling(max_new_tokens=4),
        repetitions=1,
    )
    run_session(session, host, key, tmp_path / "bundle", start=fake_engine)
    with open_bundle(tmp_path / "bundle", Keyring([key.public])) as bundle, pytest.raises(UsageError) as refused:
        check_bundle(bundle, plan, host, start=never)
    assert refused.value.message.startswith(said)
    assert "anchor" not in refused.value.diagnostics()
    assert "--model-path NAME=" in refused.value.hint or "ranks that divides" in refused.value.hint


@pytest.mark.parametrize("spec", ["backend=vllm", "attn=sdpa"])
def test_a_strange_quantization_is_no_crash(tmp_path: Path, spec: str) -> None:
    path = fake_checkpoint(tmp_path / "tiny")
    (path / "config.json").write_text('{"quantization_config": [1]}')
    with pytest.raises(UsageError, match="quantization_config is '\\[1\\]', not an object"):
        check_checkpoint(parse_config(f"model=tiny,{spec}"), path)


@pytest.mark.parametrize("strange", ['"num_attention_heads": 3', '"num_attention_heads": 0', '"torch_dtype": "f7"'])
def test_what_transformers_makes_of_a_strange_config_is_the_loaders_to_say(tmp_path: Path, strange: str) -> None:
    pytest.importorskip("transformers", reason="pip install '.[hf]'")
    path = fake_checkpoint(tmp_path / "tiny")
    save_file({"model.layers.0.self_attn.o_proj.weight": np.zeros((64, 64), np.float32)}, path / "model.safetensors")
    (path / "config.json").write_text(f'{{"model_type": "llama", "hidden_size": 64, {strange}}}')
    check_checkpoint(parse_config("model=tiny,emulate_tp=2"), path)
