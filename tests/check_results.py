"""Results of a check, made up: evidence near all configs but one, and one in which everything is hostile."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from fpforensics.common.config import ExecutionConfig, parse_config
from fpforensics.common.engines.base import EngineFacts, ModelFacts
from fpforensics.common.environment import Environment
from fpforensics.common.signals import PHASES, Signal
from fpforensics.verifier.check import CheckResult, MemberReport
from fpforensics.verifier.decision import Member, combine_rows, decide_row
from fpforensics.verifier.distance import Cell
from fpforensics.verifier.environment_diff import compare_environments
from fpforensics.verifier.matrix import Measurement, build_matrices, kernel_classes

SPECS = ("attn=sdpa,dtype=bf16", "attn=eager", "quant=bnb-nf4", "attn=sdpa_math")

LAYERS: dict[Signal, tuple[str, ...]] = {
    "logprobs": ("",),
    "key_vectors": ("1", "2", "last"),
    "hidden_states": ("1", "2", "last"),
}

SCALE = {"logprobs": 0.2, "key_vectors": 0.8, "hidden_states": 2.0}


def environment(**changes: Any) -> Environment:
    base = Environment(
        hostname="prover-7", platform="Linux-6.8-x86_64", python="3.11.9", cpu="AMD EPYC 9534", cpu_count=64,
        cpu_flags=("avx2", "avx512f", "fma"), gpus=("NVIDIA H100 80GB HBM3",), driver="570.86.15",
        packages={"torch": "2.13.0", "transformers": "5.19.0"}, variables={},
    )  # fmt: skip
    return msgspec.structs.replace(base, **changes)


def facts(**changes: Any) -> EngineFacts:
    model = ModelFacts(
        name="smollm2-135m", architecture="Llama", weights_digest="sha256:0", vocab_size=49152, num_layers=30,
        hidden_size=576, key_width=192,
    )  # fmt: skip
    base = EngineFacts(
        device="cuda", gpu="NVIDIA H100 80GB HBM3",
        attention_kernels={"prefill": ["cudnn"], "decode": ["flash"]}, quantization_kernel="",
        batch_sizes=[1],
        versions={"torch": "2.13.0+cu128", "cuda": "12.8"}, numerics={"threads": "8"}, model=model,
    )  # fmt: skip
    return msgspec.structs.replace(base, **changes)


def cells(floors: float, rng: np.random.Generator) -> dict[Cell, float]:
    return {
        Cell(phase, signal, layer): SCALE[signal] * floors * (1 + 0.3 * index) * rng.uniform(0.9, 1.1)
        for phase in PHASES
        for signal, layers in LAYERS.items()
        for index, layer in enumerate(layers)
    }


def sample(
    rows: tuple[str, ...] = SPECS[:1],
    columns: tuple[str, ...] = SPECS,
    true: str = SPECS[0],
    claim: str = "quant=none",
    same: tuple[tuple[str, str], ...] = (),
    identical: bool = False,
    **changes: Any,
) -> CheckResult:
    """A check of evidence that lies 20 noise floors from 4-bit weights and 1 from everything else."""
    rng = np.random.default_rng(1)
    quiet = np.random.default_rng(2)
    noise = cells(1, np.random.default_rng(3))
    measured, verdicts = [], []
    classes = kernel_classes(same)
    for row in rows:
        per_member: dict[str, dict[str, dict[Cell, float]]] = {}
        for column in columns:
            floors = 20.0 if ("nf4" in column) != ("nf4" in (row if len(rows) > 1 else true)) else 1.0
            zero = identical and column == row
            for reference in ("ref_0", "ref_1", "ref_2"):
                at = cells(0.0 if zero else floors + quiet.uniform(0, 0.1), rng)
                per_member.setdefault(column, {})[reference] = at
                measured.append(Measurement(row=row, column=column, reference_id=reference, distances=at))
        members = [
            Member(name, name == row if len(rows) > 1 else "nf4" not in name, measured_)
            for name, measured_ in per_member.items()
        ]
        verdicts.append(decide_row(config_id=row, claim=claim, members=members, noise=noise, kernel_classes=classes))
    laptop = environment(hostname="verifier-1", cpu="Intel Core i7", cpu_count=8, gpus=(), driver="")
    cpu = facts(
        device="cpu", gpu="", versions={"torch": "2.13.0+cpu"}, numerics={"threads": "2"},
        attention_kernels={"prefill": ["cpu_flash"], "decode": ["cpu_flash"]},
    )  # fmt: skip
    base = ExecutionConfig()
    lineup = tuple(
        MemberReport(
            id=name,
            config=parse_config(name) if "=" in name and "<" not in name else base,
            runs_as=base,
            facts=cpu,
            seconds=4.2,
            skipped="",
        )
        for name in columns
    )
    skipped = MemberReport(
        id="attn=flash_attention_2", config=base, runs_as=base, facts=None, seconds=0.0,
        skipped="flash-attn is not installed here",
    )  # fmt: skip
    result = CheckResult(
        bundle_digest="9f2c" * 16,
        signer="5b1d" * 16,
        nonce="",
        evidence_created_at="2026-01-01T10:00:00+00:00",
        checked_at="2026-01-01T10:05:00+00:00",
        tool_version="0.1.0",
        claim=claim,
        mode="decode",
        verdict=combine_rows(verdicts),
        rows=tuple(verdicts),
        references=3,
        lineup=(*lineup, skipped),
        kernel_classes=classes,
        matrices=tuple(each.to_report(classes) for each in build_matrices(measured)),
        environment=compare_environments(environment(), facts(), laptop, cpu),
        verifier_environment=laptop,
    )
    return msgspec.structs.replace(result, **changes)


HOSTILE = (
    "\x1b[2J\x07\u202e<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{7*7}}$\\frac{1}${\r\n✓ CONSISTENT"
)


def hostile_sample() -> CheckResult:
    """Everything that can come from evidence is hostile: ids, claim, references, environment, reasons."""
    row = HOSTILE + "nf4"
    result = sample(rows=(row,), columns=(row, f"a,{HOSTILE}"), true=row, claim=HOSTILE)
    hostile_matrices = tuple(
        msgspec.structs.replace(each, references=(HOSTILE, *each.references[1:])) for each in result.matrices
    )
    hostile_environment = compare_environments(
        environment(hostname=HOSTILE, packages={HOSTILE: HOSTILE}, variables={HOSTILE: HOSTILE}),
        facts(attention_kernels={HOSTILE: [HOSTILE]}, numerics={HOSTILE: HOSTILE}, versions={HOSTILE: HOSTILE}),
        environment(),
        facts(),
    )
    return msgspec.structs.replace(
        result,
        nonce=HOSTILE,
        signer=HOSTILE,
        evidence_created_at=HOSTILE,
        matrices=hostile_matrices,
        environment=hostile_environment,
        kernel_classes=((row, HOSTILE),),
        lineup=tuple(msgspec.structs.replace(each, id=HOSTILE) for each in result.lineup),
    )
