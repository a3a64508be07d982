"""AWQ's scales by descent, in as many dimensions as the input has channels.

What is brought down is what rounding is expected to cost where errors are fed back (gptq.py): a row then loses
sum_k (L_kk r_k)^2, with L the factor of H, and the rounding errors r_k are spread evenly over a step, a share of their
group's range (Chee et al., QuIP, 2023, theorem 1: tr(D) / 12 a row on average, D the squares of L's diagonal). Where
the weight's columns are multiplied by s, and so H is divided by s s^T, this is, but for a constant,

    F(s) = sum over groups g of F_g(s),
    F_g(s) = (sum over rows i of range_ig(s)^2) * (sum over columns j of g of h_j / s_j^2),

h_j = L_jj^2. F_g is made of sums, products and maxima of powers of s alone, a generalized posynomial (Boyd et al., A
tutorial on geometric programming, 2007, section 5), so log F_g is convex in log s: there is one valley, whatever the
start. Groups do not know of each other, so each goes down its own log F_g, and those that share scales, where query
heads read one value head, the log of the sum of theirs. The slope is written down, no graph is kept. Knows nothing of
clipping, or of what absorbs s.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .fused import fused
from .gptq import Factor
from .grid import Grid, groups

STEPS = 60
LENGTH = 0.1  # of the first step, in each log s; the last is next to nothing
MOMENTA = 0.9, 0.999  # Adam's (Kingma & Ba, 2015, algorithm 1)
ROWS = 512  # output channels, about, that a step looks at for each scale, others each time; all end no lower
SMALL = 1e-30  # of an F_g: below it there is nothing to bring down
PIECE = 2**24  # weights looked at together, float32


def first_scale(weights: Sequence[Tensor], gram: Tensor, *, tie: int = 1, tie_block: int = 1) -> Tensor:
    """Where the descent begins, [in]: the root of what comes in by each channel over what its weights, each [out, in],
    make of it, so that a model whose channels were rescaled begins at the same place. H is [in, in]. With `tie` > 1
    channels are query heads of width `tie_block`, and each `tie` neighbouring heads get one scale."""
    sizes = torch.stack([torch.linalg.vector_norm(w, dim=0, dtype=torch.float32) for w in weights]).square().sum(0)
    ratio = _floored(gram.diagonal().clamp_min(0).sqrt()) / _floored(sizes.sqrt())
    ratio = shared(ratio, tie, tie_block)
    return (ratio / (ratio.max() * ratio.min()).sqrt()).sqrt()


def _floored(values: Tensor) -> Tensor:
    return values.clamp_min(1e-4 * values.max().clamp_min(1e-8))


def shared(values: Tensor, tie: int, block: int) -> Tensor:
    """Every channel's value [in], averaged over the `tie` neighbouring heads of width `block` that share a scale."""
    if tie == 1:
        return values
    heads = values.view(-1, tie, block)  # [kv heads, query heads each, head_dim]
    return heads.mean(1, keepdim=True).expand_as(heads).reshape(-1).contiguous()


def descended(weights: Sequence[Tensor], factor: Factor, grid: Grid, *, tie: int = 1, tie_block: int = 1) -> Tensor:
    """From the scale under which H was factored down to one with a lower F over `weights`, each [out, in]: float32
    [in]; the start itself where none was found. Heads that read one value head (`tie`, `tie_block`) are moved as one,
    and must start as one.

    H is damped and factored as the start divides it: nearly what the rounding will see.
    """
    start = factor.columns if factor.columns is not None else torch.ones_like(factor.pivots)
    costs = factor.costs() * start.square()
    weight = torch.cat(list(weights)) if len(weights) > 1 else weights[0]
    kernels = fused(weight)
    if kernels and (tie == 1 or tie_block % grid.group_size == 0):
        found = kernels.descend(weight, costs, start, grid, tie=tie, tie_block=tie_block)
    else:
        found = _descend(weight, costs, start, grid, tie=tie, tie_block=tie_block)
    found = found / (found.max() * found.min()).sqrt()
    lower = expected_loss(weights, costs, found, grid) < expected_loss(weights, costs, start, grid)  # not if it is NaN
    return torch.where(lower, found, start)


def expected_loss(weights: Sequence[Tensor], costs: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """F over `weights`, each [out, in] of any float dtype; costs (h) and scale (s): [in]. A scalar."""
    squares = scale.new_zeros(len(scale) // grid.group_size)
    for weight in weights:
        if kernels := fused(weight):
            squares += kernels.spans(weight, scale, grid)
            continue
        for rows in weight.split(max(1, PIECE // len(scale))):
            x = groups(rows.float() * scale, grid.group_size)
            squares += _range(x.amin(-1), x.amax(-1), grid).square().sum(0)
    return (squares * (costs / scale.square()).view(-1, grid.group_size).sum(-1)).sum()


def slope(
    weight: Tensor, costs: Tensor, logs: Tensor, grid: Grid, *, tie: int = 1, tie_block: int = 1
) -> Tensor:  # fmt: skip
    """The gradient, [in], of the log of F_g, summed over groups, with respect to log s.

    Where `tie` heads of width `tie_block` share scales it is that of the log of what the groups that share them lose
    together, or of log F where one group holds several heads. `weight` float32 [rows, in]; costs (h) and logs (log s):
    [in]. Sums are taken in a fixed order, on a GPU too.
    """
    size = grid.group_size
    x = groups(weight * logs.exp(), size)  # [rows, groups, g]
    (high, top), (low, bottom) = x.max(-1), x.min(-1)
    span = _range(low, high, grid)  # [rows, groups]
    shares = (costs * (-2 * logs).exp()).view(-1, size)  # [groups, g]
    squares, share = span.square().sum(0), shares.sum(-1)  # [groups]
    # d span / d log s_j is |x_j| where x_j is an end of the range, else 0
    if grid.symmetric:
        ends = [(torch.where(high > -low, top, bottom), span)]
    else:
        ends = [(top, high.clamp(min=0)), (bottom, low.clamp(max=0).neg())]
    columns = torch.arange(size, device=x.device)
    widening = torch.zeros_like(shares)
    for end, reach in ends:
        widening += torch.where(end[..., None] == columns, (span * reach)[..., None], 0.0).sum(0)
    change = 2 * (widening * share[:, None] - squares[:, None] * shares)
    height = squares * share
    if tie > 1 and tie_block % size == 0:
        sets = height.view(-1, tie, tie_block // size)
        height = sets.sum(1, keepdim=True).expand_as(sets).flatten()
    elif tie > 1:
        height = height.sum()[None]
    down = (change / height.clamp_min(SMALL)[:, None]).flatten()
    if tie > 1:
        heads = down.view(-1, tie, tie_block)
        down = heads.sum(1, keepdim=True).expand_as(heads).flatten()
    return down


def _range(low: Tensor, high: Tensor, grid: Grid) -> Tensor:
    """What a grid that holds [low, high] and 0 spans, but for a constant."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    return torch.maximum(-low, high) if grid.symmetric else high - low


def _descend(weight: Tensor, costs: Tensor, start: Tensor, grid: Grid, *, tie: int, tie_block: int) -> Tensor:
    logs = start.log()
    mean, squares = torch.zeros_like(logs), torch.zeros_like(logs)
    slow, slower = MOMENTA
    stride = -(-len(weight) * tie // ROWS)
    for step in range(STEPS):
        rows = weight[step % stride :: stride].float()
        down = slope(rows, costs, logs, grid, tie=tie, tie_block=tie_block)
        mean = torch.lerp(down, mean, slow)
        squares = torch.lerp(down.square(), squares, slower)
        length = LENGTH * (1 - step / STEPS) / (1 - slow ** (step + 1))
        logs = logs - length * mean / ((squares / (1 - slower ** (step + 1))).sqrt() + 1e-8)
    return logs.exp()
