"""The grid: what rounding promises, whatever the weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmq.quantize.grid import Grid, Quantized, check_width, dequantize, exact_scale, fake, quantize


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    spread=st.floats(1e-4, 1e3),
    symmetric=st.booleans(),
    group_size=st.sampled_from([32, 64, 128]),
)
def test_rounding_is_near(seed: int, spread: float, symmetric: bool, group_size: int) -> None:
    """No weight moves by more than half a step and the little that rounding the scale costs; beyond the seventh step on
    the shorter side of a symmetric grid, by no more than a whole one."""
    w = torch.randn(6, 256, generator=torch.Generator().manual_seed(seed)) * spread
    grid = Grid(group_size, symmetric)
    x = quantize(w, grid)
    step = x.scale.repeat_interleave(group_size, 1)
    reach = torch.where(symmetric & (w * step.sign() > 7 * step.abs()), 1.0, 0.5)
    step = step.abs()
    assert bool(((dequantize(x) - w).abs() <= step * reach + 16 * step * 2**-8 + 1e-12).all())
    assert int(x.q.max()) <= 15
    assert not symmetric or bool((x.zero == 8).all())


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), symmetric=st.booleans(), shrink=st.floats(0.5, 1.0))
def test_fake_is_quantize_and_back(seed: int, symmetric: bool, shrink: float) -> None:
    w = torch.randn(4, 128, generator=torch.Generator().manual_seed(seed))
    grid = Grid(64, symmetric)
    assert torch.equal(fake(w, grid, shrink=shrink), dequantize(quantize(w, grid, shrink=shrink)))


def test_a_zero_weight_stays_zero() -> None:
    w = torch.randn(8, 128)
    w[:, ::3] = 0
    w[0] = 0
    w[1] = w[1].abs() + 5  # a group that does not span zero by itself
    assert bool((dequantize(quantize(w, Grid(32)))[w == 0] == 0).all())


def test_the_further_end_of_a_symmetric_grid_has_eight_steps() -> None:
    """Whichever end that is: a group and its mirror image have the same codes, and scales of opposite sign."""
    w = torch.randn(50, 128, generator=torch.Generator().manual_seed(0))
    one, other = (quantize(x, Grid(32, symmetric=True, scale_dtype=torch.float16)) for x in (w, -w))
    assert torch.equal(one.q, other.q)
    assert torch.equal(one.scale, -other.scale)
    assert 0.3 < float((one.scale < 0).float().mean()) < 0.7
    ends = w.view(50, 4, 32).gather(2, w.view(50, 4, 32).abs().argmax(-1, keepdim=True))[..., 0]
    torch.testing.assert_close(one.scale * -8, ends, rtol=2**-11, atol=0)
    even = torch.round(w * 7 / w.abs().amax(1, keepdim=True)) / 7  # fifteen even levels around zero
    assert float((dequantize(quantize(w, Grid(128, True))) - w).square().sum()) < float(
        (even * w.abs().amax(1, keepdim=True) - w).square().sum()
    )


@given(st.floats(1e-12, 1e9), st.sampled_from([torch.bfloat16, torch.float16]))
def test_scales_are_exact_everywhere(value: float, dtype: torch.dtype) -> None:
    """fp16 on disk and the engine's dtype hold the very same number, so engines add no error of their own."""
    scale = exact_scale(torch.tensor(value), dtype)
    assert 0 < scale < torch.inf
    assert torch.equal(scale.to(torch.float16).float(), scale)
    assert dtype == torch.float16 or torch.equal(scale.to(torch.bfloat16).float(), scale)


def test_group_size_must_divide() -> None:
    with pytest.raises(ValueError, match=r"128 does not divide the 192 inputs of x; group sizes that do: 64"):
        check_width("x", 192, 128)
    with pytest.raises(ValueError, match="keep it in 16 bit"):
        check_width("x", 200, 128)


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="wants scale and zero"):
        Quantized(torch.zeros(4, 64, dtype=torch.uint8), torch.ones(4, 3), torch.zeros(4, 3), 32, False)
