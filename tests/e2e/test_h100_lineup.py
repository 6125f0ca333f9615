"""Eleven configs of one model that an H100 ran, 24 prompts each, replayed on this CPU; and what an H100 said of a CPU's evidence."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path

import pytest
from attacks.material import Replays

from fpforensics.common.engines.base import Host
from fpforensics.common.keys import Keyring
from fpforensics.verifier.check import CheckPlan, check_bundle
from fpforensics.verifier.intake import VerifiedBundle, open_bundle
from fpforensics.verifier.verdict import open_verdict

FOLDER = Path(__file__).parents[1] / "assets" / "h100"
SDPA = "attn=sdpa,dtype=bf16"
KERNELS = ("attn=sdpa", "attn=eager", "emulate_tp=1", "emulate_tp=2")
LINEUP = (*KERNELS, "emulate_tp=4", "dtype=bf16", "dtype=fp16")
INT8 = (*LINEUP, "quant=none", "quant=torchao-int8")


@pytest.fixture(scope="module")
def bundle() -> Iterator[VerifiedBundle]:
    with open_bundle(FOLDER / "lineup.msgpack", Keyring.from_paths([FOLDER / "lineup.key.pub"])) as opened:
        yield opened


@pytest.fixture(scope="module")
def replays(smollm2: Path) -> Replays:
    return Replays(Host(device="cpu"))


@pytest.mark.parametrize(
    ("row", "claim", "lineup", "verdict"),
    [
        (SDPA, "attn=sdpa", KERNELS, "CONSISTENT"),
        (SDPA, "attn=eager", KERNELS, "INCONSISTENT"),
        ("attn=eager", "attn=eager", KERNELS, "CONSISTENT"),
        ("attn=eager", "attn=sdpa", KERNELS, "INCONSISTENT"),
        ("emulate_tp=2", "emulate_tp=2", KERNELS, "CONSISTENT"),
        ("emulate_tp=2", "emulate_tp=1", KERNELS, "INCONSISTENT"),
        ("quant=torchao-int4", "quant=none", ("attn=sdpa",), "INCONSISTENT"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("batch=2", "attn=sdpa", LINEUP, "CONSISTENT"),
                # On a CPU sdpa is its flash backend: what the row declares contradicts the claim, and is one class with it.
                ("attn=sdpa_flash", "attn=sdpa", LINEUP, "INCONCLUSIVE"),
                ("attn=sdpa_flash", "attn=eager", LINEUP, "INCONSISTENT"),
                ("emulate_tp=4", "emulate_tp=4", LINEUP, "CONSISTENT"),
                ("emulate_tp=4", "emulate_tp=2", LINEUP, "INCONSISTENT"),
                ("dtype=fp16", "dtype=fp16", LINEUP, "CONSISTENT"),
                ("dtype=fp16", "dtype=bf16", LINEUP, "INCONSISTENT"),
                ("quant=torchao-int8", "quant=torchao-int8", INT8, "CONSISTENT"),
                ("quant=torchao-int8", "quant=none", INT8, "INCONSISTENT"),
                ("quant=bnb-nf4", "quant=none", INT8, "INCONSISTENT"),
                ("compile=true", "dtype=fp16", LINEUP, "INCONSISTENT"),
                (SDPA, "quant=torchao-int8", INT8, "INCONSISTENT"),
            )
        ),
    ],
)
def test_what_an_h100_ran_is_told_from_what_it_did_not(
    bundle: VerifiedBundle, replays: Replays, row: str, claim: str, lineup: tuple[str, ...], verdict: str
) -> None:
    assert len(bundle.evidence.references) == 24
    plan = CheckPlan(claim=claim, lineup=lineup, mode="prefill", row=row, using="matmul=fp32-rounded")
    result = check_bundle(bundle, plan, replays.host, start=replays.start)
    assert result.verdict == verdict, result.rows[0].reasons


@pytest.mark.parametrize(
    ("name", "row", "claim", "verdict"),
    [
        ("cpu-sdpa-honest", SDPA, "attn=sdpa", "CONSISTENT"),
        ("cpu-eager-lie", "attn=eager", "attn=sdpa", "INCONSISTENT"),
        ("cpu-tp2-lie", "emulate_tp=2", "emulate_tp=1", "INCONSISTENT"),
        ("cpu-int8-lie", "quant=torchao-int8", "quant=none", "INCONSISTENT"),
    ],
)
def test_what_an_h100_said_of_a_cpus_evidence(name: str, row: str, claim: str, verdict: str) -> None:
    data = gzip.decompress((FOLDER / f"{name}.json.gz").read_bytes())
    result = open_verdict(data, Keyring.from_paths([FOLDER / "verifier.key.pub"])).predicate.result
    assert (result.claim, result.verdict) == (claim, verdict)
    assert result.verifier_environment.gpus == ("NVIDIA H100 80GB HBM3",)
    (device,) = (each for each in result.environment if each.name == "device")
    assert (device.prover, device.verifier) == ("cpu", "cuda")
    assert result.rows[0].alpha == 0.01
    assert not any(score.bit_identical for score in result.rows[0].scores)
