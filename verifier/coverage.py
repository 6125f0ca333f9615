"""Which calibration speaks for one row of a check, and what has to be said about it.

A profile of one's own comes first and speaks for exactly what it measured: config, weights, hardware on both sides, replay.
Where it does not, the built-in one decides, or the fixed limits do, and the verdict says so. The built-in one speaks for
every model and all hardware, and the verdict says where that is an extrapolation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from fpforensics.common.config import ExecutionConfig, config_id
from fpforensics.common.environment import Environment
from fpforensics.common.errors import shorten
from fpforensics.common.words import counted
from fpforensics.verifier.calibrated import Calibration, Part
from fpforensics.verifier.collector import Checked, Collector, kind_of, position_counts
from fpforensics.verifier.decision import RowVerdict
from fpforensics.verifier.distance import Cell
from fpforensics.verifier.lanes import ALPHA, LANES
from fpforensics.verifier.measured import Measured, MeasuredProfile
from fpforensics.verifier.profile import Pool, built_in_digest, built_in_profile
from fpforensics.verifier.scope import Scope, detail_differences, platform_of
from fpforensics.verifier.score import Scores

_MOST_NAMED = 4


@dataclass(frozen=True)
class Coverage:
    """What a row is judged by; None is the fixed limits. ``remarks`` say what of it was not measured, ``unused`` why the
    profile that was given is not it."""

    calibration: Calibration | None = None
    digest: str = ""
    remarks: tuple[str, ...] = ()
    unused: str = ""

    def noted(self, verdict: RowVerdict) -> RowVerdict:
        """``verdict`` with the profile's digest and what has to be said of it: nothing where equality decided."""
        if any(score.bit_identical for score in verdict.scores):
            return verdict
        remarks = self.remarks if verdict.calibration else ()
        if self.unused:
            instead = f"{verdict.calibration} decided" if verdict.calibration else "decided without a calibration"
            remarks = (f"{self.unused}; {instead}", *remarks)
        return msgspec.structs.replace(
            verdict,
            reasons=verdict.reasons + remarks,
            calibration_digest=self.digest if verdict.calibration else "",
        )


def cover(
    collected: Collector,
    each: Checked,
    profile: MeasuredProfile | None,
    scopes: Mapping[str, Scope],
    factors: Mapping[Cell, float] | None = None,
) -> Coverage:
    """What judges one row, given the scope of every member (:func:`scopes_of`); ``factors`` as in :meth:`Collector.scores`."""
    scores = collected.scores(each, factors)
    if scores is None:
        unused = "" if profile is None else f"profile {profile.content.name} needs the early layers and an anchor"
        return Coverage(unused=unused)
    unused, share = "", decode_share(each)
    if profile is not None:
        found = _by_measured(scores, each, profile, scopes, share, collected.prompt_tokens())
        if found is not None:
            entry = profile.find(scopes[each.label], share)
            assert entry is not None, "it covers the claimed config"
            if collected.bundle_digest in profile.bundles:
                said = f"{profile.content.name} was calibrated on this very bundle: its p-values say nothing here"
                found = dataclasses.replace(found, remarks=(said, *found.remarks))
            return _with_parts(found, collected.parts(each), entry.part)
        missing = "; ".join(profile.missing(scopes[each.label], share)) or "fewer positions than it has pools for"
        unused = f"profile {profile.content.name} does not cover this: {missing}"
    found = _by_built_in(scores, each, scopes, share, unused)
    return _with_parts(found, collected.parts(each), lambda _, positions: built_in_profile().pool(positions))


def scopes_of(
    collected: Collector, each: Checked, prover: Environment, verifier: Environment, mode: str
) -> dict[str, Scope]:
    """What each member's replay would have to be calibrated for, if that member made this row's evidence."""
    stated = platform_of(prover, each.row.facts)
    here = platform_of(verifier, collected.claimed_facts(each))
    return {
        report.id: Scope(
            config=msgspec.structs.replace(report.config, weights_digest=report.facts.model.weights_digest),
            prover=stated,
            verifier=here,
            mode=mode,  # type: ignore[arg-type]
            matmul=report.runs_as.matmul,
            backend=report.runs_as.backend,
        )
        for report in collected.reports
        if report.facts is not None
    }


def rival_name(config: ExecutionConfig, claimed: ExecutionConfig) -> str:
    """A rival's name beside ``claimed``, the same whatever the model is called."""
    return config_id(config, ExecutionConfig(model=claimed.model))


def too_few(prompts: int, alpha: float = ALPHA) -> str:
    """What to say of a calibration that can reject nothing; empty if it can. A conformal p is at least 1 / (prompts + 1)."""
    least = 1 / (prompts + 1)
    if LANES * least <= alpha:
        return ""
    return (
        f"{counted(prompts, 'calibration prompt')}: p cannot go below {least:.2g} in one lane, {min(1.0, LANES * least):.2g} over all "
        f"{LANES}, so nothing can be rejected at α = {alpha:g} by this profile; calibrate with at least "
        f"{counted(enough_prompts(alpha), 'prompt')}"
    )


def enough_prompts(alpha: float = ALPHA) -> int:
    """The fewest prompts with which a lane can reject at ``alpha``."""
    return math.ceil(round(LANES / alpha, 9)) - 1


def decode_share(each: Checked) -> float:
    """How much of a row's positions are generated ones."""
    counts = position_counts(each.row).values()
    return sum(count["decode"] for count in counts) / sum(sum(count.values()) for count in counts)


def _with_parts(found: Coverage, parts: Mapping[str, Scores], pool_of: Callable[[str, int], Pool | None]) -> Coverage:
    """``found`` with each prompt and each phase, to be looked at alone too."""
    if found.calibration is None:
        return found
    held = tuple(
        Part(name, scores, pool)
        for name, scores in parts.items()
        if (pool := pool_of(name, scores.positions)) is not None
    )
    return dataclasses.replace(found, calibration=dataclasses.replace(found.calibration, parts=held))


def _by_measured(
    scores: Scores,
    each: Checked,
    profile: MeasuredProfile,
    scopes: Mapping[str, Scope],
    share: float,
    tokens: tuple[int, int],
) -> Coverage | None:
    configs = {name: scopes[name].config for name in scores.distance}
    # Only members with noise floors of their own: those are the units of their pools.
    found = {name: entry for name in scores.noise if (entry := profile.find(scopes[name], share)) is not None}
    pools = {name: pool for name, entry in found.items() if (pool := entry.pool(scores.positions)) is not None}
    if each.label not in pools:
        return None
    against = {
        name: frozenset(
            other for other, config in configs.items() if rival_name(config, configs[name]) in found[name].rivals
        )
        for name in pools
    }
    kinds = _kinds(configs)
    built_in = built_in_profile()
    general = built_in.pool(scores.positions)
    others = [name for name in configs if name not in pools and built_in.covers(configs[name])] if general else []
    calibration = Calibration(
        scores,
        pools[each.label],
        profile.content.name,
        {*pools, *others},
        _wider(configs),
        kinds,
        pools=pools | {name: general for name in others if general is not None},
        against=against,
        larger=[pool for pool in found[each.label].pools if pool.positions > scores.positions],
    )
    remarks = (
        *_few(found),
        *_other_details(found[each.label], scopes[each.label]),
        *_other_lengths(found[each.label], tokens),
        *_outside(each.label, kinds, against[each.label]),
        *([f"not calibrated, so held against {built_in.name}: {_named(others)}"] if others else []),
    )
    return Coverage(calibration, profile.digest, remarks)


def _by_built_in(scores: Scores, each: Checked, scopes: Mapping[str, Scope], share: float, unused: str) -> Coverage:
    profile = built_in_profile()
    pool = profile.pool(scores.positions)
    if pool is None or not profile.covers(each.config):
        return Coverage(unused=unused)
    configs = {name: scopes[name].config for name in scores.distance}
    covered = {name for name, config in configs.items() if profile.covers(config)}
    larger = [each for each in profile.pools if each.positions > scores.positions]
    calibration = Calibration(scores, pool, profile.name, covered, _wider(configs), _kinds(configs), larger=larger)
    found = [*profile.strays(scopes[each.label]), *(["generated positions"] if share else [])]
    strays = ", ".join(shorten(stray, 100) for stray in found)
    remarks = (f"the error rate is an extrapolation: {profile.name} did not measure {strays}",) if strays else ()
    return Coverage(calibration, built_in_digest(), remarks, unused)


def _few(found: Mapping[str, Measured]) -> Iterator[str]:
    by_count: dict[int, list[str]] = {}
    for name, entry in found.items():
        by_count.setdefault(entry.prompts, []).append(name)
    for prompts, names in sorted(by_count.items()):
        if said := too_few(prompts):
            yield f"{_named(names)}: {said}"


def _other_details(entry: Measured, scope: Scope) -> Iterator[str]:
    found = list(detail_differences(entry.scope, scope))
    if found:
        yield f"calibrated under other conditions: {_named(found)}"


def _other_lengths(entry: Measured, tokens: tuple[int, int]) -> Iterator[str]:
    """Rounding noise grows with the context: said where it is less than half, or more than twice, what was measured."""
    (low, high), (fewest, most) = entry.prompt_tokens, tokens
    if 2 * fewest < low or most > 2 * high:
        lengths = counted(fewest, "token") if fewest == most else f"{fewest} to {most} tokens"
        yield f"prompts of {lengths} where {low} to {high} were measured"


def _outside(label: str, kinds: Mapping[str, str], against: frozenset[str]) -> Iterator[str]:
    outside = [name for name, kind in kinds.items() if kind != kinds[label] and name not in against]
    if outside:
        yield f"not in the calibration's lineup, so no rivals of {label}: {_named(outside)}"


def _wider(configs: Mapping[str, ExecutionConfig]) -> set[str]:
    return {name for name, config in configs.items() if config.dtype in ("fp32", "fp64")}


def _kinds(configs: Mapping[str, ExecutionConfig]) -> dict[str, str]:
    return {name: kind_of(config) for name, config in configs.items()}


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more
