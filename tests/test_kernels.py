"""The fused GPU kernels against the plain torch that defines them. Needs an NVIDIA GPU with Triton."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mmq.quantize import awq, clip, gptq
from mmq.quantize.descent import descended, expected_loss, first_scale
from mmq.quantize.fused import fused
from mmq.quantize.gram import Gram, diagonal_blocks
from mmq.quantize.grid import Grid, dequantize, fit, groups, quantize
from mmq.quantize.inputs import encode
from mmq.quantize.skeleton import build, load_outside
from mmq.recipes.calibration import drawn

if not torch.cuda.is_available() or fused(torch.empty(1, device="cuda")) is None:
    pytest.skip("no GPU with Triton here; the plain torch paths are tested elsewhere", allow_module_level=True)

GRIDS = [
    Grid(g, symmetric, dtype)
    for g in (32, 64, 128)
    for symmetric in (False, True)
    for dtype in (torch.bfloat16, torch.float16)
]


def _layer(rows: int = 300, width: int = 512) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    weight = torch.randn(rows, width, device="cuda") * torch.logspace(-3, 1, width, device="cuda")
    x = torch.randn(2048, width, device="cuda") @ torch.randn(width, width, device="cuda") / width**0.5
    return weight, x.T @ x / len(x)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Call it to turn the kernels off."""
    return monkeypatch


def _off(patch: pytest.MonkeyPatch) -> None:
    for module in (awq, clip, gptq):
        patch.setattr(module, "fused", lambda tensor: None)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_rounding_gives_the_same_codes(grid: Grid) -> None:
    weight, _ = _layer()
    kernels = fused(weight)
    assert kernels is not None
    shrink = torch.rand(300, 512 // grid.group_size, device="cuda") * 0.5 + 0.5
    a, b = kernels.quantize(weight, grid, shrink), quantize(weight, grid, shrink=shrink)
    assert torch.equal(a.scale, b.scale)
    assert torch.equal(a.zero, b.zero)
    assert torch.equal(a.q, b.q)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_scale_losses(grid: Grid, plain: pytest.MonkeyPatch) -> None:
    weight, gram = _layer()
    pool = torch.rand(5, 512, device="cuda") + 0.2
    ws = [weight, weight[:70] * 2]
    a = awq.scale_losses(ws, gram, pool, grid)
    _off(plain)
    torch.testing.assert_close(a, awq.scale_losses(ws, gram, pool, grid), rtol=1e-5, atol=0)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_clip(grid: Grid, plain: pytest.MonkeyPatch) -> None:
    """Shares that lose equally to float32's last digits may differ; no more than one in a thousand does."""
    weight, gram = _layer()
    for costs in (diagonal_blocks(gram, grid.group_size), gram.diagonal().contiguous()):
        a = clip.best_shrink(weight, costs, grid)
        with plain.context() as patch:
            _off(patch)
            b = clip.best_shrink(weight, costs, grid)
        assert int((a != b).sum()) <= max(2, a.numel() // 1000)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_error_feedback(grid: Grid, plain: pytest.MonkeyPatch) -> None:
    weight, gram = _layer()
    g = groups(weight, grid.group_size)
    scale, zero = fit(g.amin(-1), g.amax(-1), grid)
    order = gptq.column_order(gram)
    given = (weight[:, order].T.contiguous(), gptq.feedback(gram, order)[0], order, scale, zero)
    a = gptq.round_columns(*given, symmetric=grid.symmetric)
    _off(plain)
    b = gptq.round_columns(*given, symmetric=grid.symmetric)
    assert int((a.q != b.q).sum()) <= a.q.numel() // 1000  # sums in another order: a code on the edge may fall over


@pytest.mark.parametrize("grid", GRIDS[::2], ids=str)
def test_the_descent(grid: Grid) -> None:
    """Twice the same bits, and as far down as on a CPU; scales that heads of one group and of several share too."""
    weight, gram = _layer()
    weights = [weight, weight[:70] * 2]
    for tied in ({}, {"tie": 2, "tie_block": 16}, {"tie": 2, "tie_block": 128}):
        start = first_scale(weights, gram, **tied)
        factor = gptq.factored(gram, start)
        found, again = (descended(weights, factor, grid, **tied) for _ in range(2))
        assert torch.equal(found, again)
        there = gptq.Factor(start.cpu(), factor.order.cpu(), factor.follow.cpu(), factor.pivots.cpu())
        on_cpu = descended([w.cpu() for w in weights], there, grid, **tied).cuda()
        costs = factor.costs() * start.square()
        here, there, before = (expected_loss(weights, costs, s, grid) for s in (found, on_cpu, start))
        assert here < 0.995 * before
        torch.testing.assert_close(here, there, rtol=2e-3, atol=0)


@pytest.mark.parametrize("grid", GRIDS[:2], ids=str)
def test_what_groups_span(grid: Grid) -> None:
    weight, gram = _layer()
    scale = torch.rand(512, device="cuda") + 0.5
    here, there = (expected_loss([w], d, s, grid) for w, d, s in (
        (weight.bfloat16(), gram.diagonal().contiguous(), scale),
        (weight.bfloat16().cpu(), gram.diagonal().cpu(), scale.cpu()),
    ))  # fmt: skip
    torch.testing.assert_close(here.cpu(), there, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gram_of_16_bit_inputs(dtype: torch.dtype) -> None:
    x = torch.randn(20000, 3000, device="cuda").to(dtype)
    made = Gram(3000, x.device)
    for part in x.split(3001):
        made.add(part)
    want = x.double().T @ x.double() / len(x)
    torch.testing.assert_close(made.mean().double(), want, rtol=1e-4, atol=2e-5)


def test_the_fast_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Panels on the tensor cores hand errors on as the exact factor does, outlier channels or not."""
    torch.manual_seed(0)
    width = 5000
    x = torch.randn(4 * width, width, device="cuda") @ (torch.randn(width, width, device="cuda") / width**0.5)
    x[:, ::97] *= 50
    gram = x.T @ x / len(x)
    order = gptq.column_order(gram)
    exact, pivots = gptq.feedback(gram, order, damp=0.1)
    monkeypatch.setattr(gptq, "PANEL", 1024)
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        fast, costs = gptq.feedback(gram, order, damp=0.1)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert not torch.equal(exact, fast)  # the other path was taken
    weight = torch.randn(64, width, device="cuda")[:, order]
    g = groups(weight, 50)
    scale, zero = fit(g.amin(-1), g.amax(-1), Grid())
    losses = []
    for follow in (exact, fast):
        q = gptq.round_columns(weight.T.contiguous(), follow, order, scale, zero, symmetric=False)
        back = torch.argsort(order)
        d = (dequantize(q) - weight[:, back]).double()
        losses.append(float(((d @ gram.double()) * d).sum()))
    assert abs(losses[1] / losses[0] - 1) < 0.01
    torch.testing.assert_close(costs, pivots, rtol=0.02, atol=0)


def test_pictures_in_one_call_are_seen_as_one_by_one(pebble: Path) -> None:
    """Three pictures through the vision tower, packed: what the tower puts out is within 16-bit rounding."""
    skeleton = build(pebble, device="cuda")
    load_outside(skeleton)
    tower: Any = skeleton.module.model.visual
    samples = [s for s in drawn(12) if s.images][:3]
    inputs = [{k: v.cuda() for k, v in encode(skeleton, s).items()} for s in samples]
    grid = torch.cat([x["image_grid_thw"] for x in inputs])
    pixels = torch.cat([x["pixel_values"] for x in inputs]).to(skeleton.dtype)

    def seen() -> torch.Tensor:
        found = tower(pixels, grid_thw=grid)
        return getattr(found, "pooler_output", found).float()

    assert tower.config._attn_implementation == "flash_packed"
    packed = seen()
    tower.config._attn_implementation = "sdpa"
    apart = seen()
    assert (packed - apart).abs().max() < 0.03 * apart.abs().max()
    assert (packed - apart).square().mean() < 1e-4 * apart.square().mean()


@pytest.mark.parametrize("width", [384, 1500])
def test_the_factor_is_the_plain_one(width: int, plain: pytest.MonkeyPatch) -> None:
    """H taken in order, divided, factored, rescaled, whether it lies as cuSOLVER leaves it or not."""
    torch.manual_seed(0)
    x = torch.randn(2 * width, width, device="cuda") * torch.logspace(-1, 1, width, device="cuda")
    gram, (start, end) = x.T @ x / len(x), torch.rand(2, width, device="cuda") + 0.5
    torch.backends.cuda.matmul.allow_tf32 = False
    here = gptq.rescaled(gptq.factored(gram, start), end)
    _off(plain)
    there = gptq.rescaled(gptq.factored(gram, start), end)
    assert torch.equal(here.order, there.order)
    torch.testing.assert_close(here.follow, there.follow, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(here.pivots, there.pivots, rtol=1e-3, atol=0)
