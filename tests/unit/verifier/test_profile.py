"""The built-in profile's limits, and how prompts become pools."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fpforensics.common.config import parse_config
from fpforensics.common.engines.base import EngineFacts, ModelFacts
from fpforensics.common.environment import Environment
from fpforensics.verifier.pooling import WINDOWS, HonestPrompt, ladder, make_pool, of_phase, windows
from fpforensics.verifier.profile import Pool, built_in_digest, built_in_profile
from fpforensics.verifier.scope import Platform, Scope, platform_of

H100 = Platform(hardware="NVIDIA H100 80GB HBM3", family="H100", details={})
X86 = Platform(hardware="a CPU", family="x86 CPU", details={})


def scope(spec: str = "", prover: Platform = H100, verifier: Platform = X86, weights: str = "") -> Scope:
    config = msgspec.structs.replace(parse_config(spec), weights_digest=weights or built_in_profile().weights)
    return Scope(config=config, prover=prover, verifier=verifier, mode="prefill", matmul=config.matmul)


@pytest.mark.parametrize(
    ("found", "strays"),
    [
        (scope(), []),
        (scope(prover=X86, verifier=H100), []),
        (scope("batch=4,emulate_tp=2"), []),
        (scope(prover=X86), ["evidence of x86 CPU replayed on x86 CPU"]),
        (scope("model=other", weights="sha256:x"), ["model other"]),
        (scope(weights="sha256:x"), ["these weights of smollm2-135m"]),
        (scope("batch=8,emulate_tp=8"), ["batch=8", "emulate_tp=8"]),
        (scope("matmul=fp32-rounded"), ["matmul=fp32-rounded"]),
        (scope("concurrent=true"), ["concurrent=true"]),
    ],
)
def test_the_built_in_profile_says_what_it_did_not_measure(found: Scope, strays: list[str]) -> None:
    assert list(built_in_profile().strays(found)) == strays


def test_replays_by_another_path_are_an_extrapolation_too() -> None:
    found = msgspec.structs.replace(scope(), matmul="fp32-rounded")
    assert list(built_in_profile().strays(found)) == ["replays by matmul=fp32-rounded"]
    assert built_in_digest().startswith("sha256:")


def facts(gpu: str = "", **numerics: str) -> EngineFacts:
    model = ModelFacts(
        name="m", architecture="", weights_digest="", vocab_size=1, num_layers=1, hidden_size=1, key_width=1
    )
    return EngineFacts(
        device="cuda" if gpu else "cpu", gpu=gpu, attention_kernels={}, quantization_kernel="", batch_sizes=[1],
        versions={"torch": "2.13.0", "numpy": "2"}, numerics={"threads": "2", "matmul": "native", **numerics}, model=model,
    )  # fmt: skip


def environment(*flags: str, platform: str = "Linux-x86_64") -> Environment:
    return Environment(
        hostname="h", platform=platform, python="3", cpu="Some CPU", cpu_count=2, cpu_flags=flags, gpus=(), driver="",
        packages={}, variables={},
    )  # fmt: skip


def test_a_platform_is_what_decides_kernels() -> None:
    wide = platform_of(environment("amx_bf16", "avx2"), facts(cpu_capability="AVX512"))
    assert (wide.hardware, wide.family) == ("Some CPU, AVX512, amx_bf16", "x86 CPU")
    assert wide.details == {"torch": "2.13.0", "threads": "2"}
    capped = platform_of(environment("avx2"), facts(cpu_capability="AVX2", ONEDNN_MAX_CPU_ISA="AVX2"))
    assert capped.hardware == "Some CPU, AVX2, oneDNN up to AVX2"
    assert platform_of(environment(platform="Linux-aarch64"), facts()).family == "CPU"
    gpu = platform_of(environment("avx2"), facts("NVIDIA H200"))
    assert (gpu.hardware, gpu.family) == ("NVIDIA H200", "H100")


@given(st.integers(1, 80), st.integers(0, 80), st.integers(0, 80))
def test_windows_hold_so_many_positions_of_each_phase_in_their_share(count: int, prefill: int, decode: int) -> None:
    length = prefill + decode
    if length < count:
        return
    found = windows(count, prefill, decode)
    assert len(found) == min(WINDOWS, length // count)
    taken = []
    for first, second in found:
        assert first.stop - first.start + second.stop - second.start == count
        assert 0 <= first.start <= first.stop <= prefill <= second.start <= second.stop <= length
        taken.append(second.stop - second.start)
    assert abs(np.mean(taken) - count * decode / length) <= 0.5 + 1e-9
    assert max(taken) - min(taken) <= 1


def prompt(key: str, positions: int, rivals: tuple[str, ...] = ("b",)) -> HonestPrompt:
    """Half a floor from its own replay, one from the other's, as noisy as it should be."""
    one = np.ones((2, 4, positions))
    return HonestPrompt(
        key=key,
        own="a",
        base="a",
        rivals=rivals,
        names=("a", "b"),
        distances=one * np.array([0.5, 1.0])[:, None, None],
        units=one,
        to_anchor=one[0],
    )


def test_a_pool_counts_prompts_and_holds_windows() -> None:
    found = make_pool([prompt("one", 40), prompt("two", 40), prompt("two", 40)], 16)
    assert (found.positions, found.prompts, found.noise_prompts) == (16, 2, 2)
    assert found.floors == (0.5,) * 6
    assert found.noise == (1.0,) * 6
    assert found.margin == pytest.approx((np.log(2),) * 6, abs=1e-4)
    assert make_pool([prompt("one", 40, ())], 16).margin == ()


def test_a_phase_alone_has_its_own_pool() -> None:
    """Generated positions scatter more here: held against the mixture, honest ones alone would look far."""
    mixed = replace(prompt("one", 20), decode=4)
    mixed.distances[0, :, 16:] = 0.9
    alone = of_phase(mixed, "decode")
    assert (alone.positions, alone.decode) == (4, 4)
    assert make_pool([alone], 3).floors == (0.9,)
    assert make_pool([of_phase(mixed, "prefill")], 3).floors == (0.5,) * 5
    assert max(make_pool([mixed], 3).floors) < 0.7


def test_every_pool_holds_every_prompt() -> None:
    assert ladder([prompt("one", 40), prompt("two", 20)]) == [1, 3, 16, 20]
    assert ladder([prompt("one", 1)]) == [1]


def test_no_margin_says_nothing() -> None:
    pool = Pool(positions=1, prompts=1, noise_prompts=1, floors=(1.0,), noise=(1.0,), margin=())
    assert pool.p_margin(-100.0) == 1.0
