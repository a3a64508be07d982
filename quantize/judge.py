"""What was found for a linear held against plain rounding, row by row; the better of the two is kept.

An error is what it makes of the linear's output, d H d^T (method.output_squares), with every moved scale moved back.
Knows nothing of how the codes were found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from .awq import Scaled
from .family import Group
from .fused import fused
from .grid import Grid, Quantized, dequantize, quantize, rows_of, split_rows, stacked
from .method import Problem, output_squares
from .ranks import whole

PIECE = 2**25  # weights judged at a time, float32
STRIP = 4096  # columns of H, about, multiplied at a time: what lies below its diagonal is left out in such steps

Weigh = Callable[[Tensor], Tensor]  # [rows, in] to [rows]


def nearest(weight: Tensor, grid: Grid, shrink: Tensor | None = None) -> Quantized:
    """Round-to-nearest of float32 [rows, in] on the grid that `shrink` [rows, groups] clips, by the fastest way."""
    if shrink is None:
        shrink = torch.ones(weight.shape[0], weight.shape[1] // grid.group_size, device=weight.device)
    kernels = fused(weight)
    return kernels.quantize(weight, grid, shrink) if kernels else quantize(weight, grid, shrink=shrink)


def weighing(gram: Tensor | None) -> Weigh:
    """method.output_squares for this H [in, in], which is not needed any more then. On a GPU in 16 bits, which is
    enough to weigh errors by, and of the symmetric H only the upper half."""
    if gram is None or not gram.is_cuda:
        return partial(output_squares, gram=gram)
    kernels, half = fused(gram), gram.bfloat16()
    if kernels is None:
        return partial(output_squares, gram=half)
    width = len(half)
    strip = -(-width // max(1, width // STRIP) // 128) * 128
    for start in range(strip, width, strip):
        half[:start, start : start + strip] *= 2  # for what mirrors it below the diagonal

    def squares(rows: Tensor) -> Tensor:
        rows, sums = rows.bfloat16(), torch.zeros(len(rows), device=rows.device)
        for start in range(0, width, strip):
            stop = min(start + strip, width)
            product = torch.mm(rows[:, :stop], half[:stop, start:stop], out_dtype=torch.float32)
            kernels.add_row_dots(product, rows[:, start:stop], sums)
        return sums

    return squares


def judged(
    problem: Problem, moved: Scaled, group: Group, shares: list[slice], rounded: Quantized, aim: Tensor | None,
    weigh: Weigh, grid: Grid, *, tried: bool,
) -> tuple[dict[str, Quantized], dict[str, Tensor]]:  # fmt: skip
    """Each of the group's linears, whole, its rows no worse by `weigh` than rounding leaves them where more was
    `tried`; and what `_better` sums over this rank's rows."""
    heights = [s.stop - s.start for s in shares]
    parts = split_rows(rounded, heights)
    aims = [None] * len(parts) if aim is None else aim.split(heights)
    quantized, lost = {}, {}
    for name, part, rows, aimed in zip(group.linears, parts, shares, aims, strict=True):
        weight = problem.weights[f"{name}.weight"]
        best, lost[name] = _better(part, weight[rows], aimed, moved, name, rows, weigh, grid if tried else None)
        q, scales, zero = (whole(t, len(weight)) for t in (best.q, best.scale, best.zero))
        quantized[name] = Quantized(q, scales, zero, grid.group_size, grid.symmetric)
    return quantized, lost


def _better(
    part: Quantized, weight: Tensor, aim: Tensor | None, moved: Scaled, name: str, rows: slice, weigh: Weigh,
    grid: Grid | None,
) -> tuple[Quantized, Tensor]:  # fmt: skip
    """These rows of a linear, each as it was found or, where that loses less, as rounding leaves it (no `grid`: not
    tried); and sums over the rows: their output's energy, what is lost now, what the search and what rounding lost."""
    chosen, sums = [], torch.zeros(4, device=weight.device)
    size = max(1, PIECE // weight.shape[1])
    for start in range(0, weight.shape[0], size):
        piece = slice(start, min(start + size, weight.shape[0]))
        inside = slice(rows.start + piece.start, rows.start + piece.stop)  # of the whole linear
        before = moved.weight(name, inside) if aim is None else aim[piece]
        mine = rows_of(part, piece)
        kept = found = plain = weigh(_lost(mine, before, moved, name, inside))
        if grid is not None:
            other = nearest(before, grid)
            plain = weigh(_lost(other, before, moved, name, inside))
            better = found <= plain
            mine, kept = _where(better, mine, other), torch.where(better, found, plain)
        chosen.append(mine)
        sums += torch.stack([weigh(weight[piece]), kept, found, plain]).sum(1)
    return stacked(chosen), sums


def _where(mine: Tensor, one: Quantized, other: Quantized) -> Quantized:
    """Row by row `one` where `mine` [rows], else `other`."""
    pairs = ((one.q, other.q), (one.scale, other.scale), (one.zero, other.zero))
    q, scale, zero = (torch.where(mine[:, None], a, b) for a, b in pairs)
    return replace(one, q=q, scale=scale, zero=zero)


def _lost(after: Quantized, before: Tensor, moved: Scaled, name: str, rows: slice) -> Tensor:
    """What rounding `before` to `after` does to these rows of a linear, every moved scale moved back: [rows, in]."""
    columns = moved.columns.get(name)
    divided = moved.rows[name][rows] if name in moved.rows else None
    if kernels := fused(before):
        return kernels.rounding_errors(after, before, columns, divided, torch.bfloat16)
    delta = dequantize(after)
    delta -= before
    if columns is not None:
        delta /= columns
    if divided is not None:
        delta *= divided[:, None]
    return delta
