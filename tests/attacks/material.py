"""What a liar has at hand: evidence that an H100 signed, replays of its tokens, and a key to sign with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import numpy as np

from attacks.replays import USING, Hybrid, Replays, plain
from attacks.shown import Shown, combined
from fpforensics.common.bundle import BundleWriter
from fpforensics.common.config import config_id
from fpforensics.common.engines.base import Host
from fpforensics.common.evidence import Repetitions, Row
from fpforensics.common.keys import Keyring, PrivateKey
from fpforensics.common.signals import PHASES
from fpforensics.verifier.check import CheckPlan, CheckResult, check_bundle
from fpforensics.verifier.intake import open_bundle

H100 = Path(__file__).parents[1] / "assets" / "h100"
KEY = PrivateKey.from_seed(b"a liar's key, not a secret: seed")
HYBRID = Hybrid("quant=torchao-int8", 21)


@dataclass(frozen=True)
class Material:
    """Honest evidence (``sdpa`` and ``eager``, of an H100) and everybody's replays of it."""

    sdpa: Shown
    eager: Shown
    replays: Replays

    def replay(self, spec: str | Hybrid, shown: Shown | None = None) -> Shown:
        """The tokens of ``shown`` (the sdpa row) as the verifier's own machine computes them."""
        return self.replays.replay(spec, shown or self.sdpa)

    def prepare(self) -> None:
        """Compute what the attacks need, each config loaded once: a minute or two."""
        for spec in ("dtype=fp32", "", "attn=eager"):
            self.replays.remember(spec, self.sdpa, self._fed())
        for other in ("quant=torchao-int8", "quant=bnb-nf4", HYBRID):
            self.replays.remember(other, self.sdpa)

    def numbers(self, name: str) -> Shown:
        """Numbers about the same prompts and tokens, under sdpa's name."""
        match name:
            case "sdpa":
                return self.sdpa
            case "eager":
                return replace(self.eager, config=self.sdpa.config)
            case "anchor":
                return self.replay("dtype=fp32")
            case "replay":
                return self.replay("")
            case "int8":
                return self.as_if("quant=torchao-int8")
            case "nf4":
                return self.as_if("quant=bnb-nf4")
            case "hybrid":
                return self.as_if(HYBRID)
        raise KeyError(name)

    def with_foreign_tokens(self) -> Shown:
        """The sdpa row's prompts, but the first one is followed by the second one's tokens. Only ids and tokens are meant."""
        fed = self.replays.likeliest(self._fed())
        return replace(self.sdpa, traces=(*fed.traces, *self.sdpa.traces[1:]))

    def _fed(self) -> Shown:
        first = self.sdpa.only(0)
        return first.of([replace(first.traces[0], output_ids=self.sdpa.traces[1].output_ids)])

    def as_if(self, spec: str | Hybrid, shown: Shown | None = None) -> Shown:
        """``shown`` (the sdpa row) as the H100 would have computed it under ``spec``: moved by the difference of two replays."""
        shown = shown or self.sdpa
        there, here = self.replay(spec, shown), self.replay("", shown)
        return combined(lambda e, to, at: e + (to - at), shown, there, here)


def load_material(host: Host) -> Material:
    """Read the committed evidence; no replay is computed yet."""
    with open_bundle(H100 / "sdpa-eager.msgpack", Keyring.from_paths([H100 / "prover.key.pub"])) as bundle:
        references = tuple(bundle.references())
        sdpa, eager = (
            Shown(
                references,
                tuple(bundle.trace(row, reference.id) for reference in references),
                plain(row.config),
                bundle.evidence,
                row.facts,
                bundle.evidence.capture,
                bundle.evidence.sampling,
            )
            for row in bundle.evidence.rows
        )
    same = [i for i in range(len(references)) if np.array_equal(sdpa.traces[i].output_ids, eager.traces[i].output_ids)]
    return Material(sdpa.only(*same), eager.only(*same), Replays(host))


def sign(shown: Shown, path: Path) -> None:
    """Write what is shown as a bundle that the liar's key signs."""
    with BundleWriter(path) as writer:
        entries = tuple(writer.add_reference(reference) for reference in shown.references)
        row = Row(
            config_id=config_id(shown.config),
            config=msgspec.structs.replace(shown.config, weights_digest=shown.facts.model.weights_digest),
            facts=shown.facts,
            repetitions=Repetitions(
                count=1,
                bit_identical=not shown.noise,
                wall_seconds=(1.0,),
                wall_mean=1.0,
                wall_variance=0.0,
                noise=_said_noise(shown),
            ),
            traces=tuple(writer.add_trace(trace) for trace in shown.traces),
        )
        evidence = msgspec.structs.replace(
            shown.evidence,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            session_id="00" * 16,
            nonce=shown.nonce,
            capture=shown.capture,
            sampling=shown.sampling,
            references=entries,
            rows=(row,),
        )
        writer.finish(evidence, KEY)


def _said_noise(shown: Shown) -> dict[str, float]:
    tensors = shown.traces[0]
    return {
        f"{phase}/{name}": shown.noise for phase in PHASES for name in tensors.phase(phase).tensors() if shown.noise
    }


def verdict_on(path: Path, claim: str, lineup: tuple[str, ...], replays: Replays) -> CheckResult:
    """What a verifier that trusts the liar's key says of the bundle."""
    plan = CheckPlan(claim=claim, lineup=lineup, mode="prefill", using=USING)
    with open_bundle(path, Keyring([KEY.public])) as bundle:
        bundle.verify_all()
        return check_bundle(bundle, plan, replays.host, start=replays.start)
