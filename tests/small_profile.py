"""A small profile that makes sense: what tests of profile files share."""

from __future__ import annotations

from fpforensics.common import envelope
from fpforensics.common.config import ExecutionConfig
from fpforensics.common.keys import PrivateKey
from fpforensics.verifier.distance import Cell
from fpforensics.verifier.measured import Calibrated, CellNoise, Measured, sign_profile
from fpforensics.verifier.profile import FORMAT, Pool
from fpforensics.verifier.scope import Platform, Scope

POOL = Pool(
    positions=1, prompts=3, noise_prompts=3, floors=(0.1, 0.2, 0.3), noise=(0.9, 1.0, 1.1), margin=(0.1, 0.2, 0.3)
)
CPU = Platform(hardware="a CPU, AVX2", family="x86 CPU", details={"torch": "2.13.0"})
SCOPE = Scope(
    config=ExecutionConfig(weights_digest="sha256:" + "1" * 64),
    prover=CPU,
    verifier=CPU,
    mode="decode",
    matmul="native",
)
ENTRY = Measured(
    scope=SCOPE,
    prompts=3,
    decode_share=0.5,
    prompt_tokens=(20, 30),
    rivals=("attn=eager",),
    nearest=3,
    pools=(POOL,),
    phases={},
    cells=(
        CellNoise(
            cell=Cell("decode", "hidden_states", "1"),
            prompts=3,
            floor=0.1,
            quantiles=(0.1, 0.1, 0.2, 0.2, 0.2, 0.3, 0.3),
        ),
    ),
)
CONTENT = Calibrated(
    format=FORMAT, name="lab", created_at="2026-01-31T12:00:00+00:00", tool_version="0", measured=(ENTRY,)
)
BUNDLES = ("sha256:" + "b" * 64, "sha256:" + "a" * 64)


def profile_bytes(key: PrivateKey, content: Calibrated = CONTENT) -> bytes:
    """The file, signed by ``key``."""
    return envelope.to_json(sign_profile(content, BUNDLES, key))
