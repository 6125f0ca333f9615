"""Calibration for real: honest bundles from other kernels become a profile, and the profile passes the honest and catches lies.

The kernels of the prover are another process's; 299 prompts are the fewest with which anything can be rejected at 1 %.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import lying_prover
import msgspec
import pytest
from lying_prover import Lie, Orders

from fpforensics.common.engines import in_process
from fpforensics.common.engines.base import Host
from fpforensics.common.keys import Keyring, generate
from fpforensics.common.signals import CapturePlan, Sampling
from fpforensics.verifier.check import CheckPlan, CheckResult, check_bundle
from fpforensics.verifier.intake import open_bundle
from fpforensics.verifier.measured import load_profile

BIN = Path(sys.executable).parent
OTHER_KERNELS = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}
# Threads that spin while they wait would starve whatever shares these cores; no bit depends on it.
QUICK = {"GOMP_SPINCOUNT": "1000"}
ENOUGH = 299
pytestmark = pytest.mark.timeout(900)  # on a busy machine
LINEUP = ("attn=eager", "quant=bnb-nf4")
LIES = (
    Lie("four-bit", ran="quant=bnb-nf4", declared="quant=none"),
    Lie("eight-bit", ran="quant=torchao-int8", declared="quant=none"),
    Lie("other-model", ran="model=other", declared="model=tiny"),
)


def verifier(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / "verifier"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | QUICK)
    assert done.returncode == code, done.stderr + done.stdout
    return done


@pytest.fixture(scope="module")
def host(tiny_llama: Path, tiny_llama_other: Path) -> Host:
    return Host(device="cpu", models={"tiny": str(tiny_llama), "other": str(tiny_llama_other)})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, host: Host) -> Path:
    """``honest/honest.msgpack`` to calibrate on, and bundles of two prompts that it does not hold in ``fresh/``."""
    folder = tmp_path_factory.mktemp("calibrated")
    for name in ("prover", "verifier", "stranger"):
        generate(folder / f"{name}.key")
    honest = Lie("honest", ran="", declared="")
    for name, lies, count, skip in (("honest", [honest], ENOUGH, 0), ("fresh", [honest, *LIES], 2, ENOUGH)):
        (folder / name).mkdir()
        orders = Orders(
            folder=str(folder / name),
            key=str(folder / "prover.key"),
            models=host.models,
            lies=lies,
            capture=CapturePlan(layers=("1", "2", "4", "last"), prefill_positions=16, top_k=8),
            sampling=Sampling(max_new_tokens=1),
            references=count,
            prompt_tokens=12,
            skip=skip,
        )
        (folder / "orders.json").write_bytes(msgspec.json.encode(orders))
        command = [sys.executable, lying_prover.__file__, str(folder / "orders.json")]
        subprocess.run(command, check=True, env=os.environ | OTHER_KERNELS | QUICK)
    return folder


@pytest.fixture(scope="module")
def profile(folder: Path, host: Host) -> Path:
    """Calibrated by the command line."""
    done = verifier(
        "calibrate", folder / "honest/honest.msgpack", "--key", folder / "prover.key.pub", "--sign", folder / "verifier.key",
        "-o", folder / "profile.json", "--replay", "prefill", "--lineup", "attn=eager", "--model-path", f"tiny={host.models['tiny']}", "-q",
    )  # fmt: skip
    assert "attn=sdpa,dtype=bf16" in done.stdout and f"in {ENOUGH} of {ENOUGH} prompts" in done.stdout
    assert "!!" not in done.stdout
    assert done.stderr == ""
    return folder / "profile.json"


def check(folder: Path, host: Host, profile: Path, name: str, claim: str) -> CheckResult:
    loaded = load_profile(profile, Keyring.from_paths([folder / "verifier.key.pub"]))
    plan = CheckPlan(claim=claim, lineup=LINEUP, mode="prefill", profile=loaded)
    with open_bundle(folder / "fresh" / f"{name}.msgpack", Keyring.from_paths([folder / "prover.key.pub"])) as bundle:
        return check_bundle(bundle, plan, host, start=in_process)


def test_fresh_honest_evidence_passes(folder: Path, host: Host, profile: Path) -> None:
    result = check(folder, host, profile, "honest", "quant=none")
    (row,) = result.rows
    assert result.verdict == "CONSISTENT", row.reasons
    assert row.calibration == "profile"
    assert row.calibration_digest.startswith("sha256:")
    assert not any(score.bit_identical for score in row.scores)


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.name)
def test_a_lie_is_caught(folder: Path, host: Host, profile: Path, lie: Lie) -> None:
    claim = lie.declared if lie.declared and "model" not in lie.declared else "quant=none"
    (row,) = check(folder, host, profile, lie.name, claim).rows
    assert row.verdict == "INCONSISTENT", row.reasons
    assert row.calibration == "profile"
    assert row.p_value is not None and row.p_value <= 0.01


def test_evidence_of_these_kernels_is_not_judged_by_those(
    folder: Path, host: Host, profile: Path, tmp_path: Path
) -> None:
    """The same model, made here: bit-identical, and calibration has nothing to say; stated elsewhere, it says that it has not."""
    orders = msgspec.json.decode((folder / "orders.json").read_bytes(), type=Orders)
    (tmp_path / "fresh").mkdir()
    (tmp_path / "prover.key.pub").write_bytes((folder / "prover.key.pub").read_bytes())
    (tmp_path / "verifier.key.pub").write_bytes((folder / "verifier.key.pub").read_bytes())
    lying_prover.make_bundles(msgspec.structs.replace(orders, folder=str(tmp_path / "fresh"), lies=[LIES[1]]))
    (row,) = check(tmp_path, host, profile, LIES[1].name, "quant=none").rows
    assert "profile profile does not cover this: prover hardware " in " ".join(row.reasons)
    assert row.calibration != "profile"


def test_a_profile_is_believed_only_from_a_key_that_was_named(folder: Path, profile: Path, host: Host) -> None:
    bundle = (folder / "fresh/honest.msgpack", "--key", folder / "prover.key.pub")
    unsigned = folder / "unsigned.json"
    envelope = json.loads(profile.read_bytes())
    unsigned.write_text(json.dumps(envelope | {"signatures": []}))
    forged = folder / "forged.json"
    forged.write_text(json.dumps(envelope | {"payload": envelope["payload"][:-8] + "AAAAAAA="}))
    for path, key in ((profile, "stranger"), (unsigned, "verifier"), (forged, "verifier")):
        done = verifier("check", *bundle, "--profile", path, "--profile-key", folder / f"{key}.key.pub", code=4)
        assert done.stderr.count("\n") == 1 and f"profile {path}: " in done.stderr
    done = verifier("check", *bundle, "--profile", profile, "--profile-key", folder / "prover.key.pub", code=2)
    assert "whoever is judged must not say what honest evidence is" in done.stderr
    done = verifier("check", *bundle, "--profile", profile, code=2)
    assert "--profile without --profile-key" in done.stderr
    shown = verifier("profile", profile, "--key", folder / "verifier.key.pub")
    assert "prefill/hidden_states/1" in shown.stdout
    verifier("profile", profile, "--key", folder / "stranger.key.pub", code=4)
    assert json.loads(verifier("profile", "--json").stdout)["name"] == "SmolLM2-135M, H100 and x86 CPU"
