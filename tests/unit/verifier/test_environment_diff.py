"""Environments side by side: hardware may differ, software should not."""

from __future__ import annotations

from typing import Any

import msgspec

from fpforensics.common.config import ExecutionConfig, parse_claim, parse_config
from fpforensics.common.engines.base import EngineFacts, ModelFacts
from fpforensics.common.environment import Environment
from fpforensics.verifier.environment_diff import (
    ABSENT,
    NOT_RUN,
    Difference,
    compare_environments,
    fields_under_test,
    mismatches,
)

A100 = Environment(
    hostname="637c3157512e", platform="Linux", python="3.12.3", cpu="AMD EPYC 7763", cpu_count=64,
    cpu_flags=("avx2", "fma"), gpus=("NVIDIA A100-SXM4-80GB",), driver="570.86",
    packages={"torch": "2.9.1", "vllm": "0.11.2"}, variables={},
)  # fmt: skip
FACTS = EngineFacts(
    device="cuda", gpu="NVIDIA A100-SXM4-80GB", attention_kernels={"prefill": ["flash"], "decode": ["flash"]},
    quantization_kernel="awq_marlin", batch_sizes=[1], versions={"torch": "2.9.1+cu128", "cuda": "12.8"},
    numerics={"tf32": "false"},
    model=ModelFacts(
        name="m", architecture="Llama", weights_digest="sha256:0", vocab_size=8, num_layers=1, hidden_size=8,
        key_width=8,
    ),
)  # fmt: skip


def change(struct: Any, **fields: object) -> Any:
    return msgspec.structs.replace(struct, **fields)


def test_same_machine_differs_in_nothing() -> None:
    differences = compare_environments(A100, FACTS, A100, FACTS)
    assert differences and all(each.equal for each in differences)
    assert {each.kind for each in differences} == {"hardware", "software", "kernels"}


def test_published_case_other_gpu_and_other_torch() -> None:
    h100 = change(A100, hostname="0ce493a31677", gpus=("NVIDIA H100 80GB HBM3",), driver="580.1")
    facts = change(
        FACTS,
        gpu="NVIDIA H100 80GB HBM3",
        versions={"torch": "2.9.0+cu128", "cuda": "12.8"},
        attention_kernels={"prefill": ["cudnn"], "decode": ["flash"]},
    )
    differences = {each.name: each for each in compare_environments(A100, FACTS, h100, facts)}
    assert differences["torch"] == Difference(
        kind="software",
        name="torch",
        prover="2.9.1+cu128",
        verifier="2.9.0+cu128",
        equal=False,
        expected=False,
    )
    assert differences["vllm"].equal and differences["cuda"].equal
    for name in ("hostname", "gpu", "driver", "attention (prefill)"):
        assert not differences[name].equal and differences[name].expected
    assert [each.name for each in mismatches(tuple(differences.values()))] == ["torch"]


def test_other_kernel_on_the_same_hardware_is_unexpected() -> None:
    facts = change(FACTS, attention_kernels={"prefill": ["math"], "decode": ["flash"]})
    found = mismatches(compare_environments(A100, FACTS, A100, facts))
    assert [(each.kind, each.name, each.verifier) for each in found] == [("kernels", "attention (prefill)", "math")]


def test_a_variable_that_somebody_set_is_unexpected_on_any_hardware() -> None:
    other = change(A100, cpu="Intel Xeon", variables={"ATEN_CPU_CAPABILITY": "default"})
    found = mismatches(compare_environments(A100, FACTS, other, FACTS))
    assert [(each.name, each.prover, each.verifier) for each in found] == [("ATEN_CPU_CAPABILITY", ABSENT, "default")]


def test_another_machine_has_another_number_of_threads() -> None:
    prover = change(A100, variables={"OMP_NUM_THREADS": "64"})
    ran, replayed = (change(FACTS, numerics={"threads": count}) for count in ("64", "2"))
    for machine in ({"cpu": "Intel Xeon"}, {"cpu_count": 2}):
        other = change(A100, variables={"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}, **machine)
        found = {each.name: each for each in compare_environments(prover, ran, other, replayed)}
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "threads"):
            assert not found[name].equal and found[name].expected
    same = change(A100, variables={"OMP_NUM_THREADS": "2"})
    found_here = mismatches(compare_environments(prover, ran, same, replayed))
    assert [each.name for each in found_here] == ["threads", "OMP_NUM_THREADS"]


def test_a_cpu_has_other_builds_and_no_gpu_libraries() -> None:
    laptop = change(A100, gpus=(), driver="", packages={"torch": "2.9.1"})
    facts = change(FACTS, device="cpu", gpu="", versions={"torch": "2.9.1+cpu"})
    found = {each.name: each for each in compare_environments(A100, FACTS, laptop, facts)}
    assert found["cuda"].verifier == ABSENT and found["cuda"].expected and not found["cuda"].equal
    assert found["torch"].expected and not found["torch"].equal
    older = compare_environments(A100, FACTS, laptop, change(facts, versions={"torch": "2.9.0+cpu"}))
    assert [each.name for each in mismatches(older)] == ["torch"]
    same_device = compare_environments(A100, FACTS, change(A100, packages={"torch": "2.9.1"}), FACTS)
    assert [each.name for each in mismatches(same_device)] == ["vllm"]


def test_a_prefill_replay_runs_no_decode_kernels() -> None:
    prover = change(FACTS, numerics={"matmul_operators": "aten::bmm, aten::mm"})
    replay = change(FACTS, attention_kernels={"prefill": ["flash"]}, numerics={"matmul_operators": "aten::mm"})
    differences = compare_environments(A100, prover, A100, replay, mode="prefill")
    assert mismatches(differences) == ()
    (decode,) = [each for each in differences if each.name == "attention (decode)"]
    assert (decode.verifier, decode.equal, decode.expected, decode.tested) == (NOT_RUN, False, True, False)
    # a decode replay that ran none is another thing, and so is an operator that the prover never ran
    assert len(mismatches(compare_environments(A100, prover, A100, replay))) == 2
    other = change(replay, numerics={"matmul_operators": "aten::addmm"})
    assert [each.name for each in mismatches(compare_environments(A100, prover, A100, other, mode="prefill"))] == [
        "matmul_operators"
    ]


def test_a_variable_is_compared_once() -> None:
    variables = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    prover = change(FACTS, numerics={"threads": "2", **variables})
    differences = compare_environments(
        change(A100, variables=variables), prover, A100, change(FACTS, numerics={"threads": "2"})
    )
    assert [each.name for each in mismatches(differences)] == list(variables)
    names = [each.name for each in differences if each.kind == "kernels"]
    assert len(names) == len(set(names))


def test_a_prover_hides_no_kernel_by_naming_a_variable_like_it() -> None:
    odd = change(A100, variables={"attention (prefill)": "flash", "quantization": "awq_marlin"})
    facts = change(FACTS, attention_kernels={"prefill": ["math"], "decode": ["flash"]})
    found = mismatches(compare_environments(odd, facts, A100, FACTS))
    assert ("attention (prefill)", "math", "flash") in [(each.name, each.prover, each.verifier) for each in found]


def test_what_the_claim_or_the_lineup_is_about_is_no_software_difference() -> None:
    lied = change(FACTS, quantization_kernel="bitsandbytes", numerics={"threads": "1"})
    plain = change(FACTS, quantization_kernel="", numerics={"threads": "2"})
    found = compare_environments(A100, lied, A100, plain, tested={"quantization"})
    assert [each.name for each in mismatches(found)] == ["threads"]
    assert [each.name for each in found if each.tested and not each.equal] == ["quantization"]
    assert [each.name for each in mismatches(compare_environments(A100, lied, A100, plain))] == [
        "quantization",
        "threads",
    ]


def test_fields_under_test_are_those_of_the_claim_and_those_that_the_lineup_varies() -> None:
    lineup = [ExecutionConfig(), parse_config("attn=eager"), parse_config("attn=eager,dtype=fp16")]
    assert fields_under_test(None, lineup[:1]) == frozenset()
    assert fields_under_test(parse_claim("quant=none"), lineup) == {"quantization", "attention", "dtype"}
