"""Replays become distances as they come: to the evidence, to each other, to the anchor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import msgspec

from fpforensics.common.config import Claim, ExecutionConfig
from fpforensics.common.engines.base import EngineFacts, ReplayMode
from fpforensics.common.environment import Environment
from fpforensics.common.evidence import Row
from fpforensics.common.signals import PHASES, Phase, Trace
from fpforensics.verifier import decision
from fpforensics.verifier.distance import Cell, trace_distances
from fpforensics.verifier.environment_diff import compare_environments
from fpforensics.verifier.exact import Setting, Settled, setting_of
from fpforensics.verifier.intake import VerifiedBundle
from fpforensics.verifier.matrix import Measurement, kernel_classes
from fpforensics.verifier.replay import Member, MemberReplay, Missed, departure, fingerprint, weights_of
from fpforensics.verifier.score import EARLY, Scores, score

ANCHOR_PREFIX = "anchor:"


class MemberReport(msgspec.Struct, frozen=True, kw_only=True):
    """One member of the lineup: what it stands for, what ran, how long it took, or why it was skipped."""

    id: str
    config: ExecutionConfig
    runs_as: ExecutionConfig
    facts: EngineFacts | None
    seconds: float
    skipped: str


@dataclass(frozen=True)
class Checked:
    """One row under one claim: ``label`` names the claimed config, in matrices and among the lineup."""

    row: Row
    claim: Claim
    config: ExecutionConfig
    label: str
    anchor: ExecutionConfig | None


class Collector:
    """Turns replays into distances as they come, and keeps only the traces that the noise floor still needs."""

    def __init__(self, bundle: VerifiedBundle, checked: Sequence[Checked]) -> None:
        self._bundle = bundle
        self._checked = checked
        self._configs: dict[str, ExecutionConfig] = {}
        self._fingerprints: dict[str, tuple[str, ...]] = {}
        self._kept: dict[tuple[ExecutionConfig, str], Sequence[Trace]] = {}
        self._distances: dict[tuple[str, str], dict[str, dict[Cell, float]]] = {}  # (label, member) -> reference -> …
        self._noise: dict[
            tuple[str, ExecutionConfig], dict[str, dict[Cell, float]]
        ] = {}  # (label, member) -> reference
        self._departures: dict[str, str] = {}  # label -> where the evidence leaves the claimed config's replay
        self._again: dict[str, Settled] = {}  # label -> what the claimed config's second replay showed
        self.reports: list[MemberReport] = []
        self.measurements: list[Measurement] = []

    @property
    def bundle_digest(self) -> str:
        """``sha256:<hex>`` of the bundle."""
        return self._bundle.digest

    @property
    def environment(self) -> Environment:
        """What the bundle states of its machine and software."""
        return self._bundle.evidence.environment

    def add(self, replay: MemberReplay) -> None:
        """Measure one member's replay against every row it replayed."""
        member = replay.member
        self.reports.append(
            MemberReport(
                id=member.id,
                config=member.config,
                runs_as=member.runs_as,
                facts=replay.facts,
                seconds=replay.seconds,
                skipped=replay.skipped,
            )
        )
        if replay.skipped:
            return
        needed = {config for each in self._checked for config in (each.config, each.anchor) if config}
        for each in self._checked:
            traces = replay.traces.get(each.row.config_id)
            if traces is None:
                continue
            if member.config in needed:
                self._kept[member.config, each.label] = traces
            if member.config == each.config:
                self._departures[each.label] = departure(self._bundle, each.row, traces)
                self._again[each.label] = replay.again.get(each.row.config_id, Settled(()))
            self._measure_noise(each, member, traces)
            # An anchor whose dtype contradicts the claim is a member like any other, for the row that it anchors; that it takes the
            # plainest attention is our own choice, and speaks against nobody.
            if not member.id.startswith(ANCHOR_PREFIX) or _contradicts_by_dtype(each.claim, member.config):
                self._measure(each, member, traces)
        self._configs[member.id] = member.config
        if not member.id.startswith(ANCHOR_PREFIX):
            self._fingerprints[member.id] = tuple(
                fingerprint(replay.traces[each.row.config_id]) for each in self._checked
            )

    def _measure(self, each: Checked, member: Member, traces: Sequence[Trace]) -> None:
        for trace in traces:
            distances = trace_distances(self._bundle.trace(each.row, trace.reference_id), trace)
            self._distances.setdefault((each.label, member.id), {})[trace.reference_id] = distances
            self.measurements.append(
                Measurement(row=each.label, column=member.id, reference_id=trace.reference_id, distances=distances)
            )

    def _measure_noise(self, each: Checked, member: Member, traces: Sequence[Trace]) -> None:
        """How far the member's replay is from the anchor of the same weights, or the evidence from the anchor itself."""
        anchor = each.anchor and self._kept.get((each.anchor, each.label))
        if not each.anchor or not anchor:
            return
        if member.config == each.anchor:
            ours: Iterable[Trace] = (self._bundle.trace(each.row, trace.reference_id) for trace in traces)
        elif weights_of(member.config) == weights_of(each.anchor):
            ours = traces
        else:
            return
        self._noise[each.label, member.config] = {
            one.reference_id: trace_distances(one, other) for one, other in zip(ours, anchor, strict=True)
        }

    def scores(self, each: Checked, factors: Mapping[Cell, float] | None = None) -> Scores | None:
        """One row's scores in the early layers; None where there is no anchor, or the evidence lacks them.

        The unit is the prompt: a reference that repeats an earlier one's prompt does not count. ``factors`` raise the claimed
        config's noise floors.
        """
        return self._scores(each, self._distinct(), PHASES, factors or {})

    def parts(self, each: Checked) -> dict[str, Scores]:
        """The same of each prompt alone and of each phase alone, where there are several: a lie in one must not hide among the rest."""
        prompts = self._distinct()
        named: list[tuple[str, list[str], tuple[Phase, ...]]] = [(name, [name], PHASES) for name in prompts]
        counts = position_counts(each.row)
        phases: list[Phase] = [phase for phase in PHASES if all(counts[name][phase] for name in prompts)]
        named = (named if len(prompts) > 1 else []) + [
            (phase, prompts, (phase,)) for phase in phases if len(phases) > 1
        ]
        found = {name: self._scores(each, references, of, {}) for name, references, of in named}
        return {name: scores for name, scores in found.items() if scores is not None}

    def _distinct(self) -> list[str]:
        """References whose prompts differ, in order."""
        first = {entry.prompt_ids.sha256: entry.id for entry in reversed(self._bundle.evidence.references)}
        return list(reversed(first.values()))

    def _scores(
        self, each: Checked, prompts: Sequence[str], phases: Sequence[Phase], factors: Mapping[Cell, float]
    ) -> Scores | None:
        if each.anchor is None or (each.label, each.anchor) not in self._noise:
            return None
        distances = {
            name: {reference: found[reference] for reference in prompts}
            for (label, name), found in self._distances.items()
            if label == each.label
        }
        own = {
            name: self._noise[each.label, config]
            for name, config in self._configs.items()
            if (each.label, config) in self._noise and config != each.anchor
        }
        if factors and each.label in own:
            own[each.label] = {
                reference: {cell: distance * factors.get(cell, 1.0) for cell, distance in cells.items()}
                for reference, cells in own[each.label].items()
            }
        return score(
            claimed=each.label,
            distances=distances,
            own_noise=own,
            to_anchor=self._noise[each.label, each.anchor],
            counts={
                name: {phase: count[phase] for phase in phases} for name, count in position_counts(each.row).items()
            },
        )

    def prompt_tokens(self) -> tuple[int, int]:
        """The fewest and the most tokens of a prompt."""
        lengths = [entry.prompt_ids.shape[0] for entry in self._bundle.evidence.references]
        return min(lengths), max(lengths)

    def lacking(self, each: Checked) -> str:
        """What the evidence should have held to be judged at a known error rate, though the model has it; empty if nothing."""
        deepest = max(int(key.layer) for key in EARLY)
        held = {(cell.signal, cell.layer) for cell in self.noise_floor(each)}
        missing = [f"{key.signal} of block {key.layer}" for key in EARLY if (key.signal, key.layer) not in held]
        if not missing or each.anchor is None or self.claimed_facts(each).model.num_layers < deepest:
            return ""
        return f"the evidence lacks {', '.join(missing)}: without them no error rate is known"

    def setting(self, each: Checked, verifier: Environment, mode: ReplayMode) -> Setting:
        """How the prover's stated hardware, software and kernels stand to this verifier's."""
        replayed = self.claimed_facts(each)
        differences = compare_environments(self.environment, each.row.facts, verifier, replayed, mode=mode)
        again = self._again[each.label]
        return setting_of(
            each.row, replayed, differences, mode, self._departures[each.label], again.unsteady, again.refuted
        )

    def missed(self, here: Environment, mode: ReplayMode) -> Missed:
        """Of replays in the prover's own setting: whether a bit differs. Asked of the claimed config; where that does not repeat, of all."""

        def asked(each: Checked, member: Member) -> bool:
            return each.config == member.config or (
                each.label in self._again and bool(self._again[each.label].unsteady)
            )

        def missed(member: Member, row: Row, traces: Sequence[Trace], facts: EngineFacts) -> bool:
            if not any(each.row is row and asked(each, member) for each in self._checked):
                return False
            differences = compare_environments(self.environment, row.facts, here, facts, mode=mode)
            if not setting_of(row, facts, differences, mode, "").shared:
                return False
            return bool(departure(self._bundle, row, traces))

        return missed

    def in_order(self, names: Sequence[str]) -> None:
        """Put reports and measurements in the order of ``names``, whatever order the replays came in."""
        place = {name: index for index, name in enumerate(names)}
        self.reports.sort(key=lambda report: place[report.id])
        self.measurements.sort(key=lambda each: place[each.column])

    def kernel_classes(self) -> tuple[tuple[str, ...], ...]:
        """Members whose replays are bit-identical on this machine."""
        return kernel_classes(
            (a, b) for a, b in combinations(self._fingerprints, 2) if self._fingerprints[a] == self._fingerprints[b]
        )

    def members_of(self, each: Checked) -> list[decision.Member]:
        """The lineup as the decision sees it for one row."""
        return [
            decision.Member(id=name, fits=each.claim.holds_for(config), per_reference=self._distances[each.label, name])
            for name, config in self._configs.items()
            if (each.label, name) in self._distances
        ]

    def noise_floor(self, each: Checked) -> dict[Cell, float]:
        """Per cell, the distance between the claimed config's replay and its anchor's, mean over references."""
        totals: dict[Cell, list[float]] = {}
        if each.anchor is None:  # a floor of 0 is no floor: only equality can decide then
            (cells, *_) = self._distances[each.label, each.label].values()
            return dict.fromkeys(cells, 0.0)
        pairs = zip(self._kept[each.config, each.label], self._kept[each.anchor, each.label], strict=True)
        for claimed, anchor in pairs:
            for cell, distance in trace_distances(claimed, anchor).items():
                totals.setdefault(cell, []).append(distance)
        return {cell: sum(values) / len(values) for cell, values in totals.items()}

    def claimed_facts(self, each: Checked) -> EngineFacts:
        """What ran when the claimed config was replayed."""
        facts: Mapping[ExecutionConfig, EngineFacts | None] = {report.config: report.facts for report in self.reports}
        found = facts[each.config]
        assert found is not None, "the claimed config is never skipped"
        return found


def _contradicts_by_dtype(claim: Claim, config: ExecutionConfig) -> bool:
    return "dtype" in claim.assertions and not claim.holds_for(config)


def kind_of(config: ExecutionConfig) -> str:
    """What the profile's margins were measured between: configs that differ in anything else are of one kind."""
    attention = "sdpa" if config.attention.startswith("sdpa") else config.attention
    ranks = config.emulate_tensor_parallel, config.tensor_parallel
    fields = (config.model, config.dtype, config.quantization, attention, config.kv_cache, *ranks)
    return "/".join(map(str, fields))


def position_counts(row: Row) -> dict[str, dict[Phase, int]]:
    """How many positions each reference holds in each phase."""
    return {
        trace.reference_id: {
            phase: (trace.prefill if phase == "prefill" else trace.decode)["positions"].shape[0] for phase in PHASES
        }
        for trace in row.traces
    }
