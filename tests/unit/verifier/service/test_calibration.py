"""A server decides by its operator's calibration, and a caller brings none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from rpc_world import VERIFIER_KEY
from small_profile import profile_bytes
from verifier_world import VERIFIERS, Checker

from fpforensics.common.errors import UsageError
from fpforensics.verifier.check import CheckPlan
from fpforensics.verifier.client import VerifierClient
from fpforensics.verifier.measured import open_profile
from fpforensics.verifier.service import VerifierConfig, serve_verifier

PROFILE = open_profile(profile_bytes(VERIFIER_KEY), VERIFIERS)


def test_checks_run_by_the_operators_profile(config: VerifierConfig, checker: Checker, bundle: Path) -> None:
    with (
        serve_verifier(replace(config, profile=PROFILE)) as server,
        VerifierClient(f"127.0.0.1:{server.port}") as client,
    ):
        client.check(client.submit_bundle(bundle).bundle_digest, CheckPlan(claim="quant=none"))
    assert [plan.profile for plan in checker.plans] == [PROFILE]


def test_a_caller_brings_no_profile(client: VerifierClient) -> None:
    with pytest.raises(UsageError, match="profile lab in a remote check"):
        client.check("sha256:" + "0" * 64, CheckPlan(profile=PROFILE))
