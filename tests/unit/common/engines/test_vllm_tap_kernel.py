"""The kernel that copies rows inside a CUDA graph gives what torch's own operations give, bit for bit.

Here in Triton's interpreter; on a GPU by name, as CUDA graphs run it, rounding of bfloat16 included:

python -m pytest -m gpu tests/unit/common/engines/test_vllm_tap_kernel.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="pip install '.[hf]'")
pytest.importorskip("triton", reason="vLLM brings it, on Linux")

INTERPRETED = """
import torch
from fpforensics.common.engines.vllm_tap_kernel import copy_rows

torch.manual_seed(0)
for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
    for width in (8, 1025):
        qkv, more = torch.randn(6, 3 * width, dtype=dtype), torch.randn(6, width, dtype=dtype)
        if dtype == torch.bfloat16:  # the interpreter cuts where a GPU rounds: sums that need neither
            qkv, more = qkv.round(), more.round()
        rows = qkv[:, width : 2 * width]  # keys lie between queries and values
        listed, places = torch.tensor([5, 0, 3, 0]), torch.tensor([2, 3, 0, 4])
        for other in (None, more):
            sink = torch.full((5, width), torch.nan, dtype=dtype)
            copy_rows(sink, rows, other, listed, places)
            expected = rows[[3, 5, 0]] if other is None else rows[[3, 5, 0]] + more[[3, 5, 0]]
            assert torch.equal(sink[[0, 2, 3]], expected), (dtype, width, other is None)
            assert torch.isnan(sink[[1, 4]]).all()  # nobody's place, and the place for what nobody wants
        try:
            copy_rows(sink.to(torch.int16), rows, None, listed, places)
        except TypeError as error:
            assert "unrounded" in str(error)
        else:
            raise AssertionError("rows of another dtype went in")
"""


def test_rows_are_summed_and_put_in_their_places() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_cuda_graph_keeps_the_rows_of_each_replay(dtype: str) -> None:
    from torch import nn

    from fpforensics.common.engines.vllm_taps import Taps

    kind = getattr(torch, dtype)

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            vars(self).update(impl=SimpleNamespace(), num_kv_heads=2, head_size=64, kv_cache_dtype="auto")

        def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            return query + 1

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(256, 512, dtype=kind)
            self.attention = Attention()

        def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            query, key, value = self.qkv(rows).split([256, 128, 128], dim=-1)
            return self.attention(query, key, value), rows

    torch.manual_seed(0)
    blocks = [Block().cuda() for _ in range(3)]
    taps = Taps(blocks)
    graphs = {}
    with torch.inference_mode():
        taps.build_in(8, 256, kind, torch.device("cuda"))
        for size in (8, 4):
            static = torch.zeros(size, 256, dtype=kind, device="cuda")
            for block in blocks:
                block(static)  # once without a graph, as vLLM does
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for block in blocks:
                    block(static)
            graphs[size] = graph, static
        taps.plant([0, 2])
        expected: dict[int, tuple[list[torch.Tensor], list[torch.Tensor]]] = {0: ([], []), 2: ([], [])}
        steady = torch.arange(3, device="cuda")
        for step in range(700):  # more rows than the buffer holds
            size = 8 if step % 50 == 0 else 4
            wanted = torch.tensor([6, 1, 4], device="cuda") if size == 8 else steady
            graph, static = graphs[size]
            static.copy_(torch.randn(size, 256, device="cuda"))
            taps.arm(wanted, None if size == 8 else slice(0, 3))
            if step % 30 == 7:
                for block in blocks:
                    block(static)  # and steps without a graph between them
            else:
                graph.replay()
            taps.passed()
            for index, (states, own) in expected.items():
                query, key, _ = blocks[index].qkv(static).split([256, 128, 128], dim=-1)
                states.append((query + 1 + static)[wanted])
                own.append(key[wanted])
        hidden, keys = taps.collect()
    assert set(hidden) == set(keys) == {0, 2}
    for index, (states, own) in expected.items():
        assert torch.equal(torch.cat(hidden[index]), torch.cat(states))
        assert torch.equal(torch.cat(keys[index]), torch.cat(own))
