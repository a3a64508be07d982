"""GPTQ (Frantar et al., 2022): round column by column, and let the columns still to come make up for each error.

Columns are taken in order of falling activation energy with *static* groups: every group's grid is fixed beforehand
from the original weights, so the stored order is the original one and g_idx stays trivial, which is what today's
engines load.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .clip import best_shrink
from .grid import LEVELS, Grid, Quantized, check_width, fit, groups
from .method import Problem, Solution

BLOCK = 128
DAMP = 0.01  # share of the mean diagonal added to H, as in the authors' code


def inverse_factor(gram: Tensor) -> Tensor:
    """The upper Cholesky factor U of H^-1 (U^T U = H^-1), H [in, in] damped; float32.

    More damping is tried, tenfold each time, when H is not positive definite in float32. ValueError past 1.0.
    """
    eye = torch.arange(gram.shape[0], device=gram.device)
    mean = gram.diagonal().mean().clamp_min(1e-8)
    damp = DAMP
    while damp <= 1.0:
        h = gram.clone()
        h[eye, eye] += damp * mean
        lower, failed = torch.linalg.cholesky_ex(h)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and bool(torch.isfinite(upper).all()):
                return upper
        damp *= 10
    raise ValueError("the calibrated inputs of a linear are degenerate (not finite?); calibrate with more samples")


def round_columns(weight: Tensor, gram: Tensor, grid: Grid) -> Quantized:
    """Quantize [out, in] float32 given its inputs' Gram matrix [in, in]. ValueError when group_size does not divide."""
    check_width("this weight", weight.shape[1], grid.group_size)
    shrink = best_shrink(weight, gram, grid)
    g = groups(weight, grid.group_size)
    scale, zero = fit(g.amin(-1) * shrink, g.amax(-1) * shrink, grid)  # [out, groups], fixed from here on
    order = torch.argsort(gram.diagonal(), descending=True)
    owner = order // grid.group_size  # the static group of each column, in the order they are taken
    s, z = scale[:, owner], zero[:, owner]  # [out, in]
    upper = inverse_factor(gram[order][:, order])
    w = weight[:, order].clone()
    q = torch.empty_like(w)
    width = w.shape[1]
    for start in range(0, width, BLOCK):
        stop = min(start + BLOCK, width)
        block = w[:, start:stop]
        u = upper[start:stop, start:stop]
        errors = torch.empty_like(block)
        for j in range(stop - start):
            column = start + j
            code = ((block[:, j] / s[:, column]).round_() + z[:, column]).clamp_(0, LEVELS)
            q[:, column] = code
            error = (block[:, j] - (code - z[:, column]) * s[:, column]) / u[j, j]
            block[:, j:] -= error[:, None] * u[j, j:][None, :]
            errors[:, j] = error
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    stored = torch.empty_like(q)
    stored[:, order] = q
    return Quantized(stored.to(torch.uint8), scale, zero.to(torch.uint8), grid.group_size, grid.symmetric)


def gptq(problem: Problem, grid: Grid) -> Solution:
    """Every linear of the layer by its own group's Gram matrix."""
    return Solution(
        {
            name: round_columns(problem.weights[f"{name}.weight"], problem.grams[group], grid)
            for group in problem.groups
            for name in group.linears
        }
    )
