"""Every attack of ``docs/attacks.md``, on evidence of a real H100: what comes of it, and of the honest run that goes the same way."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from attacks import ATTACKS
from attacks.attack import Attack, Outcome
from attacks.material import KEY, Material, load_material, sign, verdict_on
from attacks.recorded import EAGER, SDPA, verdicts
from attacks.shown import Shown

from fpforensics.common.engines.base import Host
from fpforensics.common.errors import EvidenceError, NonceError
from fpforensics.common.keys import Keyring
from fpforensics.prover.session import SessionPlan
from fpforensics.verifier.answer import require_as_asked
from fpforensics.verifier.fresh import require_prompts, with_texts
from fpforensics.verifier.intake import open_bundle
from fpforensics.verifier.store import Store

pytestmark = pytest.mark.timeout(900)  # the first test waits for every replay
ROOT = Path(__file__).parents[2]
NAMED = re.compile(r"^\| ([^|]+?) \|", re.MULTILINE)
CONTROLS = {(each.honest_how or each.how, each.honest, each.claim, each.lineup): each for each in ATTACKS}
OLD, FRESH = "0a" * 32, "0b" * 32


@pytest.fixture(scope="module")
def material(smollm2: Path) -> Material:
    found = load_material(Host(device="cpu"))
    found.prepare()
    return found


def outcome(shown: Shown, attack: Attack, material: Material, folder: Path) -> tuple[Outcome, object]:
    try:
        sign(shown, folder / "bundle.msgpack")
        result = verdict_on(folder / "bundle.msgpack", attack.claim, attack.lineup, material.replays)
    except EvidenceError as error:
        return "REFUSED", error.diagnostics()
    return result.verdict, result.rows


def marked(attack: Attack) -> object:
    marks = [pytest.mark.xfail(strict=True, reason=attack.missed)] if attack.missed else []
    return pytest.param(attack, id=attack.name, marks=marks)


@pytest.mark.parametrize("attack", [marked(attack) for attack in ATTACKS])
def test_attack(attack: Attack, material: Material, tmp_path: Path) -> None:
    found, why = outcome(attack.shown(material), attack, material, tmp_path)
    assert found in (("CONSISTENT",) if attack.beyond else attack.caught), why


@pytest.mark.parametrize("attack", CONTROLS.values(), ids=lambda attack: attack.name)
def test_the_honest_run_that_goes_the_same_way(attack: Attack, material: Material, tmp_path: Path) -> None:
    found, why = outcome(attack.honestly(material), attack, material, tmp_path)
    assert found in attack.control, why


def test_the_document_names_every_attack() -> None:
    named = NAMED.findall((ROOT / "docs" / "attacks.md").read_text(encoding="utf-8"))
    assert [attack.name for attack in ATTACKS if attack.name not in named] == []


@pytest.mark.parametrize(
    ("ran", "claimed", "prompts", "positions"),
    [(SDPA, EAGER, 12, 2), (SDPA, EAGER, 16, 1), (EAGER, SDPA, 16, 1)],
)
def test_whoever_chooses_where_prompts_end_passes_as_another_kernel(
    ran: str, claimed: str, prompts: int, positions: int
) -> None:
    """Why prompts are the verifier's to choose. Where prompts ended by themselves, as many are caught, or at least not vouched for."""
    assert set(verdicts(ran, claimed, prompts=prompts, positions=positions, cut=True)) == {"CONSISTENT"}
    lies = verdicts(ran, claimed, prompts=prompts, positions=positions, cut=False)
    assert lies["INCONSISTENT"] and not lies["CONSISTENT"]
    honest = verdicts(ran, ran, prompts=prompts, positions=positions, cut=False)
    assert honest["CONSISTENT"] and not honest["INCONSISTENT"]


# --- freshness ---


@pytest.fixture
def recorded() -> Shown:
    return load_material(Host(device="cpu")).sdpa


def test_an_old_bundle_does_not_answer_a_new_challenge(recorded: Shown, tmp_path: Path) -> None:
    sign(replace(recorded, nonce=OLD), tmp_path / "old")
    with pytest.raises(NonceError), open_bundle(tmp_path / "old", Keyring([KEY.public]), expected_nonce=FRESH):
        pass


def test_a_challenge_is_answered_once(recorded: Shown, tmp_path: Path) -> None:
    with Store(tmp_path / "store") as store:
        nonce = store.issue_nonce(60)

        def submit(shown: Shown, name: str) -> str:
            sign(replace(shown, nonce=nonce), tmp_path / name)
            with (
                open_bundle(tmp_path / name, Keyring([KEY.public])) as bundle,
                store.spool() as spool,
            ):
                spool.file.write((tmp_path / name).read_bytes())
                kept = store.adopt(spool, bundle.digest, bundle.signer.keyid, nonce, require_challenge=True)
            return kept.digest

        first = submit(recorded, "first")
        with pytest.raises(NonceError, match="already answered"):
            submit(recorded.only(1), "second")
        assert store.bundle(first).challenged


def test_old_evidence_signed_anew_does_not_answer_a_session_about_fresh_prompts(
    recorded: Shown, smollm2: Path, tmp_path: Path
) -> None:
    """The nonce makes the signature fresh, not what it signs: only prompts that nobody could know before do."""
    plan = SessionPlan(
        configs=(recorded.config,),
        references=len(recorded.references),
        prompt_tokens=200,
        capture=recorded.capture,
        sampling=recorded.sampling,
        repetitions=1,
        nonce=FRESH,
    )
    sign(replace(recorded, nonce=FRESH), tmp_path / "old")
    with open_bundle(tmp_path / "old", Keyring([KEY.public]), expected_nonce=FRESH) as bundle:
        require_as_asked(bundle, plan)
        with pytest.raises(EvidenceError, match="the prompt of ref_0 is not the one that was asked"):
            require_prompts(bundle, with_texts(plan), smollm2)
