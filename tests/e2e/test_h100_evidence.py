"""Real evidence from an H100, replayed on this CPU: the honest claim passes, the false one is caught."""

from __future__ import annotations

from pathlib import Path

import pytest

from fpforensics.common.engines import in_process
from fpforensics.common.engines.base import Host
from fpforensics.common.keys import Keyring
from fpforensics.verifier.check import CheckPlan, check_bundle
from fpforensics.verifier.intake import open_bundle

FOLDER = Path(__file__).parents[1] / "assets" / "h100"


@pytest.mark.parametrize(("claim", "verdict"), [("quant=none", "CONSISTENT"), ("quant=bnb-nf4", "INCONSISTENT")])
def test_h100_evidence_on_a_cpu(smollm2: Path, claim: str, verdict: str) -> None:
    plan = CheckPlan(
        claim=claim,
        lineup=("attn=eager", "quant=none", "quant=bnb-nf4"),
        mode="prefill",
        row="attn=sdpa,dtype=bf16",
        using="matmul=fp32-rounded",
    )
    keyring = Keyring.from_paths([FOLDER / "prover.key.pub"])
    with open_bundle(FOLDER / "sdpa-eager.msgpack", keyring) as bundle:
        assert bundle.evidence.environment.gpus == ("NVIDIA H100 80GB HBM3",)
        result = check_bundle(bundle, plan, Host(device="cpu"), start=in_process)
    assert result.verdict == verdict, result.rows
    assert not any(score.bit_identical for score in result.rows[0].scores)
    if verdict == "CONSISTENT":
        assert result.rows[0].nearest == "attn=sdpa,dtype=bf16"
