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
    """No weight moves by more than half a step and the little that rounding the scale costs."""
    w = torch.randn(6, 256, generator=torch.Generator().manual_seed(seed)) * spread
    grid = Grid(group_size, symmetric)
    x = quantize(w, grid)
    step = x.scale.repeat_interleave(group_size, 1)
    assert bool(((dequantize(x) - w).abs() <= step * 0.5 + 16 * step * 2**-8 + 1e-12).all())
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
