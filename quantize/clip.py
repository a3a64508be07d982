"""Clip search: per group of each row, the share of its range that loses least on the calibrated inputs.

Where weights are rounded to nearest, a group loses d H_g d^T, with d its rounding error and H_g the diagonal block of
the Gram matrix that belongs to it. Where errors are fed back (gptq.py), most of that is made up for, and what remains
of a column's error is d_k^2 L_kk^2. Neither runs the model. After the weight clipping of Lin et al., AWQ (2023), s. 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .fused import fused
from .grid import Grid, fake, groups

SHARES = tuple(1.0 - 0.05 * step for step in range(11))  # 1.0 ... 0.5


def best_shrink(weight: Tensor, costs: Tensor, grid: Grid) -> Tensor:
    """For float32 [out, in] the share in [0.5, 1] of every group's range, float32 [out, in / group_size].

    `costs`: the diagonal blocks of H [in / group_size, group_size, group_size] where weights are rounded to nearest, or
    [in], what an error of each column costs after all others have made up for it, where errors are fed back.
    """
    kernels = fused(weight)
    if kernels:
        return kernels.best_shrink(weight, costs, grid, SHARES)
    best = torch.full((weight.shape[0], weight.shape[1] // grid.group_size), float("inf"), device=weight.device)
    share = torch.ones_like(best)
    for candidate in SHARES:
        d = groups(fake(weight, grid, shrink=candidate) - weight, grid.group_size)  # [out, groups, g]
        if costs.ndim == 3:
            loss = ((d.transpose(0, 1) @ costs) * d.transpose(0, 1)).sum(-1).transpose(0, 1)  # [out, groups]
        else:
            loss = (d.square() * costs.view(-1, grid.group_size)).sum(-1)
        better = loss < best
        best = torch.where(better, loss, best)
        share = torch.where(better, candidate, share)
    return share
