"""The quantizer's inner loops as fused GPU kernels, in Triton. Imported only where Triton is installed (fused.py).

What they compute is defined by the plain torch beside their callers (awq.py, clip.py, gptq.py, grid.py), which is also
the path of a CPU; the tests hold the two together. Divisions and roundings are IEEE's, as torch's are, so the same
weight gets the same code on either path.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from .clip import SHARES
from .descent import LENGTH, MOMENTA, ROWS, SMALL, STEPS
from .grid import HUGE, LEVELS, MIDDLE, TINY, Grid, Quantized

ROUNDED = 4  # rows that one warp rounds: a column waits for the one before it, so many warps must be under way
BLOCK = 128  # columns that GPTQ rounds in one piece
PLAIN = {"enable_fp_fusion": False}  # a fused multiply-add rounds once where torch rounds twice


def scaled_errors(weight: Tensor, scales: Tensor, grid: Grid, out: Tensor) -> Tensor:
    """fake(w s) / s - w for each s in `scales` [n, in], float32 into `out` [n, rows, in]; weight [rows, in] of any
    float dtype. All contiguous."""
    rows, width = weight.shape
    block = 32
    _scaled_errors[(triton.cdiv(rows, block), width // grid.group_size, len(scales))](
        weight, scales, out, rows, width, **_grid(grid), **PLAIN, G=grid.group_size, R=block
    )
    return out


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


def taken(gram: Tensor, order: Tensor, by: Tensor) -> Tensor:
    """gram[order][:, order] times `by` [in] both ways, float32 [in, in]."""
    width = len(gram)
    out = torch.empty_like(gram)
    _taken[(width, triton.cdiv(width, 1024))](gram, order, by, out, width, B=1024)
    return out


def outer(matrix: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """The square `matrix` [in, in], of any strides, times down[:, None] * right, in its place."""
    width = len(matrix)
    if matrix.stride(0) == 1:  # column-major, as cuSOLVER leaves a factor
        down, right = right, down
    _outer[(width, triton.cdiv(width, 1024))](matrix, down, right, width, B=1024)
    return matrix


def round_block(
    weight: Tensor, target: Tensor, feedback: Tensor, scale: Tensor, zero: Tensor, owner: Tensor, codes: Tensor,
    errors: Tensor,
) -> None:  # fmt: skip
    """GPTQ inside one block of columns, last column first; see gptq.py for the order and the names.

    weight, target, errors: float32 [rows, b], rows apart by a stride; feedback [b, b], column k below its diagonal;
    scale, zero: float32 [rows, groups]; owner: int32 [b], the group of each column; codes: uint8 [rows, b]. Writes
    codes and errors.
    """
    rows, columns = weight.shape
    block = ROUNDED
    _round_block[(triton.cdiv(rows, block),)](
        weight, target, feedback, scale, zero, owner, codes, errors, rows, scale.shape[1],
        weight.stride(0), target.stride(0), feedback.stride(0), feedback.stride(1), codes.stride(0), errors.stride(0),
        **PLAIN, LEVELS=LEVELS, B=columns, R=block, num_warps=1,
    )  # fmt: skip


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


def warm(grid: Grid, widths: Sequence[int], device: torch.device) -> None:
    """Compile every kernel that inputs of these widths will need, on a few rows, beside whatever else is under way."""
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream()):
        for width in dict.fromkeys(widths):
            weight = torch.zeros(32, width, device=device)
            count = width // grid.group_size
            blocks = torch.zeros(count, grid.group_size, grid.group_size, device=device)
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                if dtype in (grid.scale_dtype, torch.float32):
                    scaled_errors(weight.to(dtype), torch.ones(1, width, device=device), grid, weight.clone()[None])
            stored = weight.to(grid.scale_dtype)
            descend(stored, weight[0], weight[0] + 1, grid)
            spans(stored, weight[0], grid)
            best_shrink(weight, blocks, grid, SHARES)
            made = quantize(weight, grid, best_shrink(weight, blocks[:, 0].flatten(), grid, SHARES))
            part, square = weight[:, :BLOCK], torch.zeros(BLOCK, BLOCK, device=device)
            owner = torch.zeros(BLOCK, dtype=torch.int32, device=device)
            zero = made.zero.float()
            round_block(part, part.contiguous(), square.mT, made.scale, zero, owner, made.q[:, :BLOCK], part.clone())
        torch.cuda.current_stream().synchronize()


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
def _taken(h_ptr, order_ptr, by_ptr, out_ptr, width, B: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * B + tl.arange(0, B)
    inside = c < width
    column = tl.load(order_ptr + c, mask=inside, other=0)
    h = tl.load(h_ptr + tl.load(order_ptr + row) * width + column, mask=inside, other=0.0)
    h = h * tl.load(by_ptr + row) * tl.load(by_ptr + c, mask=inside, other=0.0)
    tl.store(out_ptr + row * width + c, h, mask=inside)


@triton.jit
def _outer(m_ptr, down_ptr, right_ptr, width, B: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * B + tl.arange(0, B)
    inside = c < width
    at = m_ptr + row * width + c
    by = tl.load(down_ptr + row) * tl.load(right_ptr + c, mask=inside, other=0.0)
    tl.store(at, tl.load(at, mask=inside, other=0.0) * by, mask=inside)


@triton.jit
def _round_block(
    w_ptr, t_ptr, m_ptr, scale_ptr, zero_ptr, owner_ptr, q_ptr, e_ptr, rows, groups,
    w_stride, t_stride, m_down, m_right, q_stride, e_stride,
    LEVELS: tl.constexpr, B: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    r = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    inside = r < rows
    column = tl.arange(0, B)
    e = tl.zeros((R, B), tl.float32)
    # what a column needs is loaded while the one before is rounded: the chain of columns waits for no memory
    k = B - 1
    m = tl.load(m_ptr + column * m_down + k * m_right, mask=column > k, other=0.0)
    w = tl.load(w_ptr + r * w_stride + k, mask=inside, other=0.0)
    t = tl.load(t_ptr + r * t_stride + k, mask=inside, other=0.0)
    owner = tl.load(owner_ptr + k)
    scale = tl.load(scale_ptr + r * groups + owner, mask=inside, other=1.0)
    zero = tl.load(zero_ptr + r * groups + owner, mask=inside, other=0.0)
    owner = tl.load(owner_ptr + max(k - 1, 0))
    for step in range(B):
        k = B - 1 - step
        coming = max(k - 1, 0)
        next_m = tl.load(m_ptr + column * m_down + coming * m_right, mask=column > coming, other=0.0)
        next_w = tl.load(w_ptr + r * w_stride + coming, mask=inside, other=0.0)
        next_t = tl.load(t_ptr + r * t_stride + coming, mask=inside, other=0.0)
        next_scale = tl.load(scale_ptr + r * groups + owner, mask=inside, other=1.0)
        next_zero = tl.load(zero_ptr + r * groups + owner, mask=inside, other=0.0)
        owner = tl.load(owner_ptr + max(k - 2, 0))
        code = _code(t + tl.sum(e * m[None, :], 1), scale, zero, LEVELS)
        error = w - (code - zero) * scale
        tl.store(q_ptr + r * q_stride + k, code.to(tl.uint8), mask=inside)
        e = tl.where((column == k)[None, :], error[:, None], e)
        m = next_m
        w = next_w
        t = next_t
        scale = next_scale
        zero = next_zero
    tl.store(e_ptr + r[:, None] * e_stride + column[None, :], e, mask=inside[:, None])
