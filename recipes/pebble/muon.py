"""Muon (Jordan et al. 2024): momentum, made orthogonal, for the matrices of a network; all of one shape in one go.

torch.optim.Muon takes matrices one by one, thousands of launches a step: on a model this small, most of its time.
"""

from __future__ import annotations

import torch
from torch import Tensor

Shape = tuple[int, int]


def by_shape(matrices: list[Tensor]) -> dict[Shape, list[Tensor]]:
    """Matrices by (short side, long side)."""
    groups: dict[Shape, list[Tensor]] = {}
    for matrix in matrices:
        groups.setdefault((min(matrix.shape), max(matrix.shape)), []).append(matrix)
    return groups


def orthogonal(x: Tensor) -> Tensor:
    """About U V^T of each [k, short, long] = U S V^T, by five Newton-Schulz steps in bfloat16."""
    x = x.bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315) @ x
    return x


@torch.no_grad()
def step(groups: dict[Shape, list[Tensor]], momentum: dict[Shape, Tensor], *, rate: float, keep: float = 0.95) -> None:
    """One update of every matrix from its .grad; `momentum` is filled on first use.

    An update has the size AdamW's would have (root mean square 0.2 of `rate`), so that one rate suits all shapes.
    """
    for (short, long), matrices in groups.items():
        grads = [m.grad if m.shape[0] == short else m.grad.T for m in matrices if m.grad is not None]
        now = torch.stack(grads).float()
        mean = momentum.setdefault((short, long), torch.zeros_like(now))
        mean.lerp_(now, 1 - keep)
        move = orthogonal(now.lerp(mean, keep)).float()
        for m, u in zip(matrices, move, strict=True):
            m.add_(u if m.shape[0] == short else u.T, alpha=-rate * 0.2 * long**0.5)
