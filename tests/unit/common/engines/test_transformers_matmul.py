"""``fp32-rounded``: each product is the float32 product, rounded once, wherever the model multiplies by a weight."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="pip install '.[hf]'")
transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_linear_layer_rounds_the_float32_product_once(bias: bool, dtype: torch.dtype) -> None:
    from fpforensics.common.engines.transformers_matmul import RoundedLinear

    torch.manual_seed(0)
    linear = torch.nn.Linear(96, 40, bias=bias).to(dtype)
    x = torch.randn(3, 7, 96).to(dtype)
    exact = x.double() @ linear.weight.double().T + (linear.bias.double() if bias else 0)
    with torch.inference_mode():
        ours = RoundedLinear(linear, dtype)(x)
    assert ours.dtype == dtype
    # one rounding: at most half a unit in the last place, and the float32 sum's own error beside it
    unit = torch.finfo(dtype).eps * exact.abs().clamp_min(torch.finfo(dtype).tiny)
    assert ((ours.double() - exact).abs() <= 0.5 * unit + 1e-5).all()


@pytest.mark.parametrize(("kind", "products"), [("tiny_llama", 29), ("tiny_qwen3_moe", 25)])
def test_every_product_of_a_model_is_replaced(kind: str, products: int, request: pytest.FixtureRequest) -> None:
    """With all products in float32, only elementwise operations and attention may still multiply in bf16."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from fpforensics.common.engines.transformers_matmul import round_products

    path: Path = request.getfixturevalue(kind)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, attn_implementation="sdpa", experts_implementation="eager", use_safetensors=True
    ).eval()
    assert round_products(model, torch.bfloat16) == products
    weights = {p.shape[-1] for p in model.parameters()}
    native: list[str] = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func.overloadpacket.__name__ in ("mm", "addmm", "linear", "_grouped_mm") and any(
                isinstance(a, torch.Tensor) and a.dtype == torch.bfloat16 and a.shape[-1] in weights for a in args
            ):
                native.append(str(func))
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Products():
        logits = model(torch.arange(12)[None]).logits
    assert native == []
    assert logits.dtype == torch.bfloat16
