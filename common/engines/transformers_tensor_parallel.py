"""``emulate_tensor_parallel``: the partial sums of tensor parallelism, on one device.

Tensor parallelism as Megatron-LM does it (Shoeybi et al. 2019, arXiv:1909.08053, section 3) splits row-parallel
products (attention output, MLP down projections) over their inputs: each rank rounds its partial product to the
compute dtype, and an all-reduce adds the partials in that dtype. That is what is emulated. Column-parallel products
(q, k, v, gate, up) only share out their outputs, and are computed whole.

Not emulated: the order of an all-reduce (ranks are added in order, which for two ranks is every order), libraries
that add in float32 and round once, and kernels that are chosen by the size of a rank's share.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fpforensics.common.engines.transformers_shares import ROW_PARALLEL_NAMES, SUMMED, pattern, share
from fpforensics.common.errors import ReplayError

# Styles of a transformers tp_plan. Fused experts, whose outputs are added once, after each rank has added up its tokens' experts:
_EXPERTS = "moe_tp_experts"
# Those that change no output's own sum:
_UNCHANGED = frozenset(
    {
        "colwise",
        "colwise_rep",
        "colwise_gather_output",
        "packed_colwise",
        "embedding_rowwise",
        "mla_kv_a_proj",
        "replicated_with_grad_allreduce",
    }
)


def split_products(model: nn.Module, ranks: int) -> int:
    """Replace every row-parallel product of ``model`` in place by ``ranks`` partial ones; returns how many modules.

    Which they are is what the model's own ``tp_plan`` says, or else the names ``o_proj`` and ``down_proj``. The
    partial products are linear layers again: another path of products may be given to them afterwards.

    Raises :class:`UsageError` where widths do not divide, :class:`ReplayError` where a part of the model would have
    to be left as it is.
    """
    plan: Mapping[str, str] = getattr(model, "tp_plan", None) or {}
    modules = list(model.named_modules())
    count = 0
    for name, module in modules:
        split = _split_as_planned(name, module, plan, ranks)
        if split is not None:
            _replace(model, name, split)
            count += 1
    return count or _split_by_name(model, modules, ranks)


class PartialSumLinear(nn.Module):
    """``y = round(... round(round(x_0 @ W_0.T) + round(x_1 @ W_1.T)) + ...)``, then the bias, each rounded to the dtype.

    ``x_r`` and ``W_r`` are equal slices along the inputs, one for each rank.
    """

    def __init__(self, name: str, linear: nn.Linear, ranks: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._share = share(linear.in_features, ranks, name)
        self.ranks = nn.ModuleList(_linear(part) for part in linear.weight.detach().split(self._share, dim=1))
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features), both in the compute dtype."""
        shares = x.split(self._share, dim=-1)
        partials = [rank(share.contiguous()) for rank, share in zip(self.ranks, shares, strict=True)]
        return sum_partials(partials, self.bias)


class PartialSumExperts(nn.Module):
    """Fused experts, one copy for each rank with its share of every expert; the ranks' outputs are added."""

    def __init__(self, name: str, experts: nn.Module, ranks: int) -> None:
        super().__init__()
        gate_up_EGH, down_EHI = _fused_weights(name, experts)  # noqa: N806
        width = share(down_EHI.shape[2], ranks, name)
        gates_EIH, ups_EIH = (half.split(width, dim=1) for half in gate_up_EGH.detach().chunk(2, dim=1))  # noqa: N806
        downs_EHI = down_EHI.detach().split(width, dim=2)  # noqa: N806
        self.ranks = nn.ModuleList()
        for gate, up, down in zip(gates_EIH, ups_EIH, downs_EHI, strict=True):
            shared = {id(experts.config): experts.config} if hasattr(experts, "config") else {}
            weights = {id(gate_up_EGH): _parameter(torch.cat([gate, up], dim=1)), id(down_EHI): _parameter(down)}
            self.ranks.append(copy.deepcopy(experts, shared | weights))

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As the experts that were split."""
        return sum_partials([rank(*args, **kwargs) for rank in self.ranks], None)


def _sum_partials(partials: Sequence[torch.Tensor], bias: torch.Tensor | None) -> torch.Tensor:
    total = partials[0].clone()
    for addend in (*partials[1:], *([] if bias is None else [bias])):
        total += addend
    return total


# An operator of its own, opaque to torch.compile as an all-reduce is: fused with what follows, the sums would be kept
# in float32.
sum_partials = torch.library.custom_op(
    "fpforensics::sum_partials", _sum_partials, mutates_args=(), schema="(Tensor[] partials, Tensor? bias) -> Tensor"
)
sum_partials.register_fake(lambda partials, bias: torch.empty_like(partials[0]))


def _split_as_planned(name: str, module: nn.Module, plan: Mapping[str, str], ranks: int) -> nn.Module | None:
    """What replaces a module, or None for one that is computed whole."""
    style = plan.get(pattern(name))
    bare = {plan.get(pattern(f"{name}.{leaf}")) for leaf, _ in module.named_parameters(recurse=False)}
    unknown = ({style} | bare) - SUMMED - _UNCHANGED - {None, _EXPERTS}
    if unknown:
        raise _unsplit(name, f"{type(module).__name__} is split as {', '.join(sorted(map(str, unknown)))}")
    if style == _EXPERTS or bare & SUMMED:
        return PartialSumExperts(name, module, ranks)
    if style not in SUMMED or isinstance(module, nn.Embedding):  # rows of an embedding are looked up, not added
        return None
    if not isinstance(module, nn.Linear):
        raise _unsplit(name, f"{type(module).__name__} is no linear layer")
    return PartialSumLinear(name, module, ranks)


def _split_by_name(model: nn.Module, modules: Sequence[tuple[str, nn.Module]], ranks: int) -> int:
    for name, module in modules:
        if any(weights.ndim > 2 for weights in module.parameters(recurse=False)):
            raise _unsplit(name, f"{type(model).__name__} has no plan for {type(module).__name__}")
    found = [
        (name, module)
        for name, module in modules
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in ROW_PARALLEL_NAMES
    ]
    if not found:
        raise ReplayError(
            f"emulate_tp={ranks}: {type(model).__name__} has no row-parallel products that are known",
            f"its tp_plan names none, and no linear layer is called {' or '.join(ROW_PARALLEL_NAMES)}",
        )
    for name, module in found:
        _replace(model, name, PartialSumLinear(name, module, ranks))
    return len(found)


def _fused_weights(name: str, experts: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    """(experts, 2 * I, H) gate and up, one after the other, and (experts, H, I) down."""
    found = dict(experts.named_parameters())
    odd = [
        what
        for what, usual in (
            ("is_transposed", False),
            ("has_bias", False),
            ("is_concatenated", True),
            ("has_gate", True),
        )
        if getattr(experts, what, usual) != usual
    ]
    if found.keys() != {"gate_up_proj", "down_proj"} or odd:
        held = ", ".join([*sorted(found), *(f"{what}={getattr(experts, what)}" for what in odd)])
        raise _unsplit(name, f"{type(experts).__name__} holds {held[:120] or 'no weights'}")
    gate_up, down = found["gate_up_proj"], found["down_proj"]
    if gate_up.ndim != 3 or down.ndim != 3 or gate_up.shape[1:] != (2 * down.shape[2], down.shape[1]):
        raise _unsplit(name, f"{type(experts).__name__} has weights {tuple(gate_up.shape)} and {tuple(down.shape)}")
    return gate_up, down


def _linear(weight: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = _parameter(weight)
    return linear


def _parameter(weight: torch.Tensor) -> nn.Parameter:
    """Laid out in memory as on a rank that holds nothing else."""
    return nn.Parameter(weight.clone(memory_format=torch.contiguous_format), requires_grad=False)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _unsplit(name: str, why: str) -> ReplayError:
    return ReplayError(
        f"emulate_tp cannot split {name}: {why}", "use emulate_tp=1, or a model whose parts are all known"
    )
