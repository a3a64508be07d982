"""The steps from a decoder layer's weights to integers, and which of them each method takes at each quality.

Every method is a row of the same four steps: move scales between layers (awq.py), clip each group's range (clip.py),
then round, to nearest (grid.py) or with error feedback (gptq.py). So all of them end in the same grids, and a format
is free to hold any of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .awq import Scaled, scale
from .clip import best_shrink
from .family import Group
from .fused import fused
from .gptq import column_order, feedback, round_columns
from .gram import diagonal_blocks
from .grid import Grid, Quantized, dequantize, fit, groups, quantize
from .method import Problem, Solution, output_error
from .ranks import share, total, whole


@dataclass(frozen=True)
class Steps:
    """What is done to a layer before and while it is rounded."""

    scale: bool = False
    clip: bool = False
    feedback: bool = False


STEPS: dict[tuple[str, str], Steps] = {
    ("rtn", "default"): Steps(),
    ("awq", "fast"): Steps(clip=True),
    ("awq", "default"): Steps(scale=True, clip=True),
    ("awq", "best"): Steps(scale=True, clip=True, feedback=True),
    ("gptq", "fast"): Steps(clip=True),
    ("gptq", "default"): Steps(clip=True, feedback=True),
    ("gptq", "best"): Steps(scale=True, clip=True, feedback=True),
}


def solve(problem: Problem, grid: Grid, steps: Steps, lap: Callable[[str], None] = lambda stage: None) -> Solution:
    """Quantize one decoder layer by `steps`; the Gram matrices are taken out of `problem` on the way.

    ValueError when a Gram matrix admits no factor, or widths do not fit. `lap(stage)` is called at the end of each
    stage, for whoever measures.
    """
    moved = scale(problem, grid) if steps.scale else Scaled(dict(problem.weights))
    lap("scale search")
    quantized: dict[str, Quantized] = {}
    lost: dict[str, Tensor] = {}
    for group in problem.groups:
        gram = problem.grams.pop(group)  # the last to need it: it is the largest thing there is
        heights = [problem.weights[f"{n}.weight"].shape[0] for n in group.linears]
        shares = [share(height) for height in heights]
        rounded = _round(moved, group, shares, gram, grid, steps)
        lap("clip and rounding")
        parts = _split(rounded, [s.stop - s.start for s in shares])
        for name, part, rows, height in zip(group.linears, parts, shares, heights, strict=True):
            lost[name] = _lost(problem.weights[f"{name}.weight"][rows].float(), part, moved, name, rows, gram)
            q, scales, zero = (whole(t, height) for t in (part.q, part.scale, part.zero))
            quantized[name] = Quantized(q, scales, zero, grid.group_size, grid.symmetric)
        lap("errors")
    both = total(torch.stack(list(lost.values()))).tolist()  # the device is waited for once
    errors = {name: after / max(before, 1e-30) for name, (after, before) in zip(lost, both, strict=True)}
    return Solution(quantized, moved.changed, errors)


def _round(moved: Scaled, group: Group, shares: list[slice], gram: Tensor, grid: Grid, steps: Steps) -> Quantized:
    """This rank's rows of all the group's linears, one below the other: rows are independent, so one piece of work."""
    weight = torch.cat([moved.weight(n, rows) for n, rows in zip(group.linears, shares, strict=True)])
    columns = moved.columns.get(group.linears[0])
    size = grid.group_size
    shrink = torch.ones(weight.shape[0], weight.shape[1] // size, device=weight.device)
    if steps.clip:
        blocks = diagonal_blocks(gram, size)
        if columns is not None:
            s = columns.view(-1, size)
            blocks /= s[:, :, None] * s[:, None, :]
        shrink = best_shrink(weight, blocks, grid)
    if not steps.feedback:
        kernels = fused(weight)
        return kernels.quantize(weight, grid, shrink) if kernels else quantize(weight, grid, shrink=shrink)
    g = groups(weight, size)
    scale, zero = fit(g.amin(-1) * shrink, g.amax(-1) * shrink, grid)
    del g
    order = column_order(gram, columns)
    follow = feedback(gram, order, columns)
    weight = weight[:, order]
    return round_columns(weight, follow, order, scale, zero, symmetric=grid.symmetric)


def _split(x: Quantized, heights: list[int]) -> list[Quantized]:
    parts = zip(x.q.split(heights), x.scale.split(heights), x.zero.split(heights), strict=True)
    return [Quantized(q, scale, zero, x.group_size, x.symmetric) for q, scale, zero in parts]


def _lost(before: Tensor, after: Quantized, moved: Scaled, name: str, rows: slice, gram: Tensor) -> Tensor:
    """What rounding these rows of one linear costs and what they hold, every moved scale moved back: two numbers."""
    weight = dequantize(after)
    if name in moved.columns:
        weight /= moved.columns[name]
    if name in moved.rows:
        weight *= moved.rows[name][rows, None]
    weight -= before
    return torch.stack([output_error(weight, gram), output_error(before, gram)])
