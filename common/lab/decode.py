"""From the undecoded numbers of a run to arrays; each complaint begins with the path in the document."""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from fpforensics.common.contents import LOGPROB_SLACK
from fpforensics.common.errors import shorten
from fpforensics.common.lab.document import TokenId, TopDoc
from fpforensics.common.lab.run import Layered, Place, Ranked, RunSignals, Vectors
from fpforensics.common.signals import Signal
from fpforensics.common.words import counted

_floats = msgspec.json.Decoder(list[float])
_ids = msgspec.json.Decoder(list[TokenId])
_LAYER = re.compile(r"layer_[1-9][0-9]{0,8}")
_POSITION = re.compile(r"pos_-([1-9][0-9]{0,8})")
# Padding of ragged lists may cost this many times what was listed: one endless list must not widen all the others.
_PADDING = 16
_PADDED_ANYWAY = 1 << 20


class WrongError(ValueError):
    """A value does not fit; the message begins with its path."""


def decode_signals(steps: list[tuple[str, int, Any]]) -> RunSignals:
    """The signals of one phase. ``steps`` are (path, step number, step)."""
    vectors: dict[Layered, Vectors] = {}
    signals: tuple[Signal, ...] = ("hidden_states", "key_vectors")
    for signal in signals:
        leaves: dict[str, list[tuple[str, Place, msgspec.Raw]]] = {}
        for path, step, each in steps:
            for layer, positions in getattr(each, signal).items():
                if not _LAYER.fullmatch(layer):
                    raise WrongError(f"{path}.{signal}: layer {shorten(layer)!r} is not named like layer_12")
                found = _in_order(positions, f"{path}.{signal}.{layer}")
                leaves.setdefault(layer, []).extend((where, (step, at), raw) for where, at, raw in found)
        for layer, rows in leaves.items():
            if rows:
                vectors[signal, layer] = _vectors(rows)
    tops = [
        (where, (step, at), top)
        for path, step, each in steps
        for where, at, top in _in_order(each.logprobs, f"{path}.logprobs")
    ]
    return RunSignals(_ranked(tops) if tops else None, vectors)


def decode_ids(raw: msgspec.Raw, where: str) -> list[int]:
    """A list of token ids."""
    ids: list[int] = _decode(_ids, raw, where)
    return ids


def _in_order(positions: Mapping[str, Any], path: str) -> list[tuple[str, int, Any]]:
    """(path, position, value) from the first position to the last."""
    found = []
    for name, value in positions.items():
        match = _POSITION.fullmatch(name)
        if match is None:
            raise WrongError(f"{path}: position {shorten(name)!r} is not named like pos_-1")
        found.append((f"{path}.{name}", -int(match[1]), value))
    return sorted(found, key=lambda each: each[1])


def _vectors(rows: list[tuple[str, Place, msgspec.Raw]]) -> Vectors:
    width = -1
    for index, (where, _, raw) in enumerate(rows):
        numbers = _decode(_floats, raw, where)
        if width < 0:
            width = len(numbers)
            values = np.empty((len(rows), width), np.float64)
            pack = struct.Struct(f"{width}d")  # several times as fast as assigning a list to an array
        if len(numbers) != width or not width:
            raise WrongError(
                f"{where}: {counted(len(numbers), 'value')}, {width} in {rows[0][0]}"
                if width
                else f"{where}: no values"
            )
        pack.pack_into(values.data, 8 * width * index, *numbers)
    return Vectors(tuple(place for _, place, _ in rows), values)


def _ranked(tops: list[tuple[str, Place, TopDoc]]) -> Ranked:
    listed: list[tuple[list[int], list[float]]] = []
    for where, _, top in tops:
        ids, values = (
            decode_ids(top.token_ids, f"{where}.token_ids"),
            _decode(_floats, top.log_probs, f"{where}.log_probs"),
        )
        if len(ids) != len(values):
            raise WrongError(f"{where}: {len(values)} log_probs for {len(ids)} token_ids")
        if not ids:
            raise WrongError(f"{where}: no token_ids")
        if len(set(ids)) != len(ids):
            raise WrongError(f"{where}: token id {Counter(ids).most_common(1)[0][0]} is listed twice")
        if max(values) > LOGPROB_SLACK:
            raise WrongError(f"{where}: log_prob {max(values)} is above 0")
        listed.append((ids, values))
    most = max(len(ids) for ids, _ in listed)
    if most * len(listed) > max(_PADDED_ANYWAY, _PADDING * sum(len(ids) for ids, _ in listed)):
        where = next(where for (where, _, _), (ids, _) in zip(tops, listed, strict=True) if len(ids) == most)
        raise WrongError(f"{where}: {most} token_ids, far more than at other positions")
    padded, logprobs = np.full((len(listed), most), -1, np.int64), np.full((len(listed), most), np.nan)
    for row, (ids, values) in enumerate(listed):
        padded[row, : len(ids)], logprobs[row, : len(ids)] = ids, values
    return Ranked(tuple(place for _, place, _ in tops), padded, logprobs)


def _decode(decoder: Any, raw: msgspec.Raw, where: str) -> Any:
    try:
        return decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        problem, _, at = str(error).partition(" - at `$")
        raise WrongError(f"{where}{at.rstrip('`')}: {shorten(problem, 100)}") from None
