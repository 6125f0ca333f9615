"""Control and inverse control: an honest claim passes and a false one is caught, on the prover's own kernels and on others.

Engines, bundles, intake, replay and decision are the real ones; the model is tiny. Bundles made under other kernels come from
another process, since kernels are chosen once in a process's life.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import lying_prover
import msgspec
import pytest
from lying_prover import Lie, Orders

from fpforensics.common.config import ExecutionConfig, parse_config
from fpforensics.common.engines import in_process
from fpforensics.common.engines.base import Host, ReplayMode
from fpforensics.common.errors import EvidenceError
from fpforensics.common.keys import Keyring, PrivateKey, generate, load_private
from fpforensics.common.signals import CapturePlan, Sampling
from fpforensics.prover.session import SessionPlan, run_session
from fpforensics.verifier.check import CheckPlan, CheckResult, check_bundle
from fpforensics.verifier.intake import open_bundle

CAPTURE = CapturePlan(layers=("1", "2", "4", "last"), prefill_positions=8, top_k=8)
SAMPLING = Sampling(max_new_tokens=8)
OTHER_KERNELS = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}

HONEST = Lie("honest", ran="", declared="")
ARITHMETIC = (
    Lie("four-bit", ran="quant=bnb-nf4", declared="quant=none"),
    Lie("eight-bit", ran="quant=torchao-int8", declared="quant=none"),
    Lie("fp16-for-bf16", ran="dtype=fp16", declared="dtype=bf16"),
    Lie("fp32-for-bf16", ran="dtype=fp32", declared="dtype=bf16"),
    Lie("bf16-for-fp16", ran="dtype=bf16", declared="dtype=fp16"),
)
IDENTITY = (
    Lie("other-model", ran="model=other", declared="model=tiny"),
    Lie("other-prompt", ran="", declared="", other_prompt=True),
)
CARELESS = (*ARITHMETIC[2:], IDENTITY[1])
ATTENTION = (
    Lie("sdpa-for-eager", ran="attn=sdpa", declared="attn=eager"),
    Lie("eager-for-sdpa", ran="attn=eager", declared="attn=sdpa"),
)
LINEUP = ("dtype=bf16", "dtype=fp16", "dtype=fp32", "quant=none", "quant=bnb-nf4", "quant=torchao-int8")


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> PrivateKey:
    path = tmp_path_factory.mktemp("keys") / "prover.key"
    generate(path)
    return load_private(path)


@pytest.fixture(scope="module")
def host(tiny_llama: Path, tiny_llama_other: Path) -> Host:
    return Host(device="cpu", models={"tiny": str(tiny_llama), "other": str(tiny_llama_other)})


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory, host: Host) -> dict[str, Path]:
    """Folders of bundles by the kernels that made them: ``own`` are this process's."""
    folder = tmp_path_factory.mktemp("bundles")
    generate(folder / "prover.key")
    made = {}
    for kernels in ("own", "other"):
        made[kernels] = folder / kernels
        made[kernels].mkdir()
        orders = Orders(
            folder=str(made[kernels]),
            key=str(folder / "prover.key"),
            models=host.models,
            lies=[HONEST, *ARITHMETIC, *IDENTITY, *ATTENTION],
            capture=CAPTURE,
            sampling=SAMPLING,
            references=2,
            prompt_tokens=96,
        )
        if kernels == "own":
            lying_prover.make_bundles(orders)
            continue
        (folder / "orders.json").write_bytes(msgspec.json.encode(orders))
        command = [sys.executable, lying_prover.__file__, str(folder / "orders.json")]
        subprocess.run(command, check=True, env=os.environ | OTHER_KERNELS)
    return made


def check(path: Path, host: Host, claim: str, lineup: tuple[str, ...] = LINEUP) -> CheckResult:
    keyring = Keyring.from_paths([path.parent.parent / "prover.key.pub"])
    mode: ReplayMode = "decode" if path.parent.name == "own" else "prefill"
    with open_bundle(path, keyring) as bundle:
        return check_bundle(bundle, CheckPlan(claim=claim, lineup=lineup, mode=mode), host, start=in_process)


def test_a_session_is_bit_identical_to_its_replay_on_its_own_kernels(
    tmp_path: Path, key: PrivateKey, host: Host
) -> None:
    base = ExecutionConfig(model="tiny")
    specs = ("attn=sdpa", "attn=eager", "quant=bnb-nf4", "batch=2", "matmul=fp32-rounded", "emulate_tp=2")
    plan = SessionPlan(
        configs=tuple(parse_config(spec, base) for spec in specs),
        references=2,
        prompt_tokens=96,
        capture=CAPTURE,
        sampling=SAMPLING,
        repetitions=2,
    )
    path = tmp_path / "rows.msgpack"
    run_session(plan, host, key, path, start=in_process)
    with open_bundle(path, Keyring([key.public])) as bundle:
        result = check_bundle(bundle, CheckPlan(lineup=("attn=sdpa",)), host, start=in_process)
    assert len(result.rows) == len(specs)
    for row in result.rows:
        (own,) = [score for score in row.scores if score.id == row.config_id]
        assert own.bit_identical
        assert own.floors == 0.0
    for matrix in result.matrices:
        assert matrix.diagonal_mean == 0.0
        assert matrix.snr is None


@pytest.mark.parametrize("kernels", ["own", "other"])
def test_an_honest_claim_passes(bundles: dict[str, Path], host: Host, kernels: str) -> None:
    result = check(bundles[kernels] / "honest.msgpack", host, "quant=none")
    assert result.verdict == "CONSISTENT", result.rows
    identical = {score.id for score in result.rows[0].scores if score.bit_identical}
    assert bool(identical) == (kernels == "own")


@pytest.mark.parametrize("kernels", ["own", "other"])
@pytest.mark.parametrize("lie", [*ARITHMETIC, *IDENTITY], ids=lambda lie: lie.name)
def test_a_lie_is_caught(bundles: dict[str, Path], host: Host, lie: Lie, kernels: str) -> None:
    claim = lie.declared if lie.declared and "model" not in lie.declared else "quant=none"
    try:
        result = check(bundles[kernels] / f"{lie.name}.msgpack", host, claim)
    except (
        EvidenceError
    ) as refused:  # such a liar forgot to store what it declares; careful ones are in test_attacks.py
        assert lie in CARELESS, refused.diagnostics()
    else:
        assert result.verdict == "INCONSISTENT", result.rows


@pytest.mark.parametrize("kernels", ["own", "other"])
def test_a_false_claim_about_an_honest_bundle_is_caught(bundles: dict[str, Path], host: Host, kernels: str) -> None:
    result = check(bundles[kernels] / "honest.msgpack", host, "quant=bnb-nf4")
    assert result.verdict == "INCONSISTENT", result.rows


@pytest.mark.parametrize("lie", ATTENTION, ids=lambda lie: lie.name)
def test_a_lie_about_attention_is_caught_on_the_provers_own_kernels(
    bundles: dict[str, Path], host: Host, lie: Lie
) -> None:
    result = check(bundles["own"] / f"{lie.name}.msgpack", host, lie.declared, ("attn=eager", "attn=sdpa"))
    assert result.verdict == "INCONSISTENT", result.rows


@pytest.mark.parametrize(("claim", "verdict"), [("emulate_tp=2", "CONSISTENT"), ("emulate_tp=1", "INCONSISTENT")])
def test_partial_sums_are_told_apart_on_the_provers_own_kernels(
    tmp_path: Path, key: PrivateKey, host: Host, claim: str, verdict: str
) -> None:
    plan = SessionPlan(
        configs=(parse_config("model=tiny,emulate_tp=2"),),
        references=2,
        prompt_tokens=96,
        capture=CAPTURE,
        sampling=SAMPLING,
        repetitions=2,
    )
    path = tmp_path / "partial.msgpack"
    run_session(plan, host, key, path, start=in_process)
    lineup = ("emulate_tp=1", "emulate_tp=2", "emulate_tp=4", "quant=bnb-nf4")
    with open_bundle(path, Keyring([key.public])) as bundle:
        result = check_bundle(bundle, CheckPlan(claim=claim, lineup=lineup), host, start=in_process)
    assert result.verdict == verdict, result.rows
    identical = [
        member.config
        for member in result.lineup
        for score in result.rows[0].scores
        if score.bit_identical and score.id == member.id
    ]
    assert [config.emulate_tensor_parallel for config in identical] == [2]
    # four-bit weights are replayed with whole products: theirs are not split
    assert {
        member.config.emulate_tensor_parallel for member in result.lineup if "bnb" in member.config.quantization
    } == {1}


def test_what_cannot_be_told_apart_is_inconclusive_and_named(bundles: dict[str, Path], host: Host) -> None:
    """On a CPU sdpa runs its flash backend: asking for that one by name gives the same bits."""
    result = check(bundles["own"] / "honest.msgpack", host, "attn=sdpa", ("attn=sdpa_flash",))
    assert result.verdict == "INCONCLUSIVE"
    assert result.kernel_classes == (("attn=sdpa,dtype=bf16", "attn=sdpa_flash"),)
    assert result.rows[0].kernel_class == result.kernel_classes[0]
