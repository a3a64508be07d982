"""AWQ's scales by descent: from the best of AWQ's candidates on, in as many dimensions as the input has channels.

The candidates (awq.py) lie on two curves, powers of what the calibration measured. What is brought down from there is
what rounding is expected to cost where errors are fed back (gptq.py): a row then loses sum_k (L_kk r_k)^2, with L the
factor of H, and the rounding errors r_k are spread evenly over a step, a share of their group's range (Chee et al.,
QuIP, 2023, theorem 1: tr(D) / 12 a row on average, D the squares of L's diagonal). Where the weight's columns are
multiplied by s, and so H is divided by s s^T, this is, but for a constant,

    F(s) = sum over groups g of (sum over rows i of range_ig(s)^2) * (sum over columns j of g of h_j / s_j^2),

h_j = L_jj^2. F is made of sums, products and maxima of powers of s alone, a generalized posynomial (Boyd et al., A
tutorial on geometric programming, 2007, section 5), so log F is convex in log s: there is one valley, and the start
only saves steps. Its slope is written down, no graph is kept. Knows nothing of clipping, or of what absorbs s.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .gptq import column_order, feedback
from .grid import Grid, groups
from .ranks import sent

STEPS = 60
LENGTH = 0.1  # of the first step, in each log s; the last is next to nothing
MOMENTA = 0.9, 0.999  # Adam's (Kingma & Ba, 2015, algorithm 1)
ROWS = 512  # output channels, about, that a step looks at, others each time; all at each step end no lower
PIECE = 2**24  # weights looked at together, float32


def descended(
    weights: Sequence[Tensor], gram: Tensor, start: Tensor, grid: Grid, *, damp: float, tie: int = 1, tie_block: int = 1
) -> Tensor:
    """From the scale `start` [in] down to one with a lower F over `weights`, each [out, in], given their input's Gram
    matrix H [in, in]: float32 [in]. `start` itself where none was found, where H is 0, or where it has no factor with
    the share `damp` of its mean diagonal added, or more. Heads that read one value head (`tie`, `tie_block`: as in
    awq.best_scale) are moved as one, and must start as one.

    H is damped and factored as `start` divides it: nearly what the rounding will see.
    """
    order = column_order(gram, start)
    costs = torch.empty_like(start)
    try:
        costs[order] = feedback(gram, order, start, damp=damp)[1]
    except ValueError:
        return start
    costs *= start.square()
    found = _descend(weights, costs, start, grid, tie=tie, tie_block=tie_block)
    found = found / (found.max() * found.min()).sqrt()
    lower = expected_loss(weights, costs, found, grid) < expected_loss(weights, costs, start, grid)  # not if it is NaN
    lower &= gram.diagonal().amax() > 0
    return sent(torch.where(lower, found, start), 0)  # the same to the last bit on every rank


def expected_loss(weights: Sequence[Tensor], costs: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """F over `weights`, each [out, in] of any float dtype; costs (h) and scale (s): [in]. A scalar."""
    squares = scale.new_zeros(len(scale) // grid.group_size)
    for weight in weights:
        for rows in weight.split(max(1, PIECE // len(scale))):
            x = groups(rows.float() * scale, grid.group_size)
            squares += _range(x.amin(-1), x.amax(-1), grid).square().sum(0)
    return (squares * (costs / scale.square()).view(-1, grid.group_size).sum(-1)).sum()


def slope(weight: Tensor, costs: Tensor, logs: Tensor, grid: Grid) -> Tensor:
    """The gradient of log F with respect to log s, [in], over float32 `weight` [rows, in]; costs (h) and logs (log s):
    [in]. Sums are taken in a fixed order, on a GPU too."""
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
    return change.flatten() / (squares * share).sum()


def _range(low: Tensor, high: Tensor, grid: Grid) -> Tensor:
    """What a grid that holds [low, high] and 0 spans, but for a constant."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    return torch.maximum(-low, high) if grid.symmetric else high - low


def _descend(
    weights: Sequence[Tensor], costs: Tensor, start: Tensor, grid: Grid, *, tie: int, tie_block: int
) -> Tensor:
    logs = start.log()
    mean, squares = torch.zeros_like(logs), torch.zeros_like(logs)
    slow, slower = MOMENTA
    apart = -(-sum(len(w) for w in weights) // ROWS)
    for step in range(STEPS):
        rows = torch.cat([w[step % apart :: apart] for w in weights]).float()
        down = slope(rows, costs, logs, grid)
        if tie > 1:
            down = down.view(-1, tie, tie_block).sum(1, keepdim=True).expand(-1, tie, tie_block).flatten()
        mean = torch.lerp(down, mean, slow)
        squares = torch.lerp(down.square(), squares, slower)
        length = LENGTH * (1 - step / STEPS) / (1 - slow ** (step + 1))
        logs = logs - length * mean / ((squares / (1 - slower ** (step + 1))).sqrt() + 1e-8)
    return logs.exp()
