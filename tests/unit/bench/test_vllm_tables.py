"""What an H200 ran under vLLM: kernel classes, repetition, and cells of the tables in docs/vllm-evidence.md."""

from __future__ import annotations

import numpy as np
import pytest
from vllm_tables import COMPARED, FINGERPRINTS, FOLDER, KINDS, SIGNALS, load, load_h100, main

from fpforensics.common.keys import Keyring
from fpforensics.verifier.intake import open_bundle
from fpforensics.verifier.replay import fingerprint

DOC = FOLDER.parents[2] / "docs" / "vllm-evidence.md"
FLEX = "model=base,attn=vllm_flex"
PLAIN_GPTQ = "model=gptq,dtype=fp16,quant=gptq"


@pytest.mark.parametrize("kind", KINDS)
def test_every_config_is_a_kernel_class_of_its_own_but_for_batch_4_and_8(kind: str) -> None:
    found = load(kind)
    alike = ["model=base,batch=4", "model=base,batch=8"]
    expected = [alike if name == alike[0] else [name] for name in found.names if name != alike[1]]
    for mode in ("decode", "prefill"):
        assert found.classes[mode] == expected
        assert len({found.reports[name][f"{mode}_fingerprint"] for name in found.names}) == len(expected)


def test_the_same_config_gave_the_same_bits_in_five_runs() -> None:
    """FA3 is the first config of five of the files, each made by a run of its own."""
    (first,) = {load(kind).reports[load(kind).names[0]]["decode_fingerprint"] for kind in KINDS[:5]}
    assert first.startswith("a9ac8aaa")


def test_an_h100_gave_the_bits_of_an_h200() -> None:
    """Of every config that ran on both: the same tokens through it in both modes. Plain GPTQ repeats on neither when it decodes."""
    ran = set()
    for name, theirs in load_h100()["configs"].items():
        assert theirs["facts"]["gpu"] == "NVIDIA H100 80GB HBM3"
        repeats = name != PLAIN_GPTQ
        assert theirs["bit_identical"] is theirs["decode_replay_identical"] is repeats
        for ours in (load(kind).reports[name] for kind in KINDS if name in load(kind).names):
            assert ours["facts"]["gpu"] == "NVIDIA H200"
            assert [theirs[mode] == ours[mode] for mode in FINGERPRINTS] == [repeats, True]
            for fact in ("attention_kernels", "quantization_kernel", "batch_sizes"):
                assert theirs["facts"][fact] == ours["facts"][fact]
            ran.add(name)
    on_one_gpu = {name for kind in KINDS if kind not in ("tensor-parallel", "moe") for name in load(kind).names}
    assert ran == set(load_h100()["configs"]) == on_one_gpu
    assert len(ran) == 21
    assert len(load_h100()["bundles"]) == 8


@pytest.mark.parametrize("name", load_h100()["bundles"])
def test_a_bundle_of_an_h200_holds_the_bits_that_an_h100_generated(name: str) -> None:
    with open_bundle(FOLDER / f"{name}.msgpack", Keyring.from_paths([FOLDER / "prover.key.pub"])) as bundle:
        (row,) = bundle.evidence.rows
        assert row.facts.gpu == "NVIDIA H200"
        traces = [bundle.trace(row, reference.id) for reference in bundle.references()]
    assert fingerprint(traces) == load_h100()["bundles"][name]


@pytest.mark.parametrize("kind", KINDS)
def test_a_decode_replay_is_bit_identical_but_for_plain_gptq(kind: str) -> None:
    found = load(kind)
    for name in found.names:
        expected = name != PLAIN_GPTQ
        assert found.reports[name]["bit_identical"] is expected
        assert found.reports[name]["decode_replay_identical"] is expected
        assert bool(found.reports[name]["first_divergence"]) is not expected


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_positions_are_the_same_in_both_modes(kind: str) -> None:
    found = load(kind)
    for signal in SIGNALS.values():
        assert not np.diag(found.cell("prefill", f"prefill-{signal}")).any()
        own = np.diag(found.cell("prefill", f"decode-{signal}"))
        assert [name for name, floor in zip(found.names, own, strict=True) if floor == 0] == [
            name for name in found.names if name == FLEX
        ]


def test_batch_2_decodes_as_batch_1_does_in_the_first_block() -> None:
    found = load("attention")
    assert found.between("decode-hidden_states-1", "FA3", "batch 2") == 0
    assert found.between("prefill-hidden_states-1", "FA3", "batch 2") > 0.1
    assert found.between("decode-hidden_states-4", "FA3", "batch 2") > 0


@pytest.mark.parametrize(
    ("what", "logprobs", "last", "block_1"),
    [
        ("AWQ or GPTQ, both Marlin", 19.23, 27.10, 62.76),
        ("awq or awq_marlin", 1.17, 1.26, 1.00),
        ("FA2 or FA3", 1.12, 1.21, 0.63),
        ("FA3 or Triton", 1.12, 1.24, 1.06),
        ("TP 1 or 2", 1.15, 1.34, 1.97),
        ("batch 1 or 2", 1.08, 1.10, 1.00),
        ("batch 1 or 4", 1.05, 1.15, 1.00),
        ("gptq or gptq_marlin", 1.26, 1.39, 1.25),
        ("KV cache in fp8 or bf16", 2.25, 2.38, 2.48),
        ("EP 1 or 2, both TP 2 (tiny MoE)", 1.03, 1.02, 1.06),
    ],
)
def test_the_published_rule_on_one_machine(what: str, logprobs: float, last: float, block_1: float) -> None:
    (row,) = (row for row in COMPARED if row.what == what)
    found = load(row.kind)
    cells = ("decode-logprobs-all", "decode-hidden_states-last", "decode-hidden_states-1")
    assert [found.snr(cell, row.a, row.b) for cell in cells] == pytest.approx([logprobs, last, block_1], abs=0.006)


def test_the_document_holds_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    main()
    text = DOC.read_text()
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(rows) > 50
    assert not [row for row in rows if row not in text]
