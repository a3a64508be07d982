"""GPTQ against the published algorithm in its own order of operations, and against the identity behind LDLQ."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmq.quantize import gptq
from mmq.quantize.grid import LEVELS, Grid, dequantize, fit, groups, quantize
from mmq.quantize.method import output_squares


def problem(rows: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """A weight and the Gram matrix of correlated inputs of very different energy, float64."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=random, dtype=torch.float64)
    mixed = torch.randn(width, width, generator=random, dtype=torch.float64) / width**0.5
    energy = torch.logspace(-1, 1, width, dtype=torch.float64)[torch.randperm(width, generator=random)]
    x = torch.randn(4 * width, width, generator=random, dtype=torch.float64) @ (torch.eye(width) + mixed) * energy
    return weight, x.T @ x / len(x)


def grid_of(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    g = groups(weight, grid.group_size)
    return fit(g.amin(-1), g.amax(-1), grid)


def ours(weight: Tensor, gram: Tensor, grid: Grid) -> Tensor:
    """The codes, [out, in]."""
    order = gptq.column_order(gram)
    scale, zero = grid_of(weight, grid)
    follow, _ = gptq.feedback(gram, order)
    return gptq.round_columns(weight[:, order].T.contiguous(), follow, order, scale, zero, symmetric=grid.symmetric).q


def published(weight: Tensor, gram: Tensor, grid: Grid, *, block: int) -> Tensor:
    """Codes by Frantar et al. (2022), algorithm 1, with activation order and static groups: invert H, take the upper
    Cholesky factor of the inverse, go through the columns left to right, spread each error over those to the right at
    once inside a block and over the blocks behind it at its end."""
    scale, zero = grid_of(weight, grid)  # static groups: before anything is rounded
    width = weight.shape[1]
    order = torch.argsort(gram.diagonal(), descending=True)
    w = weight[:, order].clone()
    h = gram[order][:, order] + 0.01 * gram.diagonal().mean() * torch.eye(width, dtype=gram.dtype)
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    codes = torch.zeros_like(w)
    for start in range(0, width, block):
        stop = min(start + block, width)
        errors = torch.zeros(len(w), stop - start, dtype=w.dtype)
        for column in range(start, stop):
            group = int(order[column]) // grid.group_size
            s, z = scale[:, group], zero[:, group]
            code = (torch.round(w[:, column] / s) + z).clamp(0, LEVELS)
            error = (w[:, column] - (code - z) * s) / upper[column, column]
            for later in range(column + 1, stop):
                w[:, later] -= error * upper[column, later]
            codes[:, column] = code
            errors[:, column - start] = error
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    found = torch.empty_like(codes)
    found[:, order] = codes
    return found


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    ("rows", "width", "group_size", "block"), [(16, 256, 128, 128), (7, 320, 32, 64), (5, 1152, 128, 128)]
)
def test_the_codes_are_the_published_algorithms(
    symmetric: bool, rows: int, width: int, group_size: int, block: int
) -> None:
    """In float64 the same codes; float32 moves one that stands on the edge between two, and what follows from it."""
    weight, gram = problem(rows, width, seed=width)
    grid = Grid(group_size, symmetric)
    want = published(weight, gram, grid, block=block)
    assert torch.equal(ours(weight, gram, grid).double(), want)
    near = ours(weight.float(), gram.float(), grid)
    assert int((near != want).sum()) <= want.numel() // 200
    assert int((quantize(weight, grid).q != want).sum()) > want.numel() // 10  # rounding to nearest is something else


def test_moved_scales_are_the_same_problem() -> None:
    """Columns multiplied by s and H divided by s s^T, told by `columns`, or done by hand."""
    _, gram = problem(8, 256, seed=1)
    s = torch.linspace(0.5, 1.5, 256, dtype=torch.float64).flip(0)
    by_hand = gram / (s[:, None] * s)
    order = gptq.column_order(gram, s)
    assert torch.equal(order, gptq.column_order(by_hand))
    (ours, _), (want, _) = gptq.feedback(gram, order, s), gptq.feedback(by_hand, order)
    torch.testing.assert_close(ours, want, rtol=1e-9, atol=1e-12)


def test_the_loss_falls_apart_into_rounding_errors() -> None:
    """With H = L L^T (damped) a row loses sum_k (L_kk r_k)^2, r_k what rounding column k alone was off by: at most
    half a step where the code did not run into the end of its grid. So no column can do better once those behind it
    are rounded."""
    weight, gram = problem(32, 256, seed=2)
    grid = Grid(128)
    order = gptq.column_order(gram)
    scale, zero = grid_of(weight, grid)
    follow, _ = gptq.feedback(gram, order)
    assert torch.equal(follow.diagonal(), torch.ones(256, dtype=torch.float64))
    assert float(follow.triu(1).abs().max()) == 0
    made = gptq.round_columns(weight[:, order].T.contiguous(), follow, order, scale, zero, symmetric=False)
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(256, dtype=gram.dtype)
    lower = torch.linalg.cholesky(damped[order][:, order])
    torch.testing.assert_close(follow, lower / lower.diagonal(), rtol=1e-9, atol=1e-12)
    step = scale.repeat_interleave(128, 1)
    e = weight - (made.q.double() - zero.repeat_interleave(128, 1)) * step
    alone = e[:, order] @ follow  # r, [rows, in]: the error of column k and what it had to make up for
    pieces = (alone * lower.diagonal()).square().sum()
    torch.testing.assert_close(output_squares(e, damped).sum(), pieces, rtol=1e-9, atol=0)
    free = (made.q > 0) & (made.q < LEVELS)
    assert float((alone.abs() / step[:, order])[free[:, order]].max()) <= 0.5 + 1e-9
    assert float(free.double().mean()) > 0.8


@pytest.mark.parametrize("symmetric", [False, True])
def test_it_loses_less_than_rounding_to_nearest(symmetric: bool) -> None:
    weight, gram = (t.float() for t in problem(64, 512, seed=3))
    grid = Grid(128, symmetric)
    nearest = quantize(weight, grid)
    q = ours(weight, gram, grid)
    fed = dequantize(type(nearest)(q, nearest.scale, nearest.zero, 128, symmetric))
    assert output_squares(fed - weight, gram).sum() < 0.6 * output_squares(dequantize(nearest) - weight, gram).sum()
