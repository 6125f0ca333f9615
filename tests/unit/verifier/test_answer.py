"""Whether a bundle answers what was asked, where the model is shallower than the layers that were asked for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from rpc_world import OUTPUT, PROVER_KEY, TOP, write_bundle

from fpforensics.common.config import ExecutionConfig
from fpforensics.common.errors import EvidenceError
from fpforensics.common.keys import Keyring
from fpforensics.common.signals import CapturePlan, Sampling
from fpforensics.prover.session import SessionPlan
from fpforensics.verifier.answer import require_as_asked
from fpforensics.verifier.intake import open_bundle


def test_only_layers_that_nobody_named_may_be_left_out(tmp_path: Path) -> None:
    capture = CapturePlan(layers=("1", "4"), prefill_positions=2, top_k=TOP)
    plan = SessionPlan(
        configs=(ExecutionConfig(),),
        references=1,
        capture=capture,
        sampling=Sampling(max_new_tokens=OUTPUT),
        repetitions=1,
    )
    write_bundle(tmp_path / "bundle")  # a model of two blocks, of which it holds the first
    with open_bundle(tmp_path / "bundle", Keyring([PROVER_KEY.public])) as bundle:
        answer: Any = SimpleNamespace(evidence=msgspec.structs.replace(bundle.evidence, capture=capture))
    require_as_asked(answer, plan)
    with pytest.raises(EvidenceError, match="layers of prefill hidden_states"):
        require_as_asked(answer, msgspec.structs.replace(plan, layers_named=True))


def test_references_keep_the_names_that_their_noise_depends_on(tmp_path: Path) -> None:
    capture = CapturePlan(layers=("1",), prefill_positions=2, top_k=TOP)
    write_bundle(tmp_path / "bundle")
    with open_bundle(tmp_path / "bundle", Keyring([PROVER_KEY.public])) as bundle:
        evidence = msgspec.structs.replace(bundle.evidence, capture=capture)
    plan = SessionPlan(
        configs=(ExecutionConfig(),),
        references=1,
        capture=capture,
        sampling=Sampling(max_new_tokens=OUTPUT),
        repetitions=1,
    )
    honest: Any = SimpleNamespace(evidence=evidence)
    require_as_asked(honest, plan)
    renamed = msgspec.structs.replace(evidence.references[0], id="ref_0-17")
    answer: Any = SimpleNamespace(evidence=msgspec.structs.replace(evidence, references=(renamed,)))
    with pytest.raises(EvidenceError, match="names of references"):
        require_as_asked(answer, plan)
