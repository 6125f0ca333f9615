"""``emulate_tp``: row-parallel products are sums of rounded partial products, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from engine_runs import differences, forcings, largest_gap, references
from tiny_models import Kind, make_tiny_model

from fpforensics.common.config import config_id, parse_claim, parse_config
from fpforensics.common.engines import open_engine
from fpforensics.common.engines.base import EngineFacts, Host
from fpforensics.common.errors import Error, ReplayError, UsageError
from fpforensics.common.signals import CapturePlan, Forcing, Sampling, Trace

torch = pytest.importorskip("torch", reason="pip install '.[hf]'")
transformers = pytest.importorskip("transformers")

PLAN = CapturePlan(layers=("1", "2", "last"), prefill_positions=5, top_k=8)
GREEDY = Sampling(max_new_tokens=9)
Product = Callable[[Any, Any], Any]


def native(x: Any, weight: Any) -> Any:
    return torch.nn.functional.linear(x, weight)


def rounded(x: Any, weight: Any) -> Any:
    return (x.float() @ weight.float().T).to(x.dtype)


def run(path: Path, spec: str, forced: Sequence[Forcing] = ()) -> tuple[list[Trace], EngineFacts]:
    """Generate, or replay by decoding."""
    engine = open_engine(parse_config(f"model=tiny,{spec}"), Host(device="cpu", models={"tiny": str(path)}))
    try:
        traces = engine.teacher_force(forced, PLAN, "decode") if forced else engine.generate(references(), GREEDY, PLAN)
        return traces, engine.facts()
    finally:
        engine.close()


def split(model: Any, ranks: int, product: Product = native) -> int:
    """As the engine does it: first the split, then the path of products."""
    from fpforensics.common.engines.transformers_matmul import round_products
    from fpforensics.common.engines.transformers_tensor_parallel import split_products

    count = split_products(model, ranks)
    if product is rounded:
        round_products(model, torch.bfloat16)
    return count


def added(partials: Sequence[Any]) -> Any:
    """Rank after rank, exactly and then rounded: float64 holds the sum of two such numbers without error."""
    total = partials[0]
    for partial in partials[1:]:
        total = (total.double() + partial.double()).to(partial.dtype)
    return total


def columns(tensor: Any, rank: int, ranks: int) -> Any:
    """A rank's share of the last dimension."""
    width = tensor.shape[-1] // ranks
    return tensor[..., rank * width : (rank + 1) * width].contiguous()


@pytest.mark.parametrize("product", [native, rounded])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_a_linear_layer_adds_up_rounded_partial_products(product: Product, bias: bool, ranks: int) -> None:
    torch.manual_seed(0)
    holder = torch.nn.ModuleDict({"o_proj": torch.nn.Linear(96, 40, bias=bias)}).to(torch.bfloat16)
    weight, addend = holder["o_proj"].weight.detach().clone(), holder["o_proj"].bias
    x = torch.randn(3, 7, 96).to(torch.bfloat16)
    expected = added([product(columns(x, r, ranks), columns(weight, r, ranks)) for r in range(ranks)])
    if bias:
        expected = added([expected, addend.detach()])
    assert split(holder, ranks, product) == 1
    with torch.inference_mode():
        found = holder["o_proj"](x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)
    whole = x.double() @ weight.double().T + (addend.double() if bias else 0)
    assert torch.allclose(found.double(), whole, atol=0.02 * ranks)


@pytest.mark.parametrize("product", [native, rounded])
def test_fused_experts_add_up_their_ranks_outputs(tiny_qwen3_moe: Path, product: Product) -> None:
    """Each rank adds its share of a token's experts; then the ranks are added, once."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_qwen3_moe, dtype=torch.bfloat16, experts_implementation="eager", use_safetensors=True
    ).eval()
    block = model.model.layers[0].mlp
    gate_up, down = block.experts.gate_up_proj.detach(), block.experts.down_proj.detach()
    torch.manual_seed(0)
    x = torch.randn(6, 64).to(torch.bfloat16)
    chosen = torch.tensor([[0, 3], [1, 2], [2, 0], [3, 1], [0, 1], [2, 3]])
    weights = torch.rand(6, 2).to(torch.bfloat16)

    def share(rank: int) -> Any:
        outputs = torch.zeros_like(x)
        for expert in range(4):  # the order in which the model's own loop adds them
            tokens, which = torch.where(chosen == expert)
            halves = gate_up[expert].chunk(2)
            gate, up = (product(x[tokens], columns(half.T, rank, 2).T.contiguous()) for half in halves)
            partial = product(torch.nn.functional.silu(gate) * up, columns(down[expert], rank, 2))
            outputs[tokens] += partial * weights[tokens, which, None]
        return outputs

    assert split(model, 2, product) == 4 + 4
    with torch.inference_mode():
        assert torch.equal(block.experts(x, chosen, weights), added([share(0), share(1)]))


@pytest.mark.parametrize(("kind", "products"), [("tiny_llama", 8), ("tiny_qwen3", 8), ("tiny_qwen3_moe", 8)])
def test_row_parallel_products_are_split_and_no_others(
    kind: str, products: int, request: pytest.FixtureRequest
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(request.getfixturevalue(kind), dtype=torch.bfloat16)
    before = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert split(model, 2) == products
    whole = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)} & before
    assert {name.rpartition(".")[2] for name in before - whole} <= {"o_proj", "down_proj"}
    assert {name.rpartition(".")[2] for name in whole} <= {
        "q_proj",
        "k_proj",
        "v_proj",
        "gate_proj",
        "up_proj",
        "lm_head",
    }


def test_one_rank_is_no_emulation(tiny_llama: Path) -> None:
    plain, facts = run(tiny_llama, "attn=sdpa")
    one, _ = run(tiny_llama, "attn=sdpa,emulate_tp=1", forcings(references(), plain))
    assert differences(plain, one) == []
    assert "emulated_tensor_parallel" not in facts.numerics


@pytest.mark.parametrize(("dtype", "most"), [("bf16", 0.02), ("fp32", 1e-6)])
@pytest.mark.parametrize("matmul", ["native", "fp32-rounded"])
def test_two_ranks_differ_from_one_by_rounding(tiny_qwen3: Path, dtype: str, most: float, matmul: str) -> None:
    if matmul != "native" and dtype == "fp32":
        pytest.skip("rounds to bf16 or fp16")
    plain, _ = run(tiny_qwen3, f"dtype={dtype},matmul={matmul}")
    two, facts = run(tiny_qwen3, f"dtype={dtype},matmul={matmul},emulate_tp=2", forcings(references(), plain))
    assert len(differences(plain, two)) == len(plain)
    assert facts.numerics["emulated_tensor_parallel"] == f"2 partial sums in {dtype}"
    for one, other in zip(plain, two, strict=True):
        states, others = one.decode.hidden_states["1"], other.decode.hidden_states["1"]
        assert 0 < largest_gap(states, others) < most * largest_gap(states, 0 * states)


@pytest.mark.parametrize(
    "spec",
    [
        "emulate_tp=2",
        "emulate_tp=4,attn=eager,dtype=fp16",
        "emulate_tp=2,matmul=fp32-rounded",
        "emulate_tp=2,batch=3",
        pytest.param("emulate_tp=2,compile=true", marks=pytest.mark.slow),
        pytest.param("emulate_tp=2,compile=true,matmul=fp32-rounded", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_qwen3", "tiny_qwen3_moe"])
def test_a_decode_replay_is_bit_identical_to_generation(kind: str, spec: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(kind)
    generated, _ = run(path, spec)
    replayed, _ = run(path, spec, forcings(references(), generated))
    assert differences(generated, replayed) == []


@pytest.mark.slow
def test_compiled_sums_are_rounded_before_anything_else_is_added() -> None:
    """The control shows what the operator is for: sums that the compiler sees through are not rounded in between."""
    from fpforensics.common.engines.transformers_tensor_parallel import _sum_partials, sum_partials

    torch.manual_seed(0)
    *partials, bias, residual = [torch.randn(64, 512).to(torch.bfloat16) for _ in range(6)]
    expected = added([residual, added([*(part * 3 for part in partials), bias])])

    def block(add: Any) -> Any:
        return torch.compile(lambda parts: residual + add([part * 3 for part in parts], bias), dynamic=True)

    with torch.inference_mode():
        assert torch.equal(block(sum_partials)(partials), expected)
        assert not torch.equal(block(_sum_partials)(partials), expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen3", "qwen3_moe"])
def test_two_ranks_are_bit_identical_to_two_processes(kind: Kind, tmp_path: Path) -> None:
    """With more ranks an all-reduce adds in an order of its own, and rounding differs."""
    pytest.importorskip("transformers.distributed")
    from real_tensor_parallel import states_in_processes

    checkpoint = make_tiny_model(tmp_path / "model", kind)
    states = states_in_processes(2, checkpoint, tmp_path / "states.pt")
    for ranks in (1, 2):
        model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()
        if ranks > 1:
            split(model, ranks)
        with torch.inference_mode():
            found = model(torch.arange(24)[None] * 7 % 512, output_hidden_states=True)
        pairs = zip((*found.hidden_states, found.logits), states, strict=True)
        assert all(torch.equal(ours, real) for ours, real in pairs) == (ranks == 2)


def test_a_model_without_a_plan_is_split_by_names(tiny_llama: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    model._tp_plan = {}
    assert split(model, 2) == 8


@pytest.mark.parametrize(
    ("spec", "kind", "said"),
    [
        ("emulate_tp=2,tp=2", UsageError, "tp=2 does not combine with emulate_tp=2"),
        ("tp=2", UsageError, "emulate_tp=2 for the partial sums of 2 ranks"),
        ("emulate_tp=2,quant=bnb-nf4", UsageError, "emulate_tp=2 does not combine with quant=bnb-nf4"),
        ("emulate_tp=2,quant=gptq", UsageError, "does not combine with quant=gptq"),
        ("emulate_tp=2,backend=vllm", UsageError, "emulate_tp=2 needs backend=transformers"),
        ("emulate_tp=3", UsageError, "cannot be split among 3"),
    ],
)
def test_what_cannot_be_emulated_says_why(tiny_llama: Path, spec: str, kind: type[Error], said: str) -> None:
    with pytest.raises(kind) as refused:
        run(tiny_llama, spec)
    assert said in refused.value.diagnostics()
    assert "\n" not in refused.value.diagnostics()


def test_a_width_that_does_not_divide_is_named(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path / "model", "llama", intermediate_size=98)
    with pytest.raises(UsageError, match=r"the 98 inputs of model\.layers\.0\.mlp\.down_proj cannot be split among 4"):
        run(path, "emulate_tp=4")


def planned(style: str, module: Any) -> Any:
    model = torch.nn.ModuleDict({"part": module})
    model.tp_plan = {"part": style}
    return model


class TransposedExperts(torch.nn.Module):  # type: ignore[misc]
    is_transposed = True

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = torch.nn.Parameter(torch.zeros(2, 8, 8))
        self.down_proj = torch.nn.Parameter(torch.zeros(2, 4, 8))


class BareWeights(torch.nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.down_proj = torch.nn.Parameter(torch.zeros(2, 4, 8))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (torch.nn.ModuleDict({"up_proj": torch.nn.Linear(4, 4)}), "has no row-parallel products that are known"),
        (
            torch.nn.ModuleDict({"experts": BareWeights()}),
            "cannot split experts: ModuleDict has no plan for BareWeights",
        ),
        (planned("packed_rowwise", torch.nn.Linear(4, 4)), "cannot split part: Linear is split as packed_rowwise"),
        (planned("rowwise", torch.nn.Conv1d(4, 4, 1)), "cannot split part: Conv1d is no linear layer"),
        (planned("moe_tp_experts", torch.nn.Identity()), "cannot split part: Identity holds no weights"),
        (planned("moe_tp_experts", BareWeights()), "BareWeights holds down_proj"),
        (planned("moe_tp_experts", TransposedExperts()), "holds down_proj, gate_up_proj, is_transposed=True"),
    ],
)
def test_nothing_is_emulated_by_half(model: Any, said: str) -> None:
    with pytest.raises(ReplayError) as refused:
        split(model, 2)
    assert said in refused.value.message


def test_the_option_is_part_of_configs_claims_and_names() -> None:
    config = parse_config("emulate_tp=2")
    assert config.emulate_tensor_parallel == 2
    assert config_id(config) == "emulate_tp=2"
    assert parse_claim("emulate_tp=2").holds_for(config)
    assert not parse_claim("emulate_tp=1").holds_for(config)
    assert not parse_claim("tp=2").holds_for(config)
    with pytest.raises(UsageError, match="emulate_tp='0' is not a whole number"):
        parse_config("emulate_tp=0")
