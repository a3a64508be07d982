"""What rounding does to a weight, as judge.py weighs it: in one pass, and in 16 bits."""

# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..grid import Quantized


def rounding_errors(
    found: Quantized, weight: Tensor, columns: Tensor | None, rows: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """What `found` makes of float32 `weight` [rows, in], less it, divided by `columns` [in] and times `rows` [rows]
    where these are given: [rows, in] in `dtype`."""
    height, width = weight.shape
    count, block = width // found.group_size, 32
    out = torch.empty(height, width, dtype=dtype, device=weight.device)
    _rounding_errors[(triton.cdiv(height, block), count)](
        found.q, found.scale, found.zero, weight, weight if columns is None else columns,
        weight if rows is None else rows, out, height, found.q.stride(0), count, weight.stride(0), width,
        COLUMNS=columns is not None, ROWS=rows is not None, G=found.group_size, R=block,
    )  # fmt: skip
    return out


def add_row_dots(one: Tensor, other: Tensor, out: Tensor) -> None:
    """Add to `out` float32 [rows] the products of the rows of float32 `one` and 16-bit `other`, both [rows, n]."""
    _add_row_dots[(len(one),)](one, other, out, one.shape[1], one.stride(0), other.stride(0), B=1024)


@triton.jit
def _rounding_errors(
    q_ptr, scale_ptr, zero_ptr, w_ptr, column_ptr, row_ptr, out_ptr, rows, q_stride, s_stride, w_stride, o_stride,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, G: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    r = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    group = tl.program_id(1)
    c = group * G + tl.arange(0, G)
    here = r < rows
    inside = here[:, None]
    q = tl.load(q_ptr + r[:, None] * q_stride + c[None, :], mask=inside, other=0).to(tl.float32)
    w = tl.load(w_ptr + r[:, None] * w_stride + c[None, :], mask=inside, other=0.0)
    scale = tl.load(scale_ptr + r * s_stride + group, mask=here, other=0.0)
    zero = tl.load(zero_ptr + r * s_stride + group, mask=here, other=0).to(tl.float32)
    d = (q - zero[:, None]) * scale[:, None] - w
    if COLUMNS:
        d = d / tl.load(column_ptr + c)[None, :]
    if ROWS:
        d = d * tl.load(row_ptr + r, mask=here, other=0.0)[:, None]
    tl.store(out_ptr + r[:, None] * o_stride + c[None, :], d.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _add_row_dots(a_ptr, b_ptr, out_ptr, width, a_stride, b_stride, B: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    dots = tl.zeros((B,), tl.float32)
    for start in range(0, width, B):
        c = start + tl.arange(0, B)
        a = tl.load(a_ptr + row * a_stride + c, mask=c < width, other=0.0)
        b = tl.load(b_ptr + row * b_stride + c, mask=c < width, other=0.0)
        dots += a * b.to(tl.float32)
    tl.store(out_ptr + row, tl.load(out_ptr + row) + tl.sum(dots, 0))
