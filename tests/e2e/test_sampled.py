"""Sampled generation: an honest session is believed, and no other seed, temperature or nucleus explains its tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fpforensics.common.config import ExecutionConfig, parse_config
from fpforensics.common.engines import in_process
from fpforensics.common.engines.base import Host
from fpforensics.common.errors import EvidenceError
from fpforensics.common.keys import Keyring, PrivateKey
from fpforensics.common.signals import CapturePlan, Sampling
from fpforensics.prover.session import SessionPlan, run_session
from fpforensics.verifier.check import CheckPlan, check_bundle
from fpforensics.verifier.coherence import require_coherent
from fpforensics.verifier.intake import VerifiedBundle, open_bundle

KEY = PrivateKey.from_seed(b"a test's key, nobody's secret :)")


class Restated:
    """A bundle whose prover states another sampling than the one that ran."""

    def __init__(self, bundle: VerifiedBundle, **changes: Any) -> None:
        sampling = msgspec.structs.replace(bundle.evidence.sampling, **changes)
        self.evidence = msgspec.structs.replace(bundle.evidence, sampling=sampling)
        self.references, self.trace = bundle.references, bundle.trace


@pytest.fixture(scope="module")
def host(tiny_llama: Path) -> Host:
    return Host(device="cpu", models={"tiny": str(tiny_llama)})


@pytest.fixture(scope="module")
def bundle(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VerifiedBundle]:
    plan = SessionPlan(
        configs=(parse_config("attn=sdpa", ExecutionConfig(model="tiny")),),
        references=2,
        prompt_tokens=24,
        capture=CapturePlan(layers=("1", "2", "last"), prefill_positions=4, top_k=8),
        sampling=Sampling(max_new_tokens=24, temperature=0.9, top_p=0.9, seed=5),
        repetitions=2,
    )
    path = tmp_path_factory.mktemp("sampled") / "bundle.msgpack"
    run_session(plan, host, KEY, path, start=in_process)
    with open_bundle(path, Keyring([KEY.public])) as opened:
        yield opened


def test_an_honest_session_is_believed(bundle: VerifiedBundle, host: Host) -> None:
    traces = [bundle.trace(bundle.evidence.rows[0], entry.id) for entry in bundle.evidence.references]
    assert any((trace.decode.logprob_ids[:, 0] != trace.output_ids[1:]).any() for trace in traces)  # not greedy
    result = check_bundle(bundle, CheckPlan(claim="attn=sdpa", lineup=("attn=eager",)), host, start=in_process)
    assert result.verdict == "CONSISTENT", result.rows


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 6}, "seed 6 draws token"),
        ({"temperature": 0.4}, "at temperature 0.4"),
        ({"temperature": 2.0}, "at temperature 2"),
        ({"top_p": 0.02}, "outside the nucleus of 0.02"),
        ({"temperature": 0.0}, r"\(greedy\)"),
    ],
)
def test_another_sampling_is_refused(bundle: VerifiedBundle, changes: dict[str, Any], said: str) -> None:
    require_coherent(bundle, bundle.evidence.rows)
    with pytest.raises(EvidenceError, match=said):
        require_coherent(Restated(bundle, **changes), bundle.evidence.rows)  # type: ignore[arg-type]
