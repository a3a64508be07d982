"""The descent of descent.py, a group in one program, and what groups span."""

# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..descent import LENGTH, MOMENTA, ROWS, SMALL, STEPS
from ..grid import Grid


def descend(weight: Tensor, costs: Tensor, start: Tensor, grid: Grid, *, tie: int = 1, tie_block: int = 1) -> Tensor:
    """descent._descend, [in]: a group's whole descent in one program, or that of the groups that share their scales,
    because they know of no others. weight [rows, in] of any float dtype; costs, start float32 [in]. With `tie` > 1 the
    group size divides `tie_block`."""
    rows, width = weight.shape
    out = torch.empty_like(start)
    each = tie_block // grid.group_size if tie > 1 else 1  # groups of a head
    _descend[(width // grid.group_size // tie,)](
        weight, costs, start.log(), out, rows, weight.stride(0), -(-rows * tie // ROWS), each, LENGTH, *MOMENTA, SMALL,
        SYMMETRIC=grid.symmetric, STEPS=STEPS, TIE=tie, G=grid.group_size, R=64, num_warps=8,
    )  # fmt: skip
    return out


def spans(weight: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """The squares of what the groups of `weight` [rows, in] times `scale` [in] span, summed over rows: [groups]."""
    rows, width = weight.shape
    count, block = width // grid.group_size, 64
    parts = torch.empty(triton.cdiv(rows, block), count, dtype=torch.float32, device=weight.device)
    _spans[(len(parts), count)](
        weight, scale, parts, rows, weight.stride(0), count, SYMMETRIC=grid.symmetric, G=grid.group_size, R=block
    )
    return parts.sum(0)


@triton.jit
def _span(low, high, SYMMETRIC):  # descent._range
    low = tl.minimum(low, 0.0)
    high = tl.maximum(high, 0.0)
    return tl.maximum(-low, high) if SYMMETRIC else high - low


@triton.jit(do_not_specialize=["rows", "stride", "each"])
def _descend(
    w_ptr, h_ptr, start_ptr, out_ptr, rows, w_stride, stride, each, length, slow, slower, small,
    SYMMETRIC: tl.constexpr, STEPS: tl.constexpr, TIE: tl.constexpr, G: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    g = tl.arange(0, G)
    head = tl.program_id(0) // each * TIE
    first_group = head * each + tl.program_id(0) % each
    logs = tl.load(start_ptr + first_group * G + g)
    mean = tl.zeros((G,), tl.float32)
    squares = tl.zeros((G,), tl.float32)
    slow_left = 1.0
    slower_left = 1.0
    for step in range(STEPS):
        s = tl.exp(logs)
        change = tl.zeros((G,), tl.float32)
        height = 0.0
        for t in range(TIE):
            c = (first_group + t * each) * G + g
            shares = tl.load(h_ptr + c) / (s * s)
            share = tl.sum(shares)
            widening = tl.zeros((G,), tl.float32)
            spanned = 0.0
            for at in range(step % stride, rows, R * stride):
                r = (at + tl.arange(0, R) * stride).to(tl.int64)
                inside = (r < rows)[:, None]
                w = tl.load(w_ptr + r[:, None] * w_stride + c[None, :], mask=inside, other=0.0).to(tl.float32)
                x = w * s[None, :]
                high, top = tl.max(x, 1, return_indices=True)
                low, bottom = tl.min(x, 1, return_indices=True)
                span = _span(low, high, SYMMETRIC)
                spanned += tl.sum(span * span)
                if SYMMETRIC:
                    end = tl.where(high > -low, top, bottom)
                    widening += tl.sum(tl.where(end[:, None] == g[None, :], (span * span)[:, None], 0.0), 0)
                else:
                    up = span * tl.maximum(high, 0.0)
                    down = span * tl.maximum(-low, 0.0)
                    widening += tl.sum(tl.where(top[:, None] == g[None, :], up[:, None], 0.0), 0)
                    widening += tl.sum(tl.where(bottom[:, None] == g[None, :], down[:, None], 0.0), 0)
            change += 2 * (widening * share - spanned * shares)
            height += spanned * share
        slope = change / tl.maximum(height, small)
        mean = slope + slow * (mean - slope)
        squares = slope * slope + slower * (squares - slope * slope)
        slow_left *= slow
        slower_left *= slower
        step_length = length * (1 - step / STEPS) / (1 - slow_left)
        logs -= step_length * mean / (tl.sqrt(squares / (1 - slower_left)) + 1e-8)
    for t in range(TIE):
        tl.store(out_ptr + (first_group + t * each) * G + g, tl.exp(logs))


@triton.jit
def _spans(
    w_ptr, s_ptr, out_ptr, rows, w_stride, count, SYMMETRIC: tl.constexpr, G: tl.constexpr, R: tl.constexpr
):  # fmt: skip
    r = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    c = tl.program_id(1) * G + tl.arange(0, G)
    w = tl.load(w_ptr + r[:, None] * w_stride + c[None, :], mask=(r < rows)[:, None], other=0.0).to(tl.float32)
    x = w * tl.load(s_ptr + c)[None, :]
    span = _span(tl.min(x, 1), tl.max(x, 1), SYMMETRIC)
    tl.store(out_ptr + tl.program_id(0) * count + tl.program_id(1), tl.sum(span * span))
