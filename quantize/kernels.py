"""The quantizer's inner loops as fused GPU kernels, in Triton. Imported only where Triton is installed (fused.py).

What they compute is defined by the plain torch beside their callers (awq.py, clip.py, gptq.py, grid.py), which is also
the path of a CPU; the tests hold the two together. Divisions and roundings are IEEE's, as torch's are, so the same
weight gets the same code on either path.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# ruff: noqa: RUF005 (Triton knows no (*a, b))
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

ROUNDED = 32  # rows that one program rounds
BLOCK = 128  # columns that GPTQ rounds in one call
CHAIN = 16  # columns that it rounds one after another before what they hand on is multiplied
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


def round_block(
    weight: Tensor, target: Tensor, follow: Tensor, scale: Tensor, zero: Tensor, owner: Tensor, codes: Tensor,
    errors: Tensor,
) -> None:  # fmt: skip
    """GPTQ inside one block of columns, last column first; see gptq.py for the order and the names.

    weight, target, errors: float32 [b, rows]; follow: [b, b], column k below its diagonal; scale, zero: float32
    [groups, rows]; owner: int32 [b], the group of each column; codes: uint8 [b, rows]. All but `follow` contiguous.
    Writes codes and errors, and `target` is spent.
    """
    columns, rows = weight.shape
    _round_block[(triton.cdiv(rows, ROUNDED),)](
        weight, target, follow, scale, zero, owner, codes, errors, rows, columns, follow.stride(0), follow.stride(1),
        LEVELS=LEVELS, B=triton.next_power_of_2(max(columns, 16)), C=CHAIN, R=ROUNDED, num_warps=4,
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
            square = torch.zeros(BLOCK, BLOCK, device=device)
            part, owner = square[:, : len(weight)].contiguous(), torch.zeros(BLOCK, dtype=torch.int32, device=device)
            steps, codes = torch.ones(1, len(weight), device=device), torch.empty_like(part, dtype=torch.uint8)
            for follow in (square, square.mT):  # as the tensor cores' factor lies and as cuSOLVER's
                round_block(part, part.clone(), follow, steps, steps, owner, codes, part.clone())
            d = rounding_errors(made, weight, weight[0], None, torch.bfloat16)
            rounding_errors(made, weight, None, weight[:, 0].contiguous(), torch.bfloat16)
            rounding_errors(made, weight, None, None, torch.bfloat16)
            add_row_dots(weight, d, torch.zeros(len(weight), device=device))
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


@triton.jit
def _fetch(at):
    """Ask for what lies there, so that it is near when it is read."""
    tl.inline_asm_elementwise(
        "prefetch.global.L1 [$1]; mov.u32 $0, 0;", "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit(do_not_specialize=["columns", "m_down", "m_right"])
def _round_block(
    w_ptr, t_ptr, m_ptr, scale_ptr, zero_ptr, owner_ptr, q_ptr, e_ptr, rows, columns, m_down, m_right,
    LEVELS: tl.constexpr, B: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    # a thread has a row, in every warp alike: of C columns at a time nothing but their own errors is waited for, and
    # what those hand on to the block's other columns is a product, which the warps share
    r = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    inside = r < rows
    several = tl.arange(0, C)
    every = tl.arange(0, B)
    first = (tl.program_id(0) * R).to(tl.int64)
    column = tl.minimum(every, columns - 1)
    groups = tl.load(owner_ptr + column) * rows + first
    _fetch(w_ptr + column * rows + first)
    _fetch(t_ptr + column * rows + first)
    _fetch(scale_ptr + groups)
    _fetch(zero_ptr + groups)
    chunk = tl.maximum(columns - (columns - 1 - column) // C * C - C, 0)  # where the C columns begin that it is among
    _fetch(m_ptr + column * m_down + chunk * m_right)
    _fetch(m_ptr + tl.minimum(chunk + column % C, columns - 1) * m_down + chunk * m_right)
    for top in range(columns - C, -C, -C):
        ws = ()
        us = ()
        scales = ()
        inverses = ()
        zeros = ()
        for i in tl.static_range(C):
            k = max(top + C - 1 - i, 0)  # what is read twice where columns run out is not written
            group = tl.load(owner_ptr + k) * rows + r
            scale = tl.load(scale_ptr + group, mask=inside, other=1.0)
            ws = ws + (tl.load(w_ptr + k * rows + r, mask=inside, other=0.0),)
            us = us + (tl.load(t_ptr + k * rows + r, mask=inside, other=0.0),)
            scales = scales + (scale,)
            inverses = inverses + (1.0 / scale,)
            zeros = zeros + (tl.load(zero_ptr + group, mask=inside, other=0.0),)
        codes = ()
        errors = ()
        for i in tl.static_range(C):
            m_row = m_ptr + max(top + C - 1 - i, 0) * m_right
            u = us[i]
            for j in tl.static_range(i):
                u += errors[j] * tl.load(m_row + max(top + C - 1 - j, 0) * m_down)
            code = tl.minimum(tl.maximum(libdevice.rint(u * inverses[i]) + zeros[i], 0.0), LEVELS * 1.0)
            codes = codes + (code,)
            errors = errors + (ws[i] - (code - zeros[i]) * scales[i],)
        for i in tl.static_range(C):
            k = top + C - 1 - i
            tl.store(q_ptr + k * rows + r, codes[i].to(tl.uint8), mask=inside & (k >= 0))
            tl.store(e_ptr + k * rows + r, errors[i], mask=inside & (k >= 0))
        tl.debug_barrier()
        if top > 0:
            mine = top + several
            behind = (every < top)[:, None] & inside[None, :]
            e = tl.load(e_ptr + mine[:, None] * rows + r[None, :], mask=inside[None, :], other=0.0)
            m = tl.load(
                m_ptr + mine[None, :] * m_down + every[:, None] * m_right, mask=(every < top)[:, None], other=0.0
            )
            place = t_ptr + every[:, None] * rows + r[None, :]
            t = tl.load(place, mask=behind, other=0.0)
            tl.store(place, tl.dot(m, e, t, input_precision="tf32x3"), mask=behind)
        tl.debug_barrier()
