"""A prover that lies on request: it runs one thing and signs a bundle that declares another.

As a program (``python lying_prover.py SPEC.json``) it makes many bundles in one process, under whatever kernels its
environment chooses.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import numpy as np

from fpforensics.common.bundle import BundleWriter
from fpforensics.common.config import ExecutionConfig, config_id, parse_config
from fpforensics.common.engines import in_process
from fpforensics.common.engines.base import Host
from fpforensics.common.environment import describe_environment
from fpforensics.common.evidence import Evidence, Repetitions, Row
from fpforensics.common.keys import load_private
from fpforensics.common.models import load_tokenizer, resolve_model
from fpforensics.common.prompts import build_references, read_documents
from fpforensics.common.signals import CapturePlan, Reference, Sampling


class Lie(msgspec.Struct, frozen=True):
    """What ran, what the bundle declares (config specs), and whether it shows other prompts than those that ran."""

    name: str
    ran: str
    declared: str
    other_prompt: bool = False


class Orders(msgspec.Struct, frozen=True):
    """Which bundles to make, where, signed by which key; ``skip`` leaves out the first prompts, for others that were not seen."""

    folder: str
    key: str
    models: dict[str, str]
    lies: list[Lie]
    capture: CapturePlan
    sampling: Sampling
    references: int
    prompt_tokens: int
    skip: int = 0


def make_bundles(orders: Orders) -> None:
    """Write ``<name>.msgpack`` for each lie. The model's facts are copied from what an honest prover would state."""
    host = Host(device="cpu", models=orders.models)
    base = ExecutionConfig(model=next(iter(orders.models)))
    tokenizer = load_tokenizer(resolve_model(base.model, models=host.models).path)
    references = build_references(
        read_documents(["builtin"]),
        tokenizer,
        count=orders.skip + orders.references,
        prompt_tokens=orders.prompt_tokens,
    )[orders.skip :]
    for lie in orders.lies:
        _make_bundle(orders, lie, base, host, references)


def _make_bundle(orders: Orders, lie: Lie, base: ExecutionConfig, host: Host, references: Sequence[Reference]) -> None:
    ran, declared = parse_config(lie.ran, base), parse_config(lie.declared, base)
    with in_process(ran, host, lambda: False) as engine:
        traces = engine.generate(references, orders.sampling, orders.capture)
        facts = engine.facts()
    if ran.model != declared.model:
        with in_process(declared, host, lambda: False) as engine:
            facts = engine.facts()
    shown = references
    if lie.other_prompt:
        shown = [Reference(each.id, np.ascontiguousarray(each.prompt_ids[::-1]), each.source) for each in references]
    with BundleWriter(Path(orders.folder) / f"{lie.name}.msgpack") as writer:
        entries = tuple(writer.add_reference(reference) for reference in shown)
        row = Row(
            config_id=config_id(declared, base),
            config=msgspec.structs.replace(declared, weights_digest=facts.model.weights_digest),
            facts=facts,
            repetitions=Repetitions(count=1, bit_identical=True, wall_seconds=(1.0,), wall_mean=1.0, wall_variance=0.0),
            traces=tuple(writer.add_trace(trace) for trace in traces),
        )
        evidence = Evidence(
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            session_id="00" * 16,
            nonce="",
            tool_version="0",
            environment=describe_environment(),
            capture=orders.capture,
            sampling=orders.sampling,
            references=entries,
            rows=(row,),
        )
        writer.finish(evidence, load_private(Path(orders.key)))


if __name__ == "__main__":
    make_bundles(msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Orders))
