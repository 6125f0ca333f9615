"""What a replay cannot contradict is not vouched for."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import msgspec
import pytest
from check_results import sample

from fpforensics.common.config import ExecutionConfig, parse_claim, parse_config
from fpforensics.common.errors import UsageError
from fpforensics.verifier.check import run_as
from fpforensics.verifier.collector import Checked, MemberReport
from fpforensics.verifier.decision import RowVerdict
from fpforensics.verifier.replay import anchor_of, experts_apart, on_transformers, weights_of
from fpforensics.verifier.vouch import vouched


def of(claim: str, config: str, *others: str, using: str = "") -> tuple[RowVerdict, Checked, list[MemberReport]]:
    """A CONSISTENT row of ``config`` under ``claim``, beside replays of ``others``."""
    result = sample()
    row = msgspec.structs.replace(result.rows[0], verdict="CONSISTENT", reasons=("it fits",))
    claimed = parse_config(config)
    reports = [
        msgspec.structs.replace(result.lineup[0], id=str(number), config=each, runs_as=run_as(each, using))
        for number, each in enumerate([claimed, *map(parse_config, others)])
    ]
    each = Checked.__new__(Checked)
    fields = {field.name: None for field in dataclasses.fields(Checked)}
    for name, value in {**fields, "claim": parse_claim(claim), "config": claimed, "label": "0"}.items():
        object.__setattr__(each, name, value)
    return row, each, reports


@pytest.mark.parametrize(
    ("claim", "said"),
    [
        ("attn=vllm_flash_attn_3,quant=none", "nothing about attention"),
        ("backend=vllm,dtype=bf16", "nothing about backend"),
        ("batch=2", "nothing about batch_size"),
    ],
)
def test_another_engine_does_not_vouch_for_what_it_cannot_see(claim: str, said: str) -> None:
    config = f"backend=vllm,{claim}" if "backend" not in claim else claim
    row, each, lineup = of(claim, config, "backend=vllm,quant=torchao-int8", using="backend=transformers")
    found = vouched(row, each, lineup, named=True)
    assert found.verdict == "INCONCLUSIVE" and said in found.reasons[-1]


def test_another_engine_vouches_for_weights_and_says_that_it_saw_no_kernel() -> None:
    row, each, lineup = of("quant=awq_marlin", "backend=vllm,quant=awq_marlin", using="backend=transformers")
    found = vouched(row, each, lineup, named=True)
    assert found.verdict == "CONSISTENT" and "not the kernels" in found.reasons[-1]


@pytest.mark.parametrize(("others", "verdict"), [(("dtype=bf16",), "CONSISTENT"), ((), "INCONCLUSIVE")])
def test_a_claimed_backend_wants_another_one_beside_it(others: tuple[str, ...], verdict: str) -> None:
    row, each, lineup = of("backend=vllm,dtype=bf16", "backend=vllm,batch=2", *others)
    assert vouched(row, each, lineup, named=True).verdict == verdict


def test_a_row_that_is_replayed_by_its_own_engine_stays_as_it_is() -> None:
    row, each, lineup = of("attn=vllm_triton", "backend=vllm,attn=vllm_triton")
    assert vouched(row, each, lineup, named=True) is row
    refuted = msgspec.structs.replace(row, verdict="INCONSISTENT")
    assert vouched(refuted, each, lineup, named=True) is refuted


@pytest.mark.parametrize("kernel", ["auto", "vllm_flash_attn_3"])
def test_what_vllm_takes_by_itself_is_no_contradiction(kernel: str) -> None:
    config = parse_config(f"backend=vllm,attn={kernel}")
    assert parse_claim("attn=auto").holds_for(config)
    assert parse_claim("attn=vllm_flash_attn_3").holds_for(config)
    assert not parse_claim("attn=auto").holds_for(ExecutionConfig())
    assert not parse_claim("attn=vllm_triton").holds_for(parse_config("backend=vllm,attn=vllm_flash_attn_3"))


def test_what_transformers_runs_in_place_of_vllm() -> None:
    ranks = on_transformers(parse_config("backend=vllm,tp=2,graphs=true,compile=true"))
    assert (ranks.backend, ranks.attention, ranks.emulate_tensor_parallel) == ("transformers", "sdpa", 2)
    marlin = parse_config("backend=vllm,quant=awq_marlin")
    assert on_transformers(marlin).quantization == "awq"
    anchor = anchor_of(marlin)
    assert anchor is not None and (anchor.quantization, anchor.dtype) == ("awq", "fp32")
    rounded = parse_config("backend=vllm,kv=fp8")  # its keys are rounded further than any replay of ours
    assert on_transformers(rounded) == rounded
    assert run_as(rounded, "backend=transformers,matmul=fp32-rounded") == rounded
    by_rank = parse_config("backend=vllm,tp=2,quant=torchao-int8")
    assert on_transformers(by_rank) == by_rank and anchor_of(by_rank) is None
    for quantization in ("bnb-nf4", "awq", "awq_marlin", "gptq_marlin"):  # experts are not by the same weights
        dense = parse_config(f"backend=vllm,quant={quantization}")
        assert on_transformers(dense).backend == "transformers" and anchor_of(dense) is not None
        assert on_transformers(dense, experts=True) == dense and anchor_of(dense, experts=True) is None
        assert run_as(dense, "backend=transformers", experts=True) == dense
    assert weights_of(by_rank) != weights_of(parse_config("backend=vllm,quant=torchao-int8"))


@pytest.mark.parametrize("using", ["backend=vllm", "dtype=fp16"])
def test_using_is_only_about_how_replays_are_computed(using: str) -> None:
    with pytest.raises(UsageError, match="--using"):
        run_as(parse_config("backend=vllm"), using)


@pytest.mark.parametrize(
    ("spec", "content", "apart"),
    [
        ("quant=bnb-nf4", {}, True),
        ("quant=torchao-int8", {}, False),
        ("quant=awq_marlin", {"quantization_config": {"group_size": 64}}, False),
        ("quant=awq_marlin", {"quantization_config": {"group_size": 128}}, True),
        ("quant=gptq_marlin", {"quantization_config": {"q_group_size": 128}}, True),
        ("quant=gptq_marlin", {"quantization_config": {"group_size": -1}}, False),
        ("quant=awq", {}, True),  # it does not say
        ("quant=awq_marlin,tp=2", {"quantization_config": {"group_size": 64}}, True),
        ("quant=awq_marlin,tp=2,ep=2", {"quantization_config": {"group_size": 64}}, False),  # experts are whole
        ("quant=awq_marlin", {"quantization_config": {"group_size": 128}, "num_experts": None}, False),
    ],
)
def test_whose_experts_are_apart(tmp_path: Path, spec: str, content: dict[str, object], apart: bool) -> None:
    stated = {"num_experts": 4, "moe_intermediate_size": 128, "hidden_size": 256} | content
    (tmp_path / "config.json").write_text(
        json.dumps({key: value for key, value in stated.items() if value is not None})
    )
    assert experts_apart(parse_config(f"backend=vllm,{spec}"), tmp_path) is apart
