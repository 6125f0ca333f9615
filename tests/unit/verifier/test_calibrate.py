"""Calibration on drawn platforms: its own honest evidence passes, a lie is caught, and it speaks for nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import drawn_world
import msgspec
import pytest

from fpforensics.common import envelope
from fpforensics.common.config import ExecutionConfig, parse_config
from fpforensics.common.engines.base import EngineFacts, Host
from fpforensics.common.errors import Error, EvidenceError, UsageError
from fpforensics.common.keys import Keyring, PrivateKey
from fpforensics.verifier.calibrate import Calibration, calibrate
from fpforensics.verifier.check import CheckPlan, CheckResult, check_bundle
from fpforensics.verifier.coverage import enough_prompts, too_few
from fpforensics.verifier.intake import open_bundle
from fpforensics.verifier.measured import Measured, MeasuredProfile, open_profile, sign_profile
from fpforensics.verifier.profile import built_in_digest, built_in_profile
from fpforensics.verifier.report.profile_text import render_built_in, render_measured

PROVER, VERIFIER = PrivateKey.from_seed(b"p" * 32), PrivateKey.from_seed(b"v" * 32)
TRUSTED = Keyring([PROVER.public])
SDPA = ExecutionConfig(model="tiny")
EAGER = parse_config("attn=eager", SDPA)
LINEUP = ("attn=eager", "attn=sdpa")
PLAN = CheckPlan(lineup=LINEUP, mode="prefill")
ENOUGH = 299


@pytest.fixture(scope="module", autouse=True)
def drawn_numbers_are_no_distributions() -> Iterator[None]:
    """So they contradict themselves, which is not what is tested here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fpforensics.verifier.check.require_coherent", lambda *_: None)
        yield


@dataclass(frozen=True)
class World:
    """Where bundles lie, and the profile that most tests use."""

    folder: Path
    checkpoint: Path
    host: Host
    made: Calibration
    profile: MeasuredProfile

    def bundle(self, name: str, *rows: tuple[ExecutionConfig, ExecutionConfig], count: int = 2, start: int = 5000, **how: object) -> Path:  # fmt: skip
        prompts = drawn_world.references(count, start)
        return drawn_world.write_bundle(self.folder / name, PROVER, self.checkpoint, prompts, *rows, **how)  # type: ignore[arg-type]

    def calibrate(self, *paths: Path, plan: CheckPlan = PLAN) -> Calibration:
        return calibrate(paths, TRUSTED, plan, self.host, "a lab", start=drawn_world.starter(self.checkpoint))  # type: ignore[arg-type]

    def check(self, path: Path, profile: MeasuredProfile | None, plan: CheckPlan = PLAN) -> CheckResult:
        plan = msgspec.structs.replace(plan, profile=profile)
        with open_bundle(path, TRUSTED) as bundle:
            return check_bundle(bundle, plan, self.host, start=drawn_world.starter(self.checkpoint))  # type: ignore[arg-type]


def signed(made: Calibration) -> MeasuredProfile:
    return open_profile(
        envelope.to_json(sign_profile(made.content, made.bundles, VERIFIER)), Keyring([VERIFIER.public])
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> World:
    """A profile of 299 prompts: the fewest with which anything can be rejected at 1 %."""
    folder = tmp_path_factory.mktemp("calibrated")
    host = Host(device="cpu", models={"tiny": str(tiny_llama)})
    prompts = drawn_world.references(ENOUGH)
    path = drawn_world.write_bundle(folder / "honest", PROVER, tiny_llama, prompts, (SDPA, SDPA), (EAGER, EAGER))
    made = calibrate([path], TRUSTED, PLAN, host, "a lab", start=drawn_world.starter(tiny_llama))  # type: ignore[arg-type]
    return World(folder, tiny_llama, host, made, signed(made))


def said(result: CheckResult) -> str:
    return " | ".join(result.rows[0].reasons)


@pytest.mark.parametrize("config", [SDPA, EAGER])
def test_an_honest_bundle_passes_under_its_own_profile(world: World, config: ExecutionConfig) -> None:
    result = world.check(world.bundle("fresh", (config, config)), world.profile)
    row = result.rows[0]
    assert result.verdict == "CONSISTENT", row
    assert (row.calibration, row.calibration_digest) == ("a lab", world.profile.digest)
    assert row.p_value is not None and row.p_value > 0.01
    assert "extrapolation" not in said(result) and "not calibrated" not in said(result)


@pytest.mark.parametrize(
    ("declared", "ran", "how"),
    [(SDPA, EAGER, {}), (EAGER, SDPA, {}), (SDPA, parse_config("quant=bnb-nf4", SDPA), {}), (SDPA, SDPA, {"model": "another"})],
)  # fmt: skip
def test_a_changed_bundle_is_caught_under_the_same_profile(
    world: World, declared: ExecutionConfig, ran: ExecutionConfig, how: dict[str, str]
) -> None:
    result = world.check(world.bundle("lie", (declared, ran), **how), world.profile)
    assert result.verdict == "INCONSISTENT", result.rows
    assert result.rows[0].calibration_digest == world.profile.digest


def test_it_says_what_was_measured(world: World) -> None:
    sdpa, eager = world.profile.content.measured
    assert (sdpa.prompts, sdpa.decode_share, sdpa.prompt_tokens) == (ENOUGH, 0.0, (20, 20))
    assert [pool.positions for pool in sdpa.pools] == [1, 3, 16]
    assert all((pool.prompts, pool.noise_prompts) == (ENOUGH, ENOUGH) for pool in sdpa.pools)
    assert sdpa.rivals == ("dtype=fp32", "attn=eager") and eager.rivals == ("dtype=fp32", "attn=sdpa,dtype=bf16")
    assert sdpa.nearest == ENOUGH
    assert sdpa.scope.prover.hardware.startswith("elsewhere, AVX2")
    assert "AVX512" in sdpa.scope.verifier.hardware
    cells = {str(cell.cell): cell for cell in sdpa.cells}
    assert len(cells) == 7
    # drawn: sqrt(2) * 0.003 from the replay, sqrt(0.009² + 0.003²) from the anchor
    assert cells["prefill/hidden_states/2"].quantiles[3] == pytest.approx(0.447, abs=0.01)
    assert list(cells["prefill/key_vectors/4"].quantiles) == sorted(cells["prefill/key_vectors/4"].quantiles)
    with open_bundle(world.folder / "honest", TRUSTED) as bundle:
        assert world.profile.bundles == (bundle.digest.removeprefix("sha256:"),)
    shown = render_measured(world.profile)
    assert "prefill/hidden_states/1" in shown and "in 299 of 299 prompts" in shown and "!!" not in shown
    assert "prefill/hidden_states/1" not in render_measured(world.profile, brief=True)
    assert "SmolLM2-135M" in render_built_in(built_in_profile()) and built_in_digest() in render_built_in(
        built_in_profile()
    )


def test_too_few_prompts_are_said_and_reject_nothing(world: World) -> None:
    few = signed(world.calibrate(world.bundle("few", (SDPA, SDPA), (EAGER, EAGER), count=12)))
    told = (
        "12 calibration prompts: p cannot go below 0.077 in one lane, 0.23 over all 3, so nothing can be rejected at "
        "α = 0.01 by this profile; calibrate with at least 299 prompts"
    )
    assert render_measured(few, brief=True).count(told) == 2
    result = world.check(world.bundle("lie", (SDPA, EAGER)), few)
    assert result.verdict == "INCONCLUSIVE"
    assert told in said(result)
    result = world.check(world.bundle("fresh", (SDPA, SDPA), start=9000), few)
    assert result.verdict == "INCONCLUSIVE" and told in said(result)


def test_how_many_prompts_it_takes() -> None:
    assert enough_prompts() == ENOUGH
    assert too_few(ENOUGH) == "" and too_few(ENOUGH - 1)
    assert enough_prompts(0.05) == 59 and too_few(59, 0.05) == ""


def changed(
    profile: MeasuredProfile, change: Callable[[Measured], Measured], made: Callable[..., Calibration] | None = None
) -> MeasuredProfile:
    content = msgspec.structs.replace(profile.content, measured=tuple(map(change, profile.content.measured)))
    return MeasuredProfile(content, profile.bundles, profile.signer, profile.digest)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("prover", {"hardware": "another CPU"}, "where another CPU was measured"),
        ("verifier", {"hardware": "another GPU"}, "verifier hardware Intel"),
        ("mode", "decode", "replay mode prefill where decode was measured"),
        ("matmul", "fp32-rounded", "replay's products native where fp32-rounded was measured"),
        ("config", {"weights_digest": "sha256:" + "0" * 64}, "model tiny (b"),
        ("config", {"batch_size": 2}, "config attn=sdpa,dtype=bf16 where batch=2 was measured"),
        ("config", {"emulate_tensor_parallel": 2}, "where emulate_tp=2 was measured"),
    ],
)
def test_a_profile_of_another_scope_is_not_used_and_that_is_said(
    world: World, field: str, value: object, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def elsewhere(each: Measured) -> Measured:
        old = getattr(each.scope, field)
        new = msgspec.structs.replace(old, **value) if isinstance(value, dict) else value
        return msgspec.structs.replace(each, scope=msgspec.structs.replace(each.scope, **{field: new}))

    result = world.check(world.bundle("fresh", (SDPA, SDPA)), changed(world.profile, elsewhere))
    row = result.rows[0]
    if "Intel" in told:
        told = "verifier hardware "
    if told == "model tiny (b":
        told = "where tiny (000000000000) was measured"
    assert told in said(result), row.reasons
    assert "profile a lab does not cover this: " in said(result)
    assert f"; {built_in_profile().name} decided" in said(result)
    assert (row.calibration, row.calibration_digest) == (built_in_profile().name, built_in_digest())


def test_another_name_for_the_same_weights_is_the_same_model(world: World) -> None:
    host = msgspec.structs.replace(world.host, models={"renamed": str(world.checkpoint)})
    renamed = ExecutionConfig(model="renamed")
    path = world.bundle("renamed", (renamed, renamed))
    with open_bundle(path, TRUSTED) as bundle:
        plan = msgspec.structs.replace(PLAN, profile=world.profile)
        result = check_bundle(bundle, plan, host, start=drawn_world.starter(world.checkpoint))  # type: ignore[arg-type]
    assert result.rows[0].calibration == "a lab"


def test_another_mixture_of_positions_is_not_covered(world: World) -> None:
    result = world.check(world.bundle("long", (SDPA, SDPA), output=9), world.profile)
    assert "33% of the positions are generated ones where 0% were measured" in said(result)
    assert "did not measure" in said(result) and "generated positions" in said(result)
    mixed = signed(world.calibrate(world.bundle("mixed", (SDPA, SDPA), count=6, start=100, output=9)))
    (entry,) = mixed.content.measured
    assert entry.decode_share == pytest.approx(1 / 3, abs=1e-3)
    assert [pool.positions for pool in entry.pools] == [1, 3, 16, 24]
    assert {phase: [pool.positions for pool in pools] for phase, pools in entry.phases.items()} == {
        "prefill": [1, 3, 16],
        "decode": [1, 3, 8],
    }
    assert "does not cover" not in said(world.check(world.bundle("long", (SDPA, SDPA), output=9), mixed))


def test_other_threads_and_versions_are_said(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    real = drawn_world.facts

    def updated(*arguments: object) -> EngineFacts:
        return msgspec.structs.replace(real(*arguments), versions={"torch": "9.9"})  # type: ignore[arg-type]

    monkeypatch.setattr(drawn_world, "facts", updated)
    result = world.check(world.bundle("fresh", (SDPA, SDPA)), world.profile)
    assert result.rows[0].calibration == "a lab"
    assert "calibrated under other conditions: prover's torch 9.9 where 2.13.0 was measured" in said(result)


def test_a_rival_that_was_not_calibrated_against_does_not_accuse(world: World) -> None:
    plan = msgspec.structs.replace(PLAN, lineup=(*LINEUP, "dtype=fp16"))
    result = world.check(world.bundle("fresh", (SDPA, SDPA)), world.profile, plan)
    assert "not in the calibration's lineup, so no rivals of attn=sdpa,dtype=bf16: dtype=fp16" in said(result)
    assert f"not calibrated, so held against {built_in_profile().name}: dtype=fp16" in said(result)
    assert result.verdict != "INCONSISTENT"


def test_without_a_profile_the_built_in_one_says_where_it_extrapolates(world: World) -> None:
    result = world.check(world.bundle("fresh", (SDPA, SDPA)), None)
    assert result.rows[0].calibration == built_in_profile().name
    assert "the error rate is an extrapolation: SmolLM2-135M, H100 and x86 CPU did not measure model tiny" in said(
        result
    )


def test_bit_identical_evidence_needs_no_profile(world: World) -> None:
    path = world.bundle("here", (SDPA, SDPA), platform="here")
    result = world.check(path, world.profile)
    assert (result.rows[0].calibration, result.rows[0].calibration_digest) == ("", "")
    assert "a lab" not in said(result)
    with pytest.raises(UsageError, match="bit-identical to its replay: there is no distance to calibrate"):
        world.calibrate(path)


def test_a_prompt_counts_once_however_often_it_comes(world: World) -> None:
    one = world.bundle("one", (SDPA, SDPA), count=5, start=0)
    two = world.bundle("two", (SDPA, SDPA), count=5, start=3)
    made = world.calibrate(one, two)
    (entry,) = made.content.measured
    assert entry.prompts == 8
    assert all((pool.prompts, len(pool.floors)) == (8, 8 * min(8, 16 // pool.positions)) for pool in entry.pools)
    assert any("2 prompts came before, counted once" in remark for remark in made.remarks)
    repeated = drawn_world.references(4, 50)
    repeated += [msgspec_copy(repeated[0], "ref_4")]
    path = drawn_world.write_bundle(world.folder / "again", PROVER, world.checkpoint, repeated, (SDPA, SDPA))
    assert world.calibrate(path).content.measured[0].prompts == 4


def msgspec_copy(reference: object, name: str) -> drawn_world.Reference:
    assert isinstance(reference, drawn_world.Reference)
    return drawn_world.Reference(name, reference.prompt_ids, reference.source)


def test_rows_of_other_hardware_are_calibrated_apart(world: World) -> None:
    paths = [world.bundle(name, (SDPA, SDPA), count=3, start=10, platform=name) for name in ("one CPU", "another CPU")]
    entries = world.calibrate(*paths).content.measured
    assert [entry.prompts for entry in entries] == [3, 3]
    assert {entry.scope.prover.hardware.partition(",")[0] for entry in entries} == {"one CPU", "another CPU"}


@pytest.mark.parametrize(
    ("ran", "how", "told"),
    [
        (SDPA, {"model": "another"}, "noise floors from its own config's replay, where 2 are beyond rounding"),
        (EAGER, {}, ""),
    ],
)
def test_what_is_plainly_not_honest_is_refused_or_pointed_out(
    world: World, ran: ExecutionConfig, how: dict[str, str], told: str
) -> None:
    path = world.bundle("dishonest", (SDPA, ran), count=4, **how)
    if told:
        with pytest.raises(EvidenceError, match=told):
            world.calibrate(path)
    else:
        assert "another config lies nearer in most prompts" in render_measured(signed(world.calibrate(path)))


def test_what_cannot_work_is_said_before_the_first_replay(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> object:
        raise AssertionError("replays were begun")

    monkeypatch.setattr(drawn_world, "starter", lambda _: refuse)
    path = world.bundle("fresh", (SDPA, SDPA))
    with pytest.raises(UsageError, match="are the same bundle"):
        world.calibrate(path, path)
    with monkeypatch.context() as patch:
        patch.setattr(drawn_world, "LAYERS", ("1", "2"))
        patch.setattr(drawn_world, "CAPTURE", msgspec.structs.replace(drawn_world.CAPTURE, layers=("1", "2")))
        shallow = world.bundle("shallow", (SDPA, SDPA))
    with pytest.raises(UsageError, match="lacks key_vectors/4"):
        world.calibrate(shallow)
    stranger = drawn_world.write_bundle(
        world.folder / "stranger", VERIFIER, world.checkpoint, drawn_world.references(1), (SDPA, SDPA)
    )
    with pytest.raises(Error, match="no trusted key signed this"):
        world.calibrate(path, stranger)
