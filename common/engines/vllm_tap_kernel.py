"""One kernel for what an operator of ours does inside a CUDA graph. Imported on a GPU only, where vLLM brings Triton.

In torch's own operations a tap is two selections, a sum and a copy, and a model has two taps in each block: 0.2 ms of each step of a
small model, wanted or not. Here it is one launch, which does nothing where no row is wanted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024


@triton.jit  # type: ignore[untyped-decorator]
def _copy_rows(  # type: ignore[no-untyped-def]
    rows,
    more,
    sink,
    listed,
    places,
    width,
    rows_stride,
    more_stride,
    room,
    both: tl.constexpr,
    block: tl.constexpr,
):
    number = tl.program_id(0)
    place = tl.load(places + number)
    if place < room:
        row = tl.load(listed + number)
        columns = tl.program_id(1) * block + tl.arange(0, block)
        inside = columns < width
        value = tl.load(rows + row * rows_stride + columns, mask=inside)
        if both:
            other = tl.load(more + row * more_stride + columns, mask=inside)
            if value.dtype == tl.float64:
                value = value + other
            else:  # as torch adds: in float32, rounded once
                value = (value.to(tl.float32) + other.to(tl.float32)).to(value.dtype)
        tl.store(sink + place * width + columns, value, mask=inside)


def copy_rows(
    sink: torch.Tensor,
    rows: torch.Tensor,
    more: torch.Tensor | None,
    listed: torch.Tensor,
    places: torch.Tensor,
) -> None:
    """``sink[places] = rows[listed] + more[listed]``, where a place is one of the sink's, but for the last.

    ``sink`` (room + 1, D); ``rows``, ``more`` (T, D); ``listed``, ``places`` (N,) int64. Raises :class:`TypeError` for rows of another
    dtype than the sink's, which would be rounded.
    """
    width, other = sink.shape[1], rows if more is None else more
    if not rows.dtype == other.dtype == sink.dtype:
        raise TypeError(f"rows of {rows.dtype} and {other.dtype} do not go into a buffer of {sink.dtype} unrounded")
    assert sink.is_contiguous() and rows.shape[1] == other.shape[1] == width and rows.stride(1) == other.stride(1) == 1
    grid = (len(listed), triton.cdiv(width, _BLOCK))
    _copy_rows[grid](
        rows,
        other,
        sink,
        listed,
        places,
        width,
        rows.stride(0),
        other.stride(0),
        len(sink) - 1,
        both=more is not None,
        block=_BLOCK,
    )
