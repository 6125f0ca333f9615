"""Which rows of a forward are wanted, and what they decide: placed once, and moved on while steps only move on.

B is the requests of one forward, R its wanted rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from fpforensics.common.engines.vllm_jobs import Task
from fpforensics.common.signals import Array

_ROWS_AT_ONCE = 64


class Step:
    """The wanted rows of one forward: first those that decide nothing, request by request, then the deciding ones."""

    def __init__(self) -> None:
        self.wanted: list[tuple[str, int]] = []
        self.products: list[tuple[int, int]] = []
        self.extra = 0
        self.of_every_request = False  # the deciding rows are all of the logits, in order
        self.is_steady = False  # and there are no others: each request computes one position, and it is wanted, or none of the job's is
        self.span: slice | None = None  # the wanted rows, where they are neighbours in order
        self.deciding: list[tuple[Task | None, int]] = []  # for each request: its task and which token it names now
        self._others: list[tuple[str, int, int, int]] = []  # task, slot, row, next id
        self._last: list[tuple[str, int, int, int]] = []  # task, slot, row, request

    def place(self, index: int, task: Task, start: int, length: int, offset: int, slots: Mapping[int, int]) -> None:
        """One request's share: positions from ``start`` on lie in rows from ``offset`` on. ``slots``: wanted position -> slot."""
        end = start + length
        number = end - len(task.fed_ids)
        self.deciding.append((task if number >= 0 else None, number))
        before = len(self._others)
        for position in range(start, end):
            slot = slots.get(position)
            if slot is None:
                continue
            row = offset + position - start
            if number >= 0 and position == end - 1:
                self._last.append((task.key, slot, row, index))
            else:
                self._others.append((task.key, slot, row, int(task.fed_ids[position + 1])))
        for first in range(before, len(self._others), _ROWS_AT_ONCE):
            self.products.append((first, min(first + _ROWS_AT_ONCE, len(self._others))))

    def upload(self, claimed_row: dict[str, int], device: torch.device, idle: bool) -> None:
        """All indices in one transfer. ``idle``: one position of each request, and none of this job's is wanted."""
        self.extra = len(self._others)
        every = [*self._others, *self._last]
        first = every[0][2] if every else 0
        if every and all(row == first + i for i, (_, _, row, _) in enumerate(every)):
            self.span = slice(first, first + len(every))
        self.wanted = [(key, slot) for key, slot, _, _ in every]
        every_request = list(range(len(self.deciding)))
        self.of_every_request = [request for *_, request in self._last] == every_request
        self.is_steady = self.of_every_request and [row for _, _, row, _ in every] == every_request
        self.is_steady |= idle and all(task is not None for task, _ in self.deciding)
        measured = [int(task is not None and not task.greedy) for task, _ in self.deciding]
        packed = torch.tensor(
            [row for _, _, row, _ in every]
            + [claimed_row[key] + slot for key, slot, _, _ in every]
            + [last for _, _, _, last in every]
            + measured,
            dtype=torch.int64,
            pin_memory=device.type == "cuda",
        ).to(device, non_blocking=True)
        count = len(every)
        self.rows_R = packed[:count]
        self.claims = packed[count : 2 * count]
        self.next_ids = packed[2 * count : 2 * count + self.extra]
        self.requests = packed[2 * count + self.extra : 3 * count]
        self.measured_B = packed[3 * count :].bool()


class Run:
    """Steps that differ in nothing but that every request is one position further: each is the last one, moved on."""

    def __init__(self, request_ids: Sequence[str], starts: Array, step: Step, claimed: bool) -> None:
        self._request_ids, self._claimed = list(request_ids), claimed
        self.starts, self.step = starts, step
        self._last = np.array([_last_of_run(task.positions) for task, _ in step.deciding if task is not None])
        if not step.wanted:
            self._last[:] = np.iinfo(np.int64).max

    def next(self, request_ids: Sequence[str], starts: Array, lengths: Array) -> Step | None:
        """The next step, or None where it is another kind."""
        if list(request_ids) != self._request_ids or not (lengths == 1).all():
            return None
        if not np.array_equal(starts, self.starts + 1) or (starts > self._last).any():
            return None
        before, step = self.step, Step()
        step.wanted = [(key, slot + 1) for key, slot in before.wanted]
        step.deciding = [(task, number + 1) for task, number in before.deciding]
        step.of_every_request, step.is_steady = before.of_every_request, True
        step.span, step.rows_R, step.requests = before.span, before.rows_R, before.requests
        step.next_ids, step.measured_B = before.next_ids, before.measured_B
        step.claims = before.claims + 1 if self._claimed else before.claims
        self.starts, self.step = starts, step
        return step


def _last_of_run(positions: Array) -> int:
    """The last of neighbouring positions; -1 where there are gaps, or none."""
    count = len(positions)
    return int(positions[-1]) if count and int(positions[-1]) - int(positions[0]) == count - 1 else -1
