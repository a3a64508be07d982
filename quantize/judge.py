"""What was found for a linear held against plain rounding, row by row; the better of the two is kept.

An error is what it makes of the linear's output, d H d^T (method.output_squares), with every moved scale moved back.
Knows nothing of how the codes were found.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .awq import Scaled
from .family import Group
from .fused import fused
from .grid import Grid, Quantized, dequantize, quantize, rows_of, split_rows, stacked
from .method import Problem, output_squares
from .ranks import whole

PIECE = 2**25  # weights judged at a time, float32


def nearest(weight: Tensor, grid: Grid, shrink: Tensor | None = None) -> Quantized:
    """Round-to-nearest of float32 [rows, in] on the grid that `shrink` [rows, groups] clips, by the fastest way."""
    if shrink is None:
        shrink = torch.ones(weight.shape[0], weight.shape[1] // grid.group_size, device=weight.device)
    kernels = fused(weight)
    return kernels.quantize(weight, grid, shrink) if kernels else quantize(weight, grid, shrink=shrink)


def judged(
    problem: Problem, moved: Scaled, group: Group, shares: list[slice], rounded: Quantized, aim: Tensor | None,
    gram: Tensor | None, grid: Grid, *, tried: bool,
) -> tuple[dict[str, Quantized], dict[str, Tensor]]:  # fmt: skip
    """Each of the group's linears, whole, its rows no worse than rounding leaves them where more was `tried`; and what
    `_better` sums over this rank's rows."""
    heights = [s.stop - s.start for s in shares]
    parts = split_rows(rounded, heights)
    aims = [None] * len(parts) if aim is None else aim.split(heights)
    quantized, lost = {}, {}
    for name, part, rows, aimed in zip(group.linears, parts, shares, aims, strict=True):
        weight = problem.weights[f"{name}.weight"]
        best, lost[name] = _better(part, weight[rows], aimed, moved, name, rows, gram, grid if tried else None)
        q, scales, zero = (whole(t, len(weight)) for t in (best.q, best.scale, best.zero))
        quantized[name] = Quantized(q, scales, zero, grid.group_size, grid.symmetric)
    return quantized, lost


def _better(
    part: Quantized, weight: Tensor, aim: Tensor | None, moved: Scaled, name: str, rows: slice, gram: Tensor | None,
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
        kept = found = plain = _lost(mine, before, moved, name, inside, gram)
        if grid is not None:
            other = nearest(before, grid)
            plain = _lost(other, before, moved, name, inside, gram)
            better = found <= plain
            mine, kept = _where(better, mine, other), torch.where(better, found, plain)
        chosen.append(mine)
        sums += torch.stack([output_squares(weight[piece].float(), gram), kept, found, plain]).sum(1)
    return stacked(chosen), sums


def _where(mine: Tensor, one: Quantized, other: Quantized) -> Quantized:
    """Row by row `one` where `mine` [rows], else `other`."""
    pairs = ((one.q, other.q), (one.scale, other.scale), (one.zero, other.zero))
    q, scale, zero = (torch.where(mine[:, None], a, b) for a, b in pairs)
    return replace(one, q=q, scale=scale, zero=zero)


def _lost(after: Quantized, before: Tensor, moved: Scaled, name: str, rows: slice, gram: Tensor | None) -> Tensor:
    """What rounding `before` to `after` costs on these rows of a linear, every moved scale moved back: [rows]."""
    delta = dequantize(after)
    delta -= before
    if name in moved.columns:
        delta /= moved.columns[name]
    if name in moved.rows:
        delta *= moved.rows[name][rows, None]
    return output_squares(delta, gram)
