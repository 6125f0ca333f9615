"""Concurrent work on a GPU: products on a second stream, timed by events of the device's own clock."""

from __future__ import annotations

from typing import Literal

import torch

from fpforensics.common.engines.overlap import Burst
from fpforensics.common.errors import ReplayError

SIZES = (8192, 4096, 2048, 1024)
"""The first whose three matrices take no more than half of the memory that is free."""
BURST_SECONDS = 0.02  # long beside what a thread may wait for Python's lock
_BYTES = 2


class StreamProducts:
    """Products in bf16 for half of the time: a burst, then a pause of its length."""

    kind: Literal["cuda-stream", "threads"] = "cuda-stream"
    dtype = "bf16"
    duty = 0.5

    def __init__(self, device: str) -> None:
        found = torch.device(device)
        self._device = found if found.index is not None else torch.device(found.type, torch.cuda.current_device())
        # One stream for the engine's life: what the allocator keeps for it is used again by the next generation.
        self._stream = torch.cuda.Stream(self._device)
        self._matrices: tuple[torch.Tensor, ...] = ()
        self._size = 0
        self._in_burst = 1
        self._origin = _event()

    @property
    def size(self) -> int:
        """N of the N × N matrices."""
        return self._size

    def prepare(self) -> None:
        """Allocate, and see how many products make a burst while nothing else runs."""
        torch.cuda.set_device(self._device)  # the current device is each thread's own
        self._size = self._size or self._fitting()
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            generator = torch.Generator(self._device).manual_seed(0)  # the global one is the engine's
            shape, dtype = (self._size, self._size), torch.bfloat16
            factors = [torch.randn(shape, generator=generator, dtype=dtype, device=self._device) for _ in range(2)]
            self._matrices = (*factors, torch.empty(shape, dtype=dtype, device=self._device))
        self._origin = _event()
        self._origin.record(self._stream)
        self._in_burst = 1
        self.burst()  # the first one loads the kernel
        alone = self.burst()
        self._in_burst = max(1, round(BURST_SECONDS / max(alone.end - alone.start, 1e-6)))

    def burst(self) -> Burst:
        """Products back to back, from the event before the first to the one after the last."""
        start, end = _event(), _event()
        a, b, product = self._matrices
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            start.record(self._stream)
            for _ in range(self._in_burst):
                torch.mm(a, b, out=product)
            end.record(self._stream)
        end.synchronize()
        return Burst(self._at(start), self._at(end), self._in_burst)

    def now(self) -> float:
        """When everything that the calling thread has put on its own stream is done."""
        event = _event()
        event.record(torch.cuda.current_stream(self._device))
        event.synchronize()
        return self._at(event)

    def free(self) -> None:
        """Give the matrices back to torch's allocator, once nothing on the stream reads them."""
        self._stream.synchronize()
        self._matrices = ()

    def _at(self, event: torch.cuda.Event) -> float:
        """Seconds of the device's clock since the origin; both events have passed."""
        return float(self._origin.elapsed_time(event)) / 1000.0

    def _fitting(self) -> int:
        free, _ = torch.cuda.mem_get_info(self._device)
        for size in SIZES:
            if 3 * _BYTES * size * size <= free // 2:
                return size
        raise ReplayError(
            f"concurrent=true: {free} bytes are free on {self._device}, too few for products of {SIZES[-1]}²",
            "use a smaller model or batch, or concurrent=false",
        )


def _event() -> torch.cuda.Event:
    # blocking: who waits for it sleeps, and takes no core from the engine
    return torch.cuda.Event(enable_timing=True, blocking=True)
