"""What configurations say of how they ran, side by side: between two experiments, or between the configs of one.

Hardware is meant to differ between two experiments; software and parameters are not, for then a distance is not
due to hardware alone. Within one experiment, nothing but its variable should differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from fpforensics.common.lab.reader import Experiment
from fpforensics.verifier.analysis.measure import Member

Kind = Literal["experiment", "software", "parameters", "hardware"]
ABSENT = "absent"
_EXPERIMENT = ("variable_tested", "model", "model_size", "architecture", "sequence_length", "decode_steps")
_HARDWARE = ("hardware", "provider", "hostname", "platform", "gpu", "cpu", "driver")
_OF_ITSELF = ("config_id", "variable_value", "fixed_params")

_Key = tuple[Kind, str]


class Stated(msgspec.Struct, frozen=True):
    """A value as text, and the ids of the configs that state it. Untrusted: to be escaped where it is shown."""

    value: str
    configs: tuple[str, ...] = ()


class FieldComparison(msgspec.Struct, frozen=True, kw_only=True):
    """One field. ``expected`` says whether a difference here is no cause for doubt.

    Between two experiments ``equal`` is about configs with the same ``variable_value``; within one, where ``observed``
    is empty, about all of its configs.
    """

    kind: Kind
    name: str
    claimed: tuple[Stated, ...]
    observed: tuple[Stated, ...]
    equal: bool
    expected: bool


def compare_configurations(claimed: Experiment, observed: Experiment | None = None) -> tuple[FieldComparison, ...]:
    """Every field of a configuration but its id and the variable; ``fixed_params`` one by one.

    Between two experiments, what their metadata say of the model and of lengths comes first.
    """
    ours = _configs(claimed, 0)
    if observed is None:
        stated = ((key, _by_value(ours, key)) for key in _keys(claimed, ours))
        return tuple(_field(key, values, (), len(values) == 1) for key, values in stated)
    theirs = _configs(observed, 1)
    found = list(_compare_metadata(claimed, observed))
    for key in _keys(claimed, [*ours, *theirs]):
        equal = _equal_where_matched(ours, theirs, key)
        found.append(_field(key, _by_value(ours, key), _by_value(theirs, key), equal))
    return tuple(found)


def mismatches(fields: Iterable[FieldComparison]) -> tuple[FieldComparison, ...]:
    """Those that differ and should not."""
    return tuple(each for each in fields if not each.equal and not each.expected)


@dataclass(frozen=True)
class _Config:
    id: str
    value: str  # of the variable, as Member says it
    plain_value: str  # as a field would say it
    fields: Mapping[_Key, str]


def _compare_metadata(claimed: Experiment, observed: Experiment) -> Iterator[FieldComparison]:
    for name in _EXPERIMENT:
        one, other = (_text(each.metadata.get(name, ABSENT)) for each in (claimed, observed))
        if (one, other) != (ABSENT, ABSENT):
            yield _field(("experiment", name), (Stated(one),), (Stated(other),), one == other)


def _configs(source: Experiment, side: int) -> list[_Config]:
    return [
        _Config(each.config_id, Member(side, each).value, _text(each.variable_value), dict(_fields(each.raw)))
        for each in source.configurations
    ]


def _fields(raw: Mapping[str, Any]) -> Iterator[tuple[_Key, str]]:
    for name, value in raw.items():
        if name not in _OF_ITSELF:
            yield (_kind(name), name), _text(value)
    for name, value in raw.get("fixed_params", {}).items():
        yield ("parameters", name), _text(value)


def _kind(name: str) -> Kind:
    """``gpu_name`` and ``driver_version`` are hardware, any other ``…_version`` is software."""
    if name.partition("_")[0].removesuffix("s") in _HARDWARE:
        return "hardware"
    return "software" if name.endswith("_version") else "parameters"


def _keys(claimed: Experiment, configs: Sequence[_Config]) -> list[_Key]:
    """The fields that some config has, without the variable: named so, or of its very values."""
    names = dict.fromkeys(key for each in configs for key in each.fields)
    varies = len({each.plain_value for each in configs}) > 1
    return [
        key
        for key in names
        if key[1] != claimed.metadata["variable_tested"]
        and not (varies and all(each.fields.get(key) == each.plain_value for each in configs))
    ]


def _by_value(configs: Sequence[_Config], key: _Key) -> tuple[Stated, ...]:
    found: dict[str, list[str]] = {}
    for each in configs:
        found.setdefault(each.fields.get(key, ABSENT), []).append(each.id)
    return tuple(Stated(value, tuple(ids)) for value, ids in found.items())


def _equal_where_matched(ours: Sequence[_Config], theirs: Sequence[_Config], key: _Key) -> bool:
    """Whether configs with the same value of the variable state the same; all of them, if none have the same."""
    shared = {each.value for each in ours} & {each.value for each in theirs}
    one, other = (
        {
            (each.value if shared else "", each.fields.get(key, ABSENT))
            for each in side
            if not shared or each.value in shared
        }
        for side in (ours, theirs)
    )
    return one == other


def _field(key: _Key, claimed: tuple[Stated, ...], observed: tuple[Stated, ...], equal: bool) -> FieldComparison:
    kind, name = key
    return FieldComparison(
        kind=kind, name=name, claimed=claimed, observed=observed, equal=equal, expected=kind == "hardware"
    )


def _text(value: Any) -> str:
    """A JSON value for people: text without quotes, 1.0 as 1."""
    if isinstance(value, str):
        return value
    if value is None:
        return "none"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    try:
        return msgspec.json.encode(value, order="sorted").decode()
    except RecursionError:
        return "nested too deeply to show"
