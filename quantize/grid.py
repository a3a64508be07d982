"""The integer grid: group-wise 4-bit rounding of a weight matrix, and back.

Knows nothing of models, calibration or file formats. Everything is a pure function of tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

LEVELS = 15  # 4 bits: q in [0, 15]
MIDDLE = 8  # the zero point of a symmetric grid
TINY, HUGE = 2.0**-14, 65280.0  # normal fp16, and the largest value that bf16 holds too


@dataclass(frozen=True)
class Grid:
    """How weights are rounded. `scale_dtype` is what an engine multiplies in: scales are rounded to it *before*
    the weights are rounded to them, so that no engine adds an error of its own."""

    group_size: int = 128
    symmetric: bool = False
    scale_dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Quantized:
    """One weight on its grid, not packed: `w = (q - zero) * scale`, group by group along the input.

    q: uint8 [out, in], values 0..15. scale: float32 [out, in / group_size], each exact in fp16 and in the
    checkpoint's dtype; when symmetric, negative in some groups (fit). zero: uint8 [out, in / group_size]; 8 everywhere
    when symmetric.
    """

    q: Tensor
    scale: Tensor
    zero: Tensor
    group_size: int
    symmetric: bool

    def __post_init__(self) -> None:
        out, width = self.q.shape
        shape = (out, width // self.group_size)
        if width % self.group_size or self.scale.shape != shape or self.zero.shape != shape:
            raise ValueError(
                f"q {tuple(self.q.shape)} with group_size {self.group_size} wants scale and zero {shape}, "
                f"not {tuple(self.scale.shape)} and {tuple(self.zero.shape)}"
            )


def check_width(name: str, width: int, group_size: int) -> None:
    """ValueError when `group_size` does not divide the input width of the linear `name`."""
    if width % group_size:
        fits = [g for g in (128, 64, 32) if width % g == 0]
        hint = f"group sizes that do: {', '.join(map(str, fits))}" if fits else "no group size does; keep it in 16 bit"
        raise ValueError(f"group size {group_size} does not divide the {width} inputs of {name}; {hint}")


def exact_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` float32 [...] rounded to a value that both fp16 (on disk) and `dtype` (in the engine) hold exactly."""
    scale = scale.clamp(TINY, HUGE)
    if dtype == torch.bfloat16:
        scale = scale.to(
            torch.bfloat16
        ).float()  # 8 bits of mantissa: inside fp16's normal range this is exact there too
    return scale.to(torch.float16).float()


def fit(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero point (float32, same shape as `low`) of the grid that spans [low, high].

    The range always holds 0, so that a pruned weight stays exactly 0. Asymmetric: Lin et al., AWQ (2023), sec. 2.
    Symmetric: the eight steps on one side of zero are for the end that is further from it, so where that is the upper
    one the scale is negative; the other side has seven. (So do llama.cpp's Q4_0 and AutoRound. Steps of 2/15 of the
    further end would do as much for both sides and are a fifteenth longer.)
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    levels = low.new_tensor(LEVELS)  # by a plain number a GPU divides inexactly, and would find other scales than a CPU
    if grid.symmetric:
        scale = exact_scale(torch.maximum(-low, high) / MIDDLE, grid.scale_dtype)
        return torch.where(high > -low, -scale, scale), torch.full_like(scale, MIDDLE)
    scale = exact_scale((high - low) / levels, grid.scale_dtype)
    return scale, (-low / scale).round().clamp(0, LEVELS)


def groups(weight: Tensor, group_size: int) -> Tensor:
    """[out, in] viewed as [out, in / group_size, group_size]."""
    return weight.unflatten(1, (-1, group_size))


def fake(weight: Tensor, grid: Grid, *, shrink: Tensor | float = 1.0) -> Tensor:
    """Round [out, in] to its grid and back, float32. `shrink` (scalar or [out, groups]) clips each group's range."""
    w = groups(weight, grid.group_size)  # [out, groups, g]
    scale, zero = fit(w.amin(-1) * shrink, w.amax(-1) * shrink, grid)
    scale, zero = scale.unsqueeze(-1), zero.unsqueeze(-1)
    return ((w / scale).round_().add_(zero).clamp_(0, LEVELS).sub_(zero).mul_(scale)).flatten(1)


def quantize(weight: Tensor, grid: Grid, *, shrink: Tensor | float = 1.0) -> Quantized:
    """Round-to-nearest of [out, in] float32; `shrink` as in `fake`. ValueError when group_size does not divide in."""
    check_width("this weight", weight.shape[1], grid.group_size)
    w = groups(weight, grid.group_size)
    scale, zero = fit(w.amin(-1) * shrink, w.amax(-1) * shrink, grid)
    q = ((w / scale.unsqueeze(-1)).round_().add_(zero.unsqueeze(-1)).clamp_(0, LEVELS)).flatten(1)
    return Quantized(q.to(torch.uint8), scale, zero.to(torch.uint8), grid.group_size, grid.symmetric)


def dequantize(x: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """[out, in] in `dtype`: the product is taken in float32 and rounded once, as the engines' kernels do."""
    w = groups(x.q.float(), x.group_size)
    w -= x.zero.float().unsqueeze(-1)
    w *= x.scale.unsqueeze(-1)
    return w.flatten(1).to(dtype)


def rows_of(x: Quantized, rows: slice) -> Quantized:
    """Some of the rows."""
    return replace(x, q=x.q[rows], scale=x.scale[rows], zero=x.zero[rows])


def split_rows(x: Quantized, heights: Sequence[int]) -> list[Quantized]:
    """Cut into pieces of so many rows."""
    parts = zip(x.q.split(heights), x.scale.split(heights), x.zero.split(heights), strict=True)
    return [replace(x, q=q, scale=scale, zero=zero) for q, scale, zero in parts]


def stacked(parts: Sequence[Quantized]) -> Quantized:
    """Rows below rows."""
    q, scale, zero = (torch.cat([getattr(x, n) for x in parts]) for n in ("q", "scale", "zero"))
    return replace(parts[0], q=q, scale=scale, zero=zero)
