"""Rounding to nearest, clipped and scaled, as grid.py, clip.py and awq.py define it. Divisions and roundings are as
IEEE has them, and torch, so the same weight gets the same code on either path.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from ..grid import HUGE, LEVELS, MIDDLE, TINY, Grid, Quantized

PLAIN = {"enable_fp_fusion": False}  # a fused multiply-add rounds once where torch rounds twice


def quantize(weight: Tensor, grid: Grid, shrink: Tensor) -> Quantized:
    """Round [rows, in] float32 to nearest on the grid that `shrink` [rows, groups] clips."""
    rows, width = weight.shape
    count = width // grid.group_size
    codes = torch.empty(rows, width, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(rows, count, dtype=torch.float32, device=weight.device)
    zero = torch.empty(rows, count, dtype=torch.uint8, device=weight.device)
    block = 32
    _quantize[(triton.cdiv(rows, block), count)](
        weight, shrink, codes, scale, zero, rows, weight.stride(0), count,
        **_grid(grid), **PLAIN, G=grid.group_size, R=block,
    )  # fmt: skip
    return Quantized(codes, scale, zero, grid.group_size, grid.symmetric)


def scaled_errors(weight: Tensor, scales: Tensor, grid: Grid, out: Tensor) -> Tensor:
    """fake(w s) / s - w for each s in `scales` [n, in], float32 into `out` [n, rows, in]; weight [rows, in] of any
    float dtype. All contiguous."""
    rows, width = weight.shape
    block = 32
    _scaled_errors[(triton.cdiv(rows, block), width // grid.group_size, len(scales))](
        weight, scales, out, rows, width, **_grid(grid), **PLAIN, G=grid.group_size, R=block
    )
    return out


def best_shrink(weight: Tensor, costs: Tensor, grid: Grid, shares: tuple[float, ...]) -> Tensor:
    """Per row and group the entry of `shares` that loses least, float32 [rows, groups].

    weight float32 [rows, in]; costs float32, as in clip.py: blocks [groups, g, g], or [in].
    """
    rows, width = weight.shape
    count = width // grid.group_size
    table = torch.tensor(shares, dtype=torch.float32, device=weight.device)
    best = torch.empty(rows, count, dtype=torch.float32, device=weight.device)
    block = 64
    _best_shrink[(triton.cdiv(rows, block), count)](
        weight, costs, table, best, rows, weight.stride(0), count,
        **_grid(grid), **PLAIN, BLOCKS=costs.ndim == 3, N=len(shares), G=grid.group_size, R=block, num_warps=8,
    )  # fmt: skip
    return best


def _grid(grid: Grid) -> dict[str, Any]:
    return {
        "SYMMETRIC": grid.symmetric,
        "BF16": grid.scale_dtype == torch.bfloat16,
        "TINY": TINY,
        "HUGE": HUGE,
        "LEVELS": LEVELS,
        "MIDDLE": MIDDLE,
    }


@triton.jit
def _fit(low, high, SYMMETRIC, BF16, TINY, HUGE, LEVELS, MIDDLE):  # grid.fit
    low = tl.minimum(low, 0.0)
    high = tl.maximum(high, 0.0)
    if SYMMETRIC:
        scale = tl.maximum(-low, high) / MIDDLE  # a power of two: exact
    else:
        scale = tl.div_rn(high - low, LEVELS * 1.0)
    scale = tl.minimum(tl.maximum(scale, TINY), HUGE)
    if BF16:
        scale = scale.to(tl.bfloat16).to(tl.float32)
    scale = scale.to(tl.float16).to(tl.float32)
    if SYMMETRIC:
        zero = tl.zeros_like(scale) + MIDDLE
        scale = tl.where(high > -low, -scale, scale)
    else:
        zero = tl.minimum(tl.maximum(libdevice.rint(tl.div_rn(-low, scale)), 0.0), LEVELS * 1.0)
    return scale, zero


@triton.jit
def _code(x, scale, zero, LEVELS):
    return tl.minimum(tl.maximum(libdevice.rint(tl.div_rn(x, scale)) + zero, 0.0), LEVELS * 1.0)


@triton.jit
def _quantize(
    w_ptr, shrink_ptr, q_ptr, scale_ptr, zero_ptr, rows, w_stride, count,
    SYMMETRIC: tl.constexpr, BF16: tl.constexpr, TINY: tl.constexpr, HUGE: tl.constexpr, LEVELS: tl.constexpr,
    MIDDLE: tl.constexpr, G: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    r = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    group = tl.program_id(1)
    c = group * G + tl.arange(0, G)
    inside = r < rows
    w = tl.load(w_ptr + r[:, None] * w_stride + c[None, :], mask=inside[:, None], other=0.0)
    p = tl.load(shrink_ptr + r * count + group, mask=inside, other=1.0)
    scale, zero = _fit(tl.min(w, 1) * p, tl.max(w, 1) * p, SYMMETRIC, BF16, TINY, HUGE, LEVELS, MIDDLE)
    code = _code(w, scale[:, None], zero[:, None], LEVELS)
    tl.store(q_ptr + r[:, None] * (count * G) + c[None, :], code.to(tl.uint8), mask=inside[:, None])
    tl.store(scale_ptr + r * count + group, scale, mask=inside)
    tl.store(zero_ptr + r * count + group, zero.to(tl.uint8), mask=inside)


@triton.jit
def _scaled_errors(
    w_ptr, s_ptr, d_ptr, rows, width,
    SYMMETRIC: tl.constexpr, BF16: tl.constexpr, TINY: tl.constexpr, HUGE: tl.constexpr, LEVELS: tl.constexpr,
    MIDDLE: tl.constexpr, G: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    r = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    c = tl.program_id(1) * G + tl.arange(0, G)
    n = tl.program_id(2).to(tl.int64)
    inside = (r < rows)[:, None]
    w = tl.load(w_ptr + r[:, None] * width + c[None, :], mask=inside, other=0.0).to(tl.float32)
    s = tl.load(s_ptr + n * width + c)[None, :]
    x = w * s
    scale, zero = _fit(tl.min(x, 1), tl.max(x, 1), SYMMETRIC, BF16, TINY, HUGE, LEVELS, MIDDLE)
    y = (_code(x, scale[:, None], zero[:, None], LEVELS) - zero[:, None]) * scale[:, None]
    d = tl.div_rn(y, s + tl.zeros_like(y)) - w
    tl.store(d_ptr + n * rows * width + r[:, None] * width + c[None, :], d, mask=inside)


@triton.jit
def _best_shrink(
    w_ptr, h_ptr, share_ptr, best_ptr, rows, w_stride, count,
    SYMMETRIC: tl.constexpr, BF16: tl.constexpr, TINY: tl.constexpr, HUGE: tl.constexpr, LEVELS: tl.constexpr,
    MIDDLE: tl.constexpr, BLOCKS: tl.constexpr, N: tl.constexpr, G: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    r = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    group = tl.program_id(1)
    g = tl.arange(0, G)
    inside = r < rows
    w = tl.load(w_ptr + r[:, None] * w_stride + (group * G + g)[None, :], mask=inside[:, None], other=0.0)
    if BLOCKS:
        h = tl.load(h_ptr + group.to(tl.int64) * G * G + g[:, None] * G + g[None, :])
    else:
        h = tl.load(h_ptr + group * G + g)[None, :]
    low = tl.min(w, 1)
    high = tl.max(w, 1)
    best = tl.full((R,), float("inf"), tl.float32)
    share = tl.full((R,), 1.0, tl.float32)
    for n in range(N):
        p = tl.load(share_ptr + n)
        scale, zero = _fit(low * p, high * p, SYMMETRIC, BF16, TINY, HUGE, LEVELS, MIDDLE)
        code = _code(w, scale[:, None], zero[:, None], LEVELS)
        d = (code - zero[:, None]) * scale[:, None] - w
        if BLOCKS:
            loss = tl.sum(tl.dot(d, h, input_precision="tf32x3") * d, 1)
        else:
            loss = tl.sum(d * h * d, 1)
        better = loss < best
        best = tl.where(better, loss, best)
        share = tl.where(better, p, share)
    tl.store(best_ptr + r * count + group, share, mask=inside)
