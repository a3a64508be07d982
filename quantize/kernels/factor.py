"""A square matrix taken in another order, and scaled on both sides, in one pass each."""

# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def taken(gram: Tensor, order: Tensor, by: Tensor, *, lower: bool) -> Tensor:
    """gram[order][:, order] times `by` [in] both ways, float32 [in, in]; with `lower` nothing in particular above the
    diagonal. One program takes a whole row, which stays in the processor's cache while it is gathered."""
    width = len(gram)
    out = torch.empty_like(gram)
    _taken[(width,)](gram, order, by, out, width, LOWER=lower, B=4096, num_warps=16)
    return out


def outer(matrix: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """The square `matrix` [in, in], of any strides, times down[:, None] * right, in its place."""
    width = len(matrix)
    if matrix.stride(0) == 1:  # column-major, as cuSOLVER leaves a factor
        down, right = right, down
    _outer[(width, triton.cdiv(width, 1024))](matrix, down, right, width, B=1024)
    return matrix


@triton.jit
def _taken(h_ptr, order_ptr, by_ptr, out_ptr, width, LOWER: tl.constexpr, B: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    first = tl.load(order_ptr + row) * width
    own = tl.load(by_ptr + row)
    stop = row + 1 if LOWER else width
    for start in range(0, stop, B):
        c = start + tl.arange(0, B)
        inside = c < stop
        column = tl.load(order_ptr + c, mask=inside, other=0)
        h = tl.load(h_ptr + first + column, mask=inside, other=0.0)
        h = h * own * tl.load(by_ptr + c, mask=inside, other=0.0)
        tl.store(out_ptr + row * width + c, h, mask=inside)


@triton.jit
def _outer(m_ptr, down_ptr, right_ptr, width, B: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * B + tl.arange(0, B)
    inside = c < width
    at = m_ptr + row * width + c
    by = tl.load(down_ptr + row) * tl.load(right_ptr + c, mask=inside, other=0.0)
    tl.store(at, tl.load(at, mask=inside, other=0.0) * by, mask=inside)
