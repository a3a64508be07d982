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
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Task:
    """One scale to bring down. `weights`: those that share the input, each [out, in] of any float dtype; `costs` (h)
    and `start` (s): float32 [in]. Heads that read one value head (`tie`, `tie_block`: as in awq.best_scale) are moved
    as one, and must start as one."""

    weights: tuple[Tensor, ...]
    costs: Tensor
    start: Tensor
    tie: int = 1
    tie_block: int = 1


def descended(tasks: Sequence[Task], grid: Grid) -> list[Tensor]:
    """For each task a scale of which F is lower, float32 [in], or its start where none was found.

    Tasks of the same shapes, such as a mixture's experts, go down side by side.
    """
    alike: dict[object, list[int]] = {}
    for number, task in enumerate(tasks):
        alike.setdefault((tuple(w.shape for w in task.weights), task.tie, task.tie_block), []).append(number)
    ends = [task.start for task in tasks]
    for numbers in alike.values():
        width = len(tasks[numbers[0]].start)
        together = max(1, PIECE // (width * min(ROWS, sum(len(w) for w in tasks[numbers[0]].weights))))
        for first in range(0, len(numbers), together):
            some = numbers[first : first + together]
            for number, found in zip(some, _descend([tasks[n] for n in some], grid), strict=True):
                ends[number] = _lower(tasks[number], found, grid)
    return ends


def costs_of(gram: Tensor, scale: Tensor, *, damp: float) -> Tensor | None:
    """h [in]: what an error of each column costs after all others have made up for it, for inputs of Gram matrix H
    [in, in]. Damped by the share `damp` of the mean diagonal, or more, and ordered as it is once columns are multiplied
    by `scale` [in]: nearly what the rounding will see. None where H is 0 or has no factor: then nothing is known."""
    if not bool(gram.diagonal().any()):
        return None
    order = column_order(gram, scale)
    costs = torch.empty_like(scale)
    try:
        costs[order] = feedback(gram, order, scale, damp=damp)[1]
    except ValueError:
        return None
    return costs * scale.square()


def expected_loss(weights: Sequence[Tensor], costs: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """F over all rows of `weights`, each [out, in] of any float dtype; costs (h) and scale (s): [in]. A scalar."""
    squares = scale.new_zeros(len(scale) // grid.group_size)
    for weight in weights:
        for rows in weight.split(max(1, PIECE // len(scale))):
            x = groups(rows.float() * scale, grid.group_size)
            squares += _range(x.amin(-1), x.amax(-1), grid).square().sum(0)
    return (squares * (costs / scale.square()).view(-1, grid.group_size).sum(-1)).sum()


def slope(weight: Tensor, costs: Tensor, logs: Tensor, grid: Grid) -> Tensor:
    """The gradient of log F with respect to log s, [..., in], over float32 `weight` [..., rows, in]; costs (h) and logs
    (log s): [..., in]. Sums are taken in a fixed order, on a GPU too."""
    split = (-1, grid.group_size)
    x = (weight * logs.exp().unsqueeze(-2)).unflatten(-1, split)  # [..., rows, groups, g]
    (high, top), (low, bottom) = x.max(-1), x.min(-1)
    span = _range(low, high, grid)  # [..., rows, groups]
    shares = (costs * (-2 * logs).exp()).unflatten(-1, split)  # [..., groups, g]
    squares, share = span.square().sum(-2), shares.sum(-1)  # [..., groups]
    # d span / d log s_j is |x_j| where x_j is an end of the range, else 0
    if grid.symmetric:
        ends = [(torch.where(high > -low, top, bottom), span)]
    else:
        ends = [(top, high.clamp(min=0)), (bottom, low.clamp(max=0).neg())]
    columns = torch.arange(grid.group_size, device=x.device)
    widening = torch.zeros_like(shares)
    for end, reach in ends:
        widening += torch.where(end.unsqueeze(-1) == columns, (span * reach).unsqueeze(-1), 0.0).sum(-3)
    change = 2 * (widening * share.unsqueeze(-1) - squares.unsqueeze(-1) * shares)
    return change.flatten(-2) / (squares * share).sum(-1, keepdim=True)


def _range(low: Tensor, high: Tensor, grid: Grid) -> Tensor:
    """What a grid that holds [low, high] and 0 spans, but for a constant."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    return torch.maximum(-low, high) if grid.symmetric else high - low


def _descend(tasks: Sequence[Task], grid: Grid) -> Tensor:
    """Where the steps end for tasks of the same shapes: [tasks, in]."""
    like = tasks[0]
    costs, logs = torch.stack([t.costs for t in tasks]), torch.stack([t.start for t in tasks]).log()
    mean, squares = torch.zeros_like(logs), torch.zeros_like(logs)
    slow, slower = MOMENTA
    apart = -(-sum(len(w) for w in like.weights) // ROWS)
    for step in range(STEPS):
        rows = torch.cat([w[step % apart :: apart] for t in tasks for w in t.weights]).float()
        down = slope(rows.unflatten(0, (len(tasks), -1)), costs, logs, grid)
        if like.tie > 1:
            heads = down.unflatten(-1, (-1, like.tie, like.tie_block))
            down = heads.sum(-2, keepdim=True).expand_as(heads).flatten(1)
        mean = torch.lerp(down, mean, slow)
        squares = torch.lerp(down.square(), squares, slower)
        length = LENGTH * (1 - step / STEPS) / (1 - slow ** (step + 1))
        logs = logs - length * mean / ((squares / (1 - slower ** (step + 1))).sqrt() + 1e-8)
    return logs.exp()


def _lower(task: Task, found: Tensor, grid: Grid) -> Tensor:
    """`found` where F is lower there than at the start, else the start; the same to the last bit on every rank."""
    found = found / (found.max() * found.min()).sqrt()
    before, after = (expected_loss(task.weights, task.costs, s, grid) for s in (task.start, found))
    return sent(torch.where(after < before, found, task.start), 0)  # the start too where F is no number
