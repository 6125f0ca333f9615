"""The contract everything else stands on: on the same kernels, a decode replay is bit-identical to generation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from engine_runs import VOCAB, differences, forcings, largest_gap, references

from fpforensics.common.config import parse_config
from fpforensics.common.engines import open_engine
from fpforensics.common.engines.base import Engine, Host
from fpforensics.common.engines.remote import start_engine
from fpforensics.common.errors import ReplayError, UsageError
from fpforensics.common.sampling import choose
from fpforensics.common.signals import CapturePlan, Forcing, Reference, Sampling

pytest.importorskip("transformers", reason="pip install '.[hf]'")

PLAN = CapturePlan(layers=("1", "2", "4", "12", "last"), prefill_positions=5, top_k=8)
GREEDY = Sampling(max_new_tokens=9)


@contextmanager
def opened(path: Path, spec: str) -> Iterator[Engine]:
    engine = open_engine(parse_config(f"model=tiny,{spec}"), Host(device="cpu", models={"tiny": str(path)}))
    try:
        yield engine
    finally:
        engine.close()


def check_replay(path: Path, spec: str, sampling: Sampling = GREEDY) -> None:
    with opened(path, spec) as engine:
        given = references()
        generated = engine.generate(given, sampling, PLAN)
        assert differences(generated, engine.generate(given, sampling, PLAN)) == []
        assert differences(generated, engine.teacher_force(forcings(given, generated), PLAN, "decode")) == []
    # again in another engine, as a verifier does
    with opened(path, spec) as verifier:
        assert differences(generated, verifier.teacher_force(forcings(given, generated), PLAN, "decode")) == []


@pytest.mark.parametrize("attention", ["eager", "sdpa", "sdpa_math", "sdpa_flash"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "fp64"])
def test_attention_and_dtype(tiny_llama: Path, attention: str, dtype: str) -> None:
    check_replay(tiny_llama, f"attn={attention},dtype={dtype}")


@pytest.mark.parametrize(
    "spec",
    [
        "quant=bnb-nf4",
        "quant=bnb-fp4",
        "quant=bnb-int8",
        "quant=torchao-int8",
        "quant=torchao-int4",
        "matmul=fp32-rounded",
        "matmul=fp32-rounded,dtype=fp16,attn=eager",
        "matmul=fp32-rounded,quant=bnb-nf4",
        "matmul=fp32-rounded,quant=torchao-int4",
        "batch=2",
        "batch=5,attn=eager",
        "batch=3,quant=bnb-nf4",
        "batch=3,matmul=fp32-rounded",
    ],
)
def test_quantization_products_and_batches(tiny_llama: Path, spec: str) -> None:
    if "quant=" in spec:
        pytest.importorskip("torchao" if "torchao" in spec else "bitsandbytes")
    check_replay(tiny_llama, spec)


@pytest.mark.parametrize("spec", ["attn=sdpa", "attn=eager,matmul=fp32-rounded", "batch=3"])
def test_other_architectures(tiny_qwen3: Path, tiny_qwen3_moe: Path, spec: str) -> None:
    check_replay(tiny_qwen3, spec)
    check_replay(tiny_qwen3_moe, spec)


@pytest.mark.parametrize("spec", ["attn=sdpa", "batch=2,dtype=fp32"])
def test_sampled_tokens(tiny_llama: Path, spec: str) -> None:
    check_replay(tiny_llama, spec, Sampling(max_new_tokens=9, temperature=0.8, top_p=0.9, seed=3))


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["attn=flex", "compile=true", "compile=true,attn=eager,batch=2"])
def test_compiled_code(tiny_llama: Path, spec: str) -> None:
    check_replay(tiny_llama, spec)


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["attn=flex", "compile=true"])
def test_compiled_code_does_not_depend_on_earlier_lengths(tiny_llama: Path, spec: str) -> None:
    """Each order in a worker of its own: compiled code is kept for the life of a process."""
    given = references(3)
    config, host = parse_config(f"model=tiny,{spec}"), Host(device="cpu", models={"tiny": str(tiny_llama)})
    with start_engine(config, host) as engine:
        forward = engine.generate(given, GREEDY, PLAN)
    with start_engine(config, host) as engine:
        assert differences(forward, engine.generate(given[::-1], GREEDY, PLAN)[::-1]) == []


@pytest.mark.parametrize(
    "other", ["attn=sdpa_math", "dtype=fp16", "quant=bnb-nf4", "quant=torchao-int4", "matmul=fp32-rounded"]
)
def test_another_config_is_not_bit_identical(tiny_qwen3: Path, other: str) -> None:
    """The inverse control: what the replay checks above would miss if captures were constant."""
    if "torchao" in other:
        pytest.importorskip("torchao")
    given = references()
    with opened(tiny_qwen3, "attn=sdpa") as engine:
        honest = engine.generate(given, GREEDY, PLAN)
    with opened(tiny_qwen3, other) as engine:
        replay = engine.teacher_force(forcings(given, honest), PLAN, "decode")
    if other == "matmul=fp32-rounded":
        # may agree on a machine whose native product rounds at the same points; it must stay within rounding
        gap = largest_gap(honest[0].decode.hidden_states["1"], replay[0].decode.hidden_states["1"])
        assert gap < 0.1
    else:
        assert len(differences(honest, replay)) == len(given)


def test_prefill_replay_agrees_with_decode_in_fp32(tiny_llama: Path) -> None:
    given = references()
    with opened(tiny_llama, "dtype=fp32") as engine:
        generated = engine.generate(given, GREEDY, PLAN)
        replayed = engine.teacher_force(forcings(given, generated), PLAN, "prefill")
    for one, other in zip(generated, replayed, strict=True):
        for phase in ("prefill", "decode"):
            left, right = one.phase(phase).tensors(), other.phase(phase).tensors()
            assert left.keys() == right.keys()
            for name in left:
                assert largest_gap(left[name], right[name]) < 2e-4, (phase, name)


@pytest.mark.parametrize("spec", ["dtype=bf16", "dtype=bf16,batch=3"])
def test_capture_changes_no_token(tiny_llama: Path, spec: str) -> None:
    given = references()
    plans = [
        PLAN,
        CapturePlan(layers=(), prefill_positions=0, decode_positions=1, top_k=1),
        CapturePlan(layers=("3",), prefill_positions=1000, full_logits=True),
    ]
    with opened(tiny_llama, spec) as engine:
        outputs = [[trace.output_ids for trace in engine.generate(given, GREEDY, plan)] for plan in plans]
        from fpforensics.common.engines.transformers_engine import TransformersEngine

        assert isinstance(engine, TransformersEngine)
        outputs.append([engine._running().generate(r, GREEDY, None).output_ids for r in given])
    for other in outputs[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(outputs[0], other, strict=True))


def test_deciding_rows_do_not_depend_on_what_else_is_captured(tiny_llama: Path) -> None:
    given = references(1)
    with opened(tiny_llama, "dtype=bf16") as engine:
        (many,) = engine.generate(given, GREEDY, CapturePlan(prefill_positions=9))
        (one,) = engine.generate(given, GREEDY, CapturePlan(prefill_positions=1))
    assert np.array_equal(many.prefill.logprobs[-1], one.prefill.logprobs[0])
    assert np.array_equal(many.decode.logprobs, one.decode.logprobs)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_tokens_follow_from_the_captured_logits(tiny_llama: Path, temperature: float) -> None:
    """Any verifier can choose each token again, in NumPy, from full log-probabilities."""
    sampling = Sampling(max_new_tokens=6, temperature=temperature, top_p=0.95, seed=11)
    (given,) = references(1)
    plan = CapturePlan(layers=(), prefill_positions=1, top_k=VOCAB)
    with opened(tiny_llama, "dtype=bf16") as engine:
        (trace,) = engine.generate([given], sampling, plan)
    rows = [trace.prefill, trace.decode]
    ids = np.concatenate([row.logprob_ids for row in rows])
    values = np.concatenate([row.logprobs for row in rows])
    assert len(ids) == 6
    for step, (row_ids, row_values) in enumerate(zip(ids, values, strict=True)):
        logprobs = np.empty(VOCAB, np.float32)
        logprobs[row_ids] = row_values
        assert choose(logprobs, sampling, given.id, step) == trace.output_ids[step]


def test_a_forcing_may_ask_for_fewer_rows_and_other_ids(tiny_llama: Path) -> None:
    given = references(1)
    with opened(tiny_llama, "dtype=bf16") as engine:
        (trace,) = engine.generate(given, GREEDY, PLAN)
        kept = trace.decode.positions[[1, 4]]
        asked = np.array([[7, 3], [500, 0]], np.int32)
        fewer = Forcing(given[0], trace.output_ids, {"decode": kept}, {"decode": asked})
        for mode in ("decode", "prefill"):
            (replay,) = engine.teacher_force([fewer], PLAN, mode)
            assert len(replay.prefill.positions) == 0
            assert np.array_equal(replay.decode.positions, kept)
            assert np.array_equal(replay.decode.logprob_ids, asked)
            if mode == "decode":
                for layer, rows in replay.decode.hidden_states.items():
                    assert np.array_equal(rows, trace.decode.hidden_states[layer][[1, 4]])
                assert np.array_equal(replay.decode.chosen_logprobs, trace.decode.chosen_logprobs[[1, 4]])


def test_forced_tokens_are_obeyed(tiny_llama: Path) -> None:
    """A replay of tokens that the model would not choose reports them as unlikely, and keeps them."""
    (given,) = references(1)
    with opened(tiny_llama, "dtype=fp32") as engine:
        (trace,) = engine.generate([given], GREEDY, PLAN)
        swapped = (trace.output_ids + 1) % VOCAB
        (forced,) = forcings([given], [trace])
        lie = Forcing(given, swapped, forced.positions, forced.claimed_ids)
        (replay,) = engine.teacher_force([lie], PLAN, "decode")
    assert np.array_equal(replay.output_ids, swapped)
    assert replay.decode.chosen_logprobs.mean() < trace.decode.chosen_logprobs.mean() - 1


def test_every_token_of_the_budget_comes_even_after_end_of_sequence(tiny_llama: Path) -> None:
    (given,) = references(1)
    with opened(tiny_llama, "dtype=bf16") as engine:
        (trace,) = engine.generate([given], Sampling(max_new_tokens=40, temperature=3.0), PLAN)
        assert trace.output_ids.shape == (40,) and trace.output_ids.dtype == np.int32
        (single,) = engine.generate([given], Sampling(max_new_tokens=1), PLAN)
    assert len(single.output_ids) == 1 and len(single.decode.positions) == 0


def test_decode_positions_of_the_plan(tiny_llama: Path) -> None:
    (given,) = references(1, length=10)
    with opened(tiny_llama, "dtype=bf16") as engine:
        (trace,) = engine.generate([given], GREEDY, CapturePlan(prefill_positions=3, decode_positions=2))
    assert trace.prefill.positions.tolist() == [7, 8, 9]
    assert trace.decode.positions.tolist() == [16, 17]


def test_progress_counts_references(tiny_llama: Path) -> None:
    seen: list[tuple[int, int]] = []
    with opened(tiny_llama, "dtype=bf16") as engine:
        engine.generate(references(3), Sampling(max_new_tokens=1), PLAN, lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("prompt", "output", "positions", "claimed", "said"),
    [
        ([], [1], [], [], "no prompt tokens"),
        ([1, 512], [1], [], [], "512 in the prompt"),
        ([1, -1], [1], [], [], "-1 in the prompt"),
        ([1, 2], [], [], [], "no output tokens"),
        ([1, 2], [600, 1], [], [], "600 in the output"),
        ([1, 2], [3, 4], [3], [[1]], "within 2 to 2"),
        ([1, 2], [3, 4, 5], [3, 2], [[1], [1]], "not increasing"),
        ([1, 2], [3, 4, 5], [2, 3], [[1]], "shape (1, 1)"),
        ([1, 2], [3, 4, 5], [2], [[9999]], "9999 in the claimed decode ids"),
    ],
)
def test_forcings_that_do_not_fit_are_refused(
    tiny_llama: Path, prompt: list[int], output: list[int], positions: list[int], claimed: list[list[int]], said: str
) -> None:
    forcing = Forcing(
        Reference("ref_0", np.array(prompt, np.int32)),
        np.array(output, np.int32),
        {"decode": np.array(positions, np.int32)},
        {"decode": np.array(claimed, np.int32).reshape(len(claimed), 1)},
    )
    with opened(tiny_llama, "dtype=bf16") as engine, pytest.raises(UsageError) as refused:
        engine.teacher_force([forcing], PLAN, "decode")
    assert said in refused.value.message


def test_a_closed_engine_says_so(tiny_llama: Path) -> None:
    with opened(tiny_llama, "dtype=bf16") as engine:
        pass
    with pytest.raises(ReplayError, match="closed"):
        engine.facts()
