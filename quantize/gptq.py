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

from dataclasses import dataclass

import torch
from torch import Tensor

from .device import tensor_cores
from .fused import fused
from .gram import diagonal_blocks
from .grid import LEVELS, Quantized

BLOCK = 128  # columns rounded one by one before their errors are handed on
WIDE = 512  # columns that take the errors of all behind them in one product
CHUNK = 1024  # rows of H gathered at a time
PANEL = 1024  # columns factored at a time
SMALL = 64  # columns of a triangle inverted by substitution
DAMP = 0.01  # share of the mean diagonal added to H, as in the authors' code
FEW = 0.5  # damping by the share of columns to tokens: what few tokens say of many channels is half chance


@dataclass(frozen=True)
class Factor:
    """What rounding needs of H where H is divided by `columns` [in] on both sides (None: as it is): the `order` [in]
    of its columns, and by that order `follow` [in, in] and `pivots` [in], as `feedback` gives them."""

    columns: Tensor | None
    order: Tensor
    follow: Tensor
    pivots: Tensor

    def costs(self) -> Tensor:
        """The pivots in the columns' own order: what each column's own error costs, [in]."""
        found = torch.empty_like(self.pivots)
        found[self.order] = self.pivots
        return found


def factored(gram: Tensor, columns: Tensor | None = None, *, damp: float = DAMP) -> Factor:
    """The factor of H [in, in] divided by `columns` [in], the liveliest column last. ValueError as in `feedback`."""
    order = column_order(gram, columns)
    return Factor(columns, order, *feedback(gram, order, columns, damp=damp))


def rescaled(factor: Factor, columns: Tensor) -> Factor:
    """The same H divided by other `columns` [in], in the memory of `factor`: the order stays, the damping is divided
    with H. With D diagonal and H = L L^T, D H D has the factor D L."""
    old = torch.ones_like(columns) if factor.columns is None else factor.columns
    by = (old / columns)[factor.order]
    return Factor(columns, factor.order, _unit(factor.follow, by, 1 / by), factor.pivots * by.square())


def damping(width: int, tokens: int) -> float:
    """The share of the mean diagonal to add to H [width, width] of so many tokens: DAMP, and more where tokens are few.

    With 1,800 tokens the published 0.01 left the embedded model, 768 channels at its widest, no better than AWQ alone;
    0.2 took a quarter of its KL away (docs/quality.md).
    """
    return min(1.0, max(DAMP, FEW * width / max(tokens, 1)))


def feedback(
    gram: Tensor, order: Tensor, columns: Tensor | None = None, *, damp: float = DAMP
) -> tuple[Tensor, Tensor]:
    """How strongly the error of one column is felt in another, and what each column's own error costs: L with its
    columns divided by its diagonal, and that diagonal squared, where L L^T is H [in, in] in the given `order` of
    columns, damped; float32, unit lower triangular [in, in] and [in]. `columns` [in] says what the weight's columns
    were multiplied by, and so H is divided by.

    More damping is tried, tenfold each time, when H is not positive definite in float32. ValueError when 1.0 is too
    little.
    """
    energy = gram.diagonal() if columns is None else gram.diagonal() / columns.square()
    added = energy.mean().clamp_min(1e-8)
    while damp <= 1.0:
        for factor in (_factor_fast, _factor) if gram.is_cuda and len(gram) > PANEL else (_factor,):
            norm = (energy[order] + damp * added).sqrt() if factor is _factor_fast else None
            by = torch.ones_like(order, dtype=gram.dtype) if norm is None else norm
            if columns is not None:
                by = by * columns[order]
            h = _taken(gram, order, by, lower=factor is _factor_fast)
            h.diagonal().add_(damp * added / (1.0 if norm is None else norm.square()))
            lower = factor(h)
            if lower is not None:
                pivots = lower.diagonal().clone()
                norm = torch.ones_like(pivots) if norm is None else norm
                return _unit(lower, norm, 1 / (norm * pivots)), (pivots * norm).square()
            del h
        damp *= 10
    raise ValueError("the Gram matrix of its inputs has no Cholesky factor")


def _taken(gram: Tensor, order: Tensor, by: Tensor, *, lower: bool) -> Tensor:
    """H [in, in] with its rows and columns in this `order`, divided by `by` [in] both ways; with `lower` no more of it
    is called for than what lies below the diagonal and on it."""
    if kernels := fused(gram):
        return kernels.taken(gram, order, 1 / by, lower=lower)
    h = torch.empty_like(gram)
    for rows, part, own in zip(h.split(CHUNK), order.split(CHUNK), by.split(CHUNK), strict=True):
        torch.index_select(gram[part], 1, order, out=rows)
        rows /= own[:, None] * by
    return h


def _unit(matrix: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """`matrix` [in, in], its rows multiplied by `down` and its columns by `right`, in its place; its diagonal, which
    comes to ones, exactly so."""
    if kernels := fused(matrix):
        kernels.outer(matrix, down, right)
    else:
        for rows, own in zip(matrix.split(CHUNK), down.split(CHUNK), strict=True):
            rows *= own[:, None] * right
    return matrix.fill_diagonal_(1)


def _factor(h: Tensor) -> Tensor | None:
    """The lower Cholesky factor of `h`, in its memory; None when it has none."""
    lower, info = h.mT, torch.empty((), dtype=torch.int32, device=h.device)  # column-major: factored where it lies
    torch.linalg.cholesky_ex(lower, out=(lower, info))
    return lower if not info and bool(torch.isfinite(lower.diagonal()).all()) else None


def _factor_fast(h: Tensor) -> Tensor | None:
    """The same for an `h` of unit diagonal, panel by panel, so that nearly all of it is products on the tensor cores:
    their ten bits are enough for how errors are handed on, though not always for a positive last pivot."""
    failed = []
    for start in range(0, len(h), PANEL):
        stop = min(start + PANEL, len(h))
        corner, info = torch.linalg.cholesky_ex(h[start:stop, start:stop])
        failed.append(info)
        h[start:stop, start:stop] = corner
        below = h[stop:, start:stop]
        below.copy_(below @ _inverse(corner).mT)  # solving takes 7 times longer
        for left in range(stop, len(h), PANEL):
            right = min(left + PANEL, len(h))
            h[left:, left:right].addmm_(below[left - stop :], below[left - stop : right - stop].mT, alpha=-1)
    if bool(torch.stack(failed).any()) or not bool(torch.isfinite(h.diagonal()).all()):
        return None
    return h.tril_()


def _inverse(lower: Tensor) -> Tensor:
    """The inverse of a lower triangle [n, n]: that of small blocks on the diagonal, all at once, then of twice as large
    ones, [[a, 0], [b, c]] having the inverse [[a', 0], [-c' b a', c']]."""
    width = len(lower)
    size = SMALL if width % SMALL == 0 and (width // SMALL).bit_count() == 1 else width
    inverse = torch.linalg.solve_triangular(
        diagonal_blocks(lower, size), torch.eye(size, device=lower.device), upper=False
    )
    with tensor_cores(False):
        while size < width:
            a, c = inverse[::2], inverse[1::2]
            b = diagonal_blocks(lower, 2 * size)[:, size:, :size]
            inverse = torch.zeros(len(a), 2 * size, 2 * size, device=lower.device)
            inverse[:, :size, :size], inverse[:, size:, size:] = a, c
            inverse[:, size:, :size] = -(c @ b @ a)
            size *= 2
    return inverse[0]


def column_order(gram: Tensor, columns: Tensor | None = None) -> Tensor:
    """The columns by rising energy of their input, int64 [in]; they are rounded from the last to the first."""
    return torch.argsort(gram.diagonal() if columns is None else gram.diagonal() / columns.square(), stable=True)


def round_columns(
    weight: Tensor, follow: Tensor, order: Tensor, scale: Tensor, zero: Tensor, *, symmetric: bool
) -> Quantized:
    """Quantize a weight, given turned over, float32 [in, out], its columns in `order` already, onto the grid that
    `scale` and `zero` (float32 [out, groups], groups in the original order) fix. `follow` is `feedback`'s. The result
    is the right way round and in the original order. Turned over, a column's values are neighbours in memory."""
    group_size = len(weight) // scale.shape[1]
    owner = (order // group_size).to(torch.int32)
    steps, middles = scale.T.contiguous(), zero.T.contiguous()
    errors = torch.empty_like(weight)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    kernels = fused(weight)
    round_block = kernels.round_block if kernels else _round_block
    for end in range(len(weight), 0, -WIDE):
        wide = slice(max(end - WIDE, 0), end)
        targets = torch.addmm(weight[wide], follow[end:, wide].mT, errors[end:])
        for stop in range(end, wide.start, -BLOCK):
            block = slice(max(stop - BLOCK, wide.start), stop)
            target = targets[block.start - wide.start : block.stop - wide.start]
            if stop < end:
                target = torch.addmm(target, follow[stop:end, block].mT, errors[stop:end])
            round_block(
                weight[block], target, follow[block, block], steps, middles, owner[block], codes[block], errors[block]
            )
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return Quantized(codes[back].T.contiguous(), scale, zero.to(torch.uint8), group_size, symmetric)


def _round_block(
    weight: Tensor, target: Tensor, follow: Tensor, scale: Tensor, zero: Tensor, owner: Tensor, codes: Tensor,
    errors: Tensor,
) -> None:  # fmt: skip
    """One block of columns, last first; shapes as in kernels.round_block. Writes `codes` and `errors`."""
    s, z = scale[owner], zero[owner]  # [b, rows]
    for k in reversed(range(len(weight))):
        code = ((target[k] / s[k]).round_() + z[k]).clamp_(0, LEVELS)
        codes[k] = code
        errors[k] = weight[k] - (code - z[k]) * s[k]
        target[:k] += follow[k, :k, None] * errors[k]
