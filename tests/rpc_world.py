"""What service tests share: small genuine bundles of synthetic numbers, runners that make them, and results about them.

No model runs here: what is tested is everything around it.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from fpforensics.common.bundle import BundleWriter
from fpforensics.common.config import ExecutionConfig, config_id
from fpforensics.common.engines.base import EngineFacts, Host, ModelFacts
from fpforensics.common.environment import Environment
from fpforensics.common.evidence import Evidence, Repetitions, Row
from fpforensics.common.keys import PrivateKey
from fpforensics.common.signals import CapturePlan, PhaseTrace, Reference, Sampling, Trace
from fpforensics.verifier.check import CheckPlan, CheckResult
from fpforensics.verifier.decision import RowVerdict
from fpforensics.verifier.intake import VerifiedBundle

PROVER_KEY = PrivateKey.from_seed(b"p" * 32)
VERIFIER_KEY = PrivateKey.from_seed(b"v" * 32)
STRANGER_KEY = PrivateKey.from_seed(b"s" * 32)
NONCE = "ab" * 32
VOCABULARY, PROMPT, OUTPUT, TOP = 64, 6, 4, 3

ENVIRONMENT = Environment(
    hostname="host",
    platform="Linux",
    python="3.11.0",
    cpu="a CPU",
    cpu_count=2,
    cpu_flags=("avx2",),
    gpus=(),
    driver="",
    packages={"torch": "2.13.0"},
    variables={},
)


def write_bundle(
    path: Path,
    *,
    key: PrivateKey = PROVER_KEY,
    nonce: str = "",
    model: str = "smollm2-135m",
    seed: int = 0,
    width: int = 8,
    configs: tuple[ExecutionConfig, ...] = (),
) -> str:
    """A bundle that passes the intake; ``width`` values of a hidden state make it as large as wanted. Its digest."""
    rng = np.random.default_rng(seed)
    prompt = Reference("ref_0", rng.integers(0, VOCABULARY, PROMPT).astype(np.int32), "synthetic")
    with BundleWriter(path) as writer:
        entries = (writer.add_reference(prompt),)
        rows = tuple(
            Row(
                config_id=config_id(config, ExecutionConfig(model=config.model)),
                config=config,
                facts=_facts(config.model, width),
                repetitions=Repetitions(
                    count=1, bit_identical=True, wall_seconds=(0.5,), wall_mean=0.5, wall_variance=0.0
                ),
                traces=(writer.add_trace(_trace(rng, width)),),
            )
            for config in configs or (ExecutionConfig(model=model),)
        )
        evidence = Evidence(
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            session_id=rng.bytes(16).hex(),
            nonce=nonce,
            tool_version="0",
            environment=ENVIRONMENT,
            capture=CapturePlan(layers=("1",), top_k=TOP),
            sampling=Sampling(max_new_tokens=OUTPUT),
            references=entries,
            rows=rows,
        )
        return writer.finish(evidence, key)


def result_about(
    bundle_digest: str, *, signer: str = PROVER_KEY.keyid, nonce: str = "", claim: str = ""
) -> CheckResult:
    """A result as a check would return it."""
    row = RowVerdict(
        config_id="attn=sdpa,dtype=bf16",
        claim=claim,
        verdict="CONSISTENT",
        snr=4.5,
        snr_infinite=False,
        label="marginally",
        second_label="Moderate",
        floors=None,
        nearest="attn=sdpa,dtype=bf16",
        fits=("attn=sdpa,dtype=bf16",),
        contradicts=("attn=eager",),
        kernel_class=(),
        references=1,
        scores=(),
        noise=(),
        reasons=("because",),
    )
    return CheckResult(
        bundle_digest=bundle_digest,
        signer=signer,
        nonce=nonce,
        evidence_created_at="2026-01-31T12:00:00+00:00",
        checked_at="2026-01-31T12:00:01+00:00",
        tool_version="0",
        claim=claim,
        mode="decode",
        verdict="CONSISTENT",
        rows=(row,),
        references=1,
        lineup=(),
        kernel_classes=(),
        matrices=(),
        environment=(),
        verifier_environment=ENVIRONMENT,
    )


def quick_check(
    bundle: VerifiedBundle,
    plan: CheckPlan,
    host: Host,
    report: Callable[[str, int, int], None] = lambda *_: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> CheckResult:
    """Stands where replays would run: reads the bundle, reports, finds it consistent."""
    report("reading", len(bundle.references()), 1)
    return result_about(bundle.digest, signer=bundle.signer.keyid, nonce=bundle.evidence.nonce, claim=plan.claim)


def _facts(model: str, width: int) -> EngineFacts:
    return EngineFacts(
        device="cpu",
        gpu="",
        attention_kernels={"prefill": ["math"], "decode": ["math"]},
        quantization_kernel="",
        batch_sizes=[1],
        versions={"torch": "2.13.0"},
        numerics={"threads": "1"},
        model=ModelFacts(
            name=model,
            architecture="Llama",
            weights_digest=f"sha256:{'0' * 64}",
            vocab_size=VOCABULARY,
            num_layers=2,
            hidden_size=width,
            key_width=4,
        ),
    )


def _trace(rng: np.random.Generator, width: int) -> Trace:
    return Trace(
        "ref_0",
        rng.integers(0, VOCABULARY, OUTPUT).astype(np.int32),
        _phase(rng, np.arange(PROMPT - 2, PROMPT), width),
        _phase(rng, np.arange(PROMPT, PROMPT + OUTPUT - 1), width),
    )


def _phase(rng: np.random.Generator, positions: np.ndarray, width: int) -> PhaseTrace:
    count = len(positions)
    ids = np.stack([rng.choice(VOCABULARY, TOP, replace=False) for _ in range(count)])
    return PhaseTrace(
        positions=positions.astype(np.int32),
        logprob_ids=ids.astype(np.int32),
        logprobs=-rng.random((count, TOP), dtype=np.float32) - 1,
        chosen_logprobs=-rng.random(count, dtype=np.float32) - 1,
        hidden_states={"1": rng.standard_normal((count, width), dtype=np.float32)},
        key_vectors={"1": rng.standard_normal((count, 4), dtype=np.float32)},
    )
