"""Real evidence from an H100, replayed on this CPU: honest claims pass, false ones are caught, and kernels are told apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from fpforensics.common.engines import in_process
from fpforensics.common.engines.base import Host
from fpforensics.common.keys import Keyring
from fpforensics.verifier.check import CheckPlan, check_bundle
from fpforensics.verifier.intake import open_bundle

FOLDER = Path(__file__).parents[1] / "assets" / "h100"
SDPA, EAGER = "attn=sdpa,dtype=bf16", "attn=eager"


@pytest.mark.parametrize(
    ("row", "claim", "lineup", "verdict"),
    [
        (SDPA, "quant=none", ("attn=eager", "quant=bnb-nf4"), "CONSISTENT"),
        (SDPA, "quant=bnb-nf4", ("quant=none",), "INCONSISTENT"),
        # Of test_h100_lineup.py's larger bundle these are asked every time.
        pytest.param(EAGER, "attn=eager", ("attn=sdpa",), "CONSISTENT", marks=pytest.mark.slow),
        pytest.param(EAGER, "attn=sdpa", ("attn=eager",), "INCONSISTENT", marks=pytest.mark.slow),
    ],
)
def test_h100_evidence_on_a_cpu(smollm2: Path, row: str, claim: str, lineup: tuple[str, ...], verdict: str) -> None:
    plan = CheckPlan(claim=claim, lineup=lineup, mode="prefill", row=row, using="matmul=fp32-rounded")
    keyring = Keyring.from_paths([FOLDER / "prover.key.pub"])
    with open_bundle(FOLDER / "sdpa-eager.msgpack", keyring) as bundle:
        assert bundle.evidence.environment.gpus == ("NVIDIA H100 80GB HBM3",)
        result = check_bundle(bundle, plan, Host(device="cpu"), start=in_process)
    assert result.verdict == verdict, result.rows
    found = result.rows[0]
    assert not any(score.bit_identical for score in found.scores)
    if claim != "quant=bnb-nf4":
        assert found.calibration, "the built-in profile covers it"
        assert found.alpha == 0.01
        assert found.p_value is not None
        assert (found.p_value <= 0.01) == (verdict == "INCONSISTENT")
