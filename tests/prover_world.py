"""What tests of the prover's service share: a plan, and a stand-in for a session that runs a model."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from rpc_world import NONCE, write_bundle
from service_world import WIDE, Held

from fpforensics.common.config import ExecutionConfig
from fpforensics.common.engines.base import Host
from fpforensics.common.errors import (
    CancelledError,
    LimitError,
)
from fpforensics.common.keys import PrivateKey
from fpforensics.prover.client import ProverClient
from fpforensics.prover.session import SessionPlan, SessionProgress

PLAN = SessionPlan(configs=(ExecutionConfig(attention="eager"),), nonce=NONCE)
MODELS = ("smollm2-135m",)


class Runner(Held):
    """Stands where a session would run a model: writes a genuine bundle of synthetic numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.plans: list[SessionPlan] = []

    def __call__(
        self,
        plan: SessionPlan,
        host: Host,
        key: PrivateKey,
        output: Path,
        progress: Callable[[SessionProgress], None] | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> str:
        self.plans.append(plan)
        assert progress is not None
        progress(SessionProgress("repetition 1 of 1", 1, 1))
        (output.parent / "leftover").write_bytes(b"spooled")
        if self.error:
            raise self.error
        if self.is_cancelled(cancelled):
            raise CancelledError("cancelled")
        return write_bundle(output, key=key, nonce=plan.nonce, configs=plan.configs, width=WIDE)


def until_free(client: ProverClient, output: Path) -> None:
    """The lane is free once the cancelled work has ended, which may be a moment after it noticed."""
    for _ in range(200):
        try:
            client.run_session(PLAN, output)
        except LimitError:
            threading.Event().wait(0.02)
        else:
            return
    raise AssertionError("the prover stays busy")
