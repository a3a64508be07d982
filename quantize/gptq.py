"""GPTQ (Frantar et al., 2022): round column by column, and let the columns still to come make up for each error.

Taken in the form of QuIP's LDLQ (Chee et al., 2023, theorem 6), which rounds to the same codes: with H = L L^T, L lower
triangular, and e = w - w_hat, a row loses e H e^T = sum_k (L_kk (e_k + sum_{j>k} e_j L_jk / L_kk))^2. So the last
column is rounded first, and column k is rounded after the errors of those behind it were added to it. One Cholesky
factor is all it needs, where the published order inverts H and factors the inverse.

Columns are ordered by rising activation energy, so the liveliest is rounded first, with *static* groups: every group's
grid is fixed beforehand, so the stored order is the original one and g_idx stays trivial, which is what today's engines
load.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .fused import fused
from .grid import LEVELS, Quantized

BLOCK = 128
CHUNK = 1024  # rows of H gathered at a time
DAMP = 0.01  # share of the mean diagonal added to H, as in the authors' code


def feedback(gram: Tensor, order: Tensor, columns: Tensor | None = None) -> Tensor:
    """How strongly the error of one column is felt in another: L with its columns divided by its diagonal, where
    L L^T is H [in, in] in the given `order` of columns, damped; float32, unit lower triangular. `columns` [in] says
    what the weight's columns were multiplied by, and so H is divided by.

    More damping is tried, tenfold each time, when H is not positive definite in float32. ValueError when 1.0 is too
    little.
    """
    energy = gram.diagonal() if columns is None else gram.diagonal() / columns.square()
    damp = DAMP
    while damp <= 1.0:
        h = torch.empty_like(gram)
        for rows, part in zip(h.split(CHUNK), order.split(CHUNK), strict=True):
            torch.index_select(gram[part], 1, order, out=rows)
            if columns is not None:
                rows /= columns[part, None] * columns[order]
        h.diagonal().add_(damp * energy.mean().clamp_min(1e-8))
        lower, info = h.mT, torch.empty((), dtype=torch.int32, device=h.device)  # column-major: factored where it lies
        torch.linalg.cholesky_ex(lower, out=(lower, info))
        if not info and bool(torch.isfinite(lower.diagonal()).all()):
            lower /= lower.diagonal().clone()
            return lower
        damp *= 10
    raise ValueError("the Gram matrix of its inputs has no Cholesky factor")


def column_order(gram: Tensor, columns: Tensor | None = None) -> Tensor:
    """The columns by rising energy of their input, int64 [in]; they are rounded from the last to the first."""
    return torch.argsort(gram.diagonal() if columns is None else gram.diagonal() / columns.square(), stable=True)


def round_columns(
    weight: Tensor, follow: Tensor, order: Tensor, scale: Tensor, zero: Tensor, *, symmetric: bool
) -> Quantized:
    """Quantize float32 [out, in], whose columns stand in `order` already, onto the grid that `scale` and `zero`
    (float32 [out, groups], groups in the original order) fix. `follow` is `feedback`'s. The codes are in the original
    order."""
    group_size = weight.shape[1] // scale.shape[1]
    owner = (order // group_size).to(torch.int32)
    errors = torch.empty_like(weight)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    kernels = fused(weight)
    round_block = kernels.round_block if kernels else _round_block
    for stop in range(weight.shape[1], 0, -BLOCK):
        block = slice(max(stop - BLOCK, 0), stop)
        target = torch.addmm(weight[:, block], errors[:, stop:], follow[stop:, block])
        round_block(
            weight[:, block], target, follow[block, block], scale, zero, owner[block], codes[:, block], errors[:, block]
        )
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return Quantized(codes[:, back], scale, zero.to(torch.uint8), group_size, symmetric)


def _round_block(
    weight: Tensor, target: Tensor, follow: Tensor, scale: Tensor, zero: Tensor, owner: Tensor, codes: Tensor,
    errors: Tensor,
) -> None:  # fmt: skip
    """One block of columns, last first; shapes as in kernels.round_block. Writes `codes` and `errors`."""
    s, z = scale[:, owner], zero[:, owner]  # [rows, b]
    for k in reversed(range(weight.shape[1])):
        code = ((target[:, k] / s[:, k]).round_() + z[:, k]).clamp_(0, LEVELS)
        codes[:, k] = code
        errors[:, k] = weight[:, k] - (code - z[:, k]) * s[:, k]
        target[:, :k] += errors[:, k, None] * follow[k, :k]
