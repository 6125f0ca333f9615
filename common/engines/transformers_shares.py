"""Which products tensor parallelism splits over their inputs, and whether these divide; loads no weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from fpforensics.common.errors import UsageError
from fpforensics.common.models import IMPORTING
from fpforensics.common.weights import stored_tensors

SUMMED = frozenset({"rowwise", "rowwise_split_input", "rowwise_rep"})
"""Styles of a transformers tp_plan that split inputs, and so add partial products."""
ROW_PARALLEL_NAMES = ("o_proj", "down_proj")
"""What such products are called where a model has no plan."""


def share(width: int, ranks: int, name: str) -> int:
    """How many of a product's inputs each rank has. Raises :class:`UsageError` where they do not divide."""
    if width % ranks:
        raise UsageError(
            f"emulate_tp={ranks}: the {width} inputs of {name} cannot be split among {ranks} ranks",
            "use a number of ranks that divides them",
        )
    return width // ranks


def pattern(name: str) -> str:
    """``model.layers.3.mlp`` -> ``model.layers.*.mlp``, as plans write it."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def require_shares(path: Path, ranks: int) -> None:
    """Raise what loading the checkpoint in ``path`` would raise for inputs that ``ranks`` ranks cannot share.

    By the shapes in its files and the plan of its architecture. What is not known here is left to the loader: an architecture that
    transformers has not, and experts, which it fuses.
    """
    plan = _plan(path)
    for tensor in stored_tensors(path) if plan is not None else ():
        name, _, leaf = tensor.name.rpartition(".")
        if leaf == "weight" and len(tensor.shape) == 2 and _is_split(name, plan or {}):
            share(tensor.shape[1], ranks, name)


def _is_split(name: str, plan: Mapping[str, str]) -> bool:
    if not plan:
        return name.rpartition(".")[2] in ROW_PARALLEL_NAMES
    return any(pattern(name).endswith(f".{key}") for key, style in plan.items() if style in SUMMED)


def _plan(path: Path) -> Mapping[str, str] | None:
    """The architecture's own; empty where it has none, None where nobody here knows the architecture, or its config."""
    try:
        with IMPORTING:
            from transformers import AutoConfig

        architecture = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        return getattr(architecture.get_text_config(), "base_model_tp_plan", None) or {}
    except Exception:  # whatever transformers makes of a strange config.json: the loader says what is wrong with it
        return None
