"""A GPU whose memory another process holds: said to the client, nothing kept, and the next session runs. Run by name, on a GPU:

python -m pytest -m gpu tests/e2e/test_gpu_memory.py
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import make_tiny_model

from fpforensics.common.config import ExecutionConfig, parse_config
from fpforensics.common.engines.base import Host
from fpforensics.common.errors import ReplayError
from fpforensics.common.keys import Keyring, PrivateKey
from fpforensics.common.signals import CapturePlan, Sampling
from fpforensics.prover.client import ProverClient
from fpforensics.prover.service import ProverConfig, serve_prover
from fpforensics.prover.session import SessionPlan
from fpforensics.verifier.intake import open_bundle

torch = pytest.importorskip("torch", reason="pip install '.[hf]'")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
    pytest.mark.timeout(600),
]

KEY = PrivateKey.from_seed(b"a test's key, nobody's secret :)")
LEFT_FREE = 64 << 20


@pytest.mark.parametrize("backend", ["transformers", "vllm"])
def test_a_full_gpu_is_said_and_the_next_session_runs(tmp_path: Path, backend: str) -> None:
    pytest.importorskip("vllm" if backend == "vllm" else "transformers", reason=f"pip install '.[{backend}]'")
    host = Host(device="cuda", models={"tiny": str(make_tiny_model(tmp_path / "tiny", "llama", head_dim=64))})
    plan = SessionPlan(
        configs=(parse_config(f"backend={backend}", ExecutionConfig(model="tiny")),),
        references=2,
        prompt_tokens=48,
        capture=CapturePlan(layers=("1", "2"), prefill_positions=8, top_k=8),
        sampling=Sampling(max_new_tokens=4),
        repetitions=2,
    )
    (scratch := tmp_path / "scratch").mkdir()
    with (
        serve_prover(ProverConfig(key=KEY, host=host, models=("tiny",), scratch=scratch)) as server,
        ProverClient(f"127.0.0.1:{server.port}") as client,
    ):
        free, _ = torch.cuda.mem_get_info()
        held = torch.empty(free - LEFT_FREE, dtype=torch.uint8, device="cuda")
        with pytest.raises(ReplayError, match="out of memory on cuda") as refused:
            client.run_session(plan, tmp_path / "never")
        assert "\n" not in refused.value.diagnostics()
        assert not (tmp_path / "never").exists()
        assert list(scratch.iterdir()) == []
        del held
        torch.cuda.empty_cache()
        client.run_session(plan, tmp_path / "next")
    with open_bundle(tmp_path / "next", Keyring([KEY.public])) as bundle:
        bundle.verify_all()
        assert bundle.evidence.rows[0].repetitions.bit_identical
