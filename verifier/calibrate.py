"""From honest bundles to a profile: what evidence measures here when nobody lies.

Every row is replayed as a check would replay it: under its own config, under the lineup and under its anchor. Rows of one
scope (config, weights, hardware on both sides, replay) are pooled, a prompt once, however often it comes.
That the bundles are honest is the caller's word; what plainly contradicts it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, median

import numpy as np

from fpforensics.common.engines.base import EngineStarter, Host
from fpforensics.common.engines.remote import start_engine
from fpforensics.common.environment import describe_environment
from fpforensics.common.errors import EvidenceError, LimitError, UsageError, shorten
from fpforensics.common.keys import Keyring
from fpforensics.common.signals import PHASES, Phase
from fpforensics.common.words import counted
from fpforensics.verifier.calibrated import FAR
from fpforensics.verifier.check import CheckPlan, replay_bundle
from fpforensics.verifier.coverage import scopes_of
from fpforensics.verifier.intake import open_bundle
from fpforensics.verifier.measured import MAX_PAYLOAD_BYTES, QUANTILES, Calibrated, CellNoise, Measured
from fpforensics.verifier.pooling import DIGITS, POSITIONS, WINDOWS, HonestPrompt, ladder, make_pool, of_phase
from fpforensics.verifier.profile import FORMAT, Pool
from fpforensics.verifier.recorder import Recorded, Recorder, require_early
from fpforensics.verifier.replay import Report
from fpforensics.verifier.scope import Scope, detail_differences, differences

# Three numbers for each window of each pool, at most; and again for each phase alone.
_BYTES_OF_A_PROMPT = 3 * 3 * 8 * WINDOWS * (len(POSITIONS) + 1)


@dataclass
class _Gathered:
    """One scope's prompts, by key."""

    scope: Scope
    tokens: tuple[int, int]
    prompts: dict[str, Recorded] = field(default_factory=dict)


@dataclass(frozen=True)
class Calibration:
    """What :func:`calibrate` made: the content to sign, the bundles that it is about, and what a person should know of it."""

    content: Calibrated
    bundles: tuple[str, ...]
    remarks: tuple[str, ...]


def calibrate(
    paths: Sequence[Path],
    keyring: Keyring,
    plan: CheckPlan,
    host: Host,
    name: str,
    report: Report = lambda _stage, _done, _total: None,
    cancelled: Callable[[], bool] = lambda: False,
    start: EngineStarter = start_engine,
) -> Calibration:
    """Measure honest bundles; ``plan`` names lineup, mode and ``using`` (its claim is empty: each row is what it declares).

    Raises:
        EvidenceError: a bundle is not from a trusted key, damaged, or no honest evidence of what it declares.
        UsageError: a bundle is given twice, lacks the early layers, or is bit-identical to its replay.
        ReplayError: a config cannot run here.
    """
    bundles = _require_usable(paths, keyring, plan)
    environment = describe_environment(host.env)
    gathered: list[_Gathered] = []
    remarks: list[str] = []
    for index, path in enumerate(paths):
        which = f"{path.name} ({index + 1} of {len(paths)})"

        def tell(stage: str, done: int, total: int, which: str = which) -> None:
            report(f"{which}: {stage}", done, total)

        with open_bundle(path, keyring) as bundle:
            bundle.verify_all(lambda done, total, tell=tell: tell("checking digests", done, total))  # type: ignore[misc]
            checked, recorder = replay_bundle(bundle, plan, host, Recorder, tell, cancelled, start)
            keys = {entry.id: entry.prompt_ids.sha256 for entry in bundle.evidence.references}
            for each in checked:
                scope = scopes_of(recorder, each, bundle.evidence.environment, environment, plan.mode)[each.label]
                recorded = recorder.prompts(each, keys)
                _require_honest(recorded, f"row {shorten(each.row.config_id)} of {path}")
                remarks += _gather(gathered, scope, recorded, recorder.prompt_tokens(), str(path))
    measured = tuple(_measured(each) for each in gathered)
    content = Calibrated(
        format=FORMAT,
        name=name,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        tool_version=version("fpforensics"),
        measured=measured,
    )
    return Calibration(content, bundles, tuple(remarks))


def _require_usable(paths: Sequence[Path], keyring: Keyring, plan: CheckPlan) -> tuple[str, ...]:
    """Every bundle's digest. What cannot work is said before the first replay, not after hours of them."""
    seen: dict[str, Path] = {}
    prompts = 0
    for path in paths:
        with open_bundle(path, keyring) as bundle:
            if bundle.digest in seen:
                raise UsageError(f"{path} and {seen[bundle.digest]} are the same bundle", "give each once")
            seen[bundle.digest] = path
            for row in bundle.evidence.rows:
                if plan.row in ("", row.config_id):
                    require_early(row, path)
                    prompts += len(row.traces)
    if prompts * _BYTES_OF_A_PROMPT > MAX_PAYLOAD_BYTES:
        raise LimitError(
            f"{prompts} prompts, over all rows, make a profile of more than {MAX_PAYLOAD_BYTES} bytes",
            "calibrate fewer rows or bundles in one file",
        )
    return tuple(seen)


def _require_honest(recorded: Sequence[Recorded], where: str) -> None:
    if all(each.equal for each in recorded):
        raise UsageError(
            f"{where} is bit-identical to its replay: there is no distance to calibrate",
            "on the prover's own kernels equality decides; calibrate where the replays are to run",
        )
    floors = median(each.prompt.scores(each.prompt.whole).floors[each.prompt.own] for each in recorded)
    if floors > FAR:
        raise EvidenceError(
            f"{where} lies {floors:.1f} noise floors from its own config's replay, where {FAR:g} are beyond rounding",
            "honest evidence of what it declares does not: leave it out, or replay it by the same products (--using)",
        )


def _gather(
    gathered: list[_Gathered], scope: Scope, recorded: Sequence[Recorded], tokens: tuple[int, int], path: str
) -> Iterator[str]:
    """Add prompts to their scope; yields what was left out or mixed."""
    mine = next((each for each in gathered if not any(differences(each.scope, scope))), None)
    if mine is None:
        mine = _Gathered(scope, tokens)
        gathered.append(mine)
    mine.tokens = min(mine.tokens[0], tokens[0]), max(mine.tokens[1], tokens[1])
    found = [each for each in recorded if each.prompt.key not in mine.prompts]
    for each in found:
        mine.prompts.setdefault(each.prompt.key, each)
    again = len(recorded) - len({each.prompt.key for each in found})
    if again:
        yield f"{path}, {scope.label}: {counted(again, 'prompt')} came before, counted once"
    mixed = list(detail_differences(mine.scope, scope))
    if mixed:
        yield f"{path}, {scope.label}: not recorded under the same conditions as the first: {', '.join(mixed[:3])}"


def _measured(gathered: _Gathered) -> Measured:
    recorded = list(gathered.prompts.values())
    # Only what every prompt was held against: a margin over fewer rivals would be larger.
    common = set.intersection(*(set(each.prompt.rivals) for each in recorded))
    rivals = tuple(name for name in recorded[0].prompt.rivals if name in common)
    prompts = [replace(each.prompt, rivals=rivals) for each in recorded]
    both = all(0 < one.decode < one.positions for one in prompts)
    alone: dict[Phase, list[HonestPrompt]] = (
        {phase: [of_phase(one, phase) for one in prompts] for phase in PHASES} if both else {}
    )
    nearest = 0
    for one in prompts:
        distance = one.scores(one.whole).distance
        nearest += all(distance[one.own] <= distance[rival] for rival in rivals)
    return Measured(
        scope=gathered.scope,
        prompts=len(prompts),
        decode_share=round(sum(one.decode for one in prompts) / sum(one.positions for one in prompts), DIGITS),
        prompt_tokens=gathered.tokens,
        rivals=rivals,
        nearest=nearest,
        pools=_pools(prompts),
        phases={phase: _pools(found) for phase, found in alone.items()},
        cells=tuple(_cells(recorded)),
    )


def _pools(prompts: Sequence[HonestPrompt]) -> tuple[Pool, ...]:
    return tuple(make_pool(prompts, count) for count in ladder(prompts))


def _cells(recorded: Sequence[Recorded]) -> Iterator[CellNoise]:
    for cell in sorted({cell for each in recorded for cell in each.cells}):
        found = [each.cells[cell] for each in recorded if cell in each.cells]
        usable = [(distance, floor) for distance, floor in found if floor > 0]
        if usable:
            quantiles = np.quantile([distance / floor for distance, floor in usable], QUANTILES)
            yield CellNoise(
                cell=cell,
                prompts=len(usable),
                floor=float(f"{fmean(floor for _, floor in usable):.4g}"),
                quantiles=tuple(round(float(value), DIGITS) for value in quantiles),
            )
