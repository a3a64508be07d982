"""Clip search: per group of each row, the share of its range that loses least on the calibrated inputs.

The loss of a group is d H_g d^T, with d the group's rounding error and H_g the diagonal block of the Gram matrix that
belongs to it, so the search runs no model. After the weight clipping of Lin et al., AWQ (2023), sec. 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .fused import fused
from .grid import Grid, fake, groups

SHARES = tuple(1.0 - 0.05 * step for step in range(11))  # 1.0 ... 0.5


def best_shrink(weight: Tensor, blocks: Tensor, grid: Grid) -> Tensor:
    """For float32 [out, in] and the diagonal blocks of H [in / group_size, group_size, group_size], the share in
    [0.5, 1] of every group's range, float32 [out, in / group_size]."""
    kernels = fused(weight)
    if kernels:
        return kernels.best_shrink(weight, blocks, grid, SHARES)
    best = torch.full((weight.shape[0], len(blocks)), float("inf"), device=weight.device)
    share = torch.ones_like(best)
    for candidate in SHARES:
        d = groups(fake(weight, grid, shrink=candidate) - weight, grid.group_size).transpose(0, 1)  # [groups, out, g]
        loss = ((d @ blocks) * d).sum(-1).transpose(0, 1)  # [out, groups]
        better = loss < best
        best = torch.where(better, loss, best)
        share = torch.where(better, candidate, share)
    return share
