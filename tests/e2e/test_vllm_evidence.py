"""Evidence of vLLM on an H200: what its kernels were, and what a CPU says of it through transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
from attacks.replays import Replays

from fpforensics.common.engines import in_process
from fpforensics.common.engines.base import EngineStarter, Host
from fpforensics.common.keys import Keyring
from fpforensics.prover.checkpoint.make import make_checkpoint
from fpforensics.verifier.check import CheckPlan, CheckResult, check_bundle
from fpforensics.verifier.intake import open_bundle

FOLDER = Path(__file__).parents[1] / "assets" / "hopper"
PAD = "hidden=768,heads=12,kv_heads=4"
USING = "backend=transformers,matmul=fp32-rounded"
AWQ, GPTQ, BASE = "model=awq,quant=awq_marlin", "model=gptq,quant=gptq_marlin", "model=base,quant=none"
NF4 = "model=base,quant=bnb-nf4"
FA3, FA2, TRITON = "attn=vllm_flash_attn_3", "attn=vllm_flash_attn_2", "attn=vllm_triton"
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def host(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Host:
    """The very checkpoints that the H200 held: the verifier compares digests."""
    folder = tmp_path_factory.mktemp("hopper")
    for name, made_as in (("base", "none"), ("awq", "awq"), ("gptq", "gptq")):
        make_checkpoint("smollm2-135m", made_as, pad=PAD, output=folder / name)
    return Host(device="cpu", models={name: str(folder / name) for name in ("base", "awq", "gptq")})


@pytest.fixture(scope="module")
def replays(host: Host) -> Replays:
    return Replays(host)


def check(
    name: str, host: Host, claim: str, lineup: tuple[str, ...], start: EngineStarter, using: str = USING
) -> CheckResult:
    plan = CheckPlan(claim=claim, lineup=lineup, mode="prefill", using=using)
    with open_bundle(FOLDER / f"{name}.msgpack", Keyring.from_paths([FOLDER / "prover.key.pub"])) as bundle:
        assert set(bundle.evidence.environment.gpus) == {"NVIDIA H200"}
        return check_bundle(bundle, plan, host, start=start)


@pytest.mark.parametrize(
    ("name", "claim", "lineup", "verdict"),
    [
        ("awq_marlin", "quant=awq_marlin", (GPTQ,), "CONSISTENT"),
        ("awq_marlin", GPTQ, (AWQ,), "INCONSISTENT"),
        ("fa3", "quant=none", (NF4,), "CONSISTENT"),
        ("fa3", NF4, (BASE,), "INCONSISTENT"),
        *(
            pytest.param(*case, marks=slow)
            for case in (
                ("awq_marlin", BASE, (AWQ,), "INCONSISTENT"),
                ("gptq_marlin", "quant=gptq_marlin", (AWQ, BASE), "CONSISTENT"),
                ("gptq_marlin", AWQ, (GPTQ,), "INCONSISTENT"),
                ("gptq_marlin", BASE, (GPTQ,), "INCONSISTENT"),
                ("bnb-nf4", "quant=bnb-nf4", (BASE,), "CONSISTENT"),
                ("bnb-nf4", "quant=none", (NF4,), "INCONSISTENT"),
                ("gptq-fp16", "quant=gptq", (AWQ, BASE), "CONSISTENT"),
                ("gptq-fp16", BASE, (), "INCONSISTENT"),
                ("graphs", "quant=none", (NF4,), "CONSISTENT"),
                ("graphs", NF4, (BASE,), "INCONSISTENT"),
                ("tp2", "quant=none", (NF4,), "CONSISTENT"),
                ("tp2", NF4, (BASE,), "INCONSISTENT"),
            )
        ),
    ],
)
def test_weights_are_told_apart_on_a_cpu(
    replays: Replays, name: str, claim: str, lineup: tuple[str, ...], verdict: str
) -> None:
    result = check(name, replays.host, claim, lineup, replays.start)
    assert result.verdict == verdict, result.rows[0].reasons
    assert not any(score.bit_identical for score in result.rows[0].scores)


@pytest.mark.parametrize(
    ("name", "claim", "rival"),
    [
        ("fa3", FA3, FA2),
        ("fa3", FA2, FA3),
        *(pytest.param(*case, marks=slow) for case in (("triton", TRITON, FA3), ("triton", FA3, TRITON))),
    ],
)
def test_kernels_that_transformers_lacks_stay_open(replays: Replays, name: str, claim: str, rival: str) -> None:
    """FA2, FA3 and Triton are one replay here: neither the honest claim nor the false one is settled."""
    result = check(name, replays.host, claim, (rival,), replays.start)
    assert result.verdict == "INCONCLUSIVE", result.rows[0].reasons
    (members,) = result.kernel_classes
    assert len(members) == 2
