"""A picture becomes slices, and a slice becomes patches: LLaVA-UHD's rule (Xu et al. 2024, section 3.1).

A picture of more than one slice's area is cut along the grid of columns and rows whose shape is nearest its own; an
overview goes before the slices. Knows no model, no tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL.Image import Image, Resampling
from torch import Tensor

Size = tuple[float, float]  # width, height


@dataclass(frozen=True)
class Slicing:
    """The rule's numbers, as preprocessor_config.json has them: a slice has about `side` x `side` pixels."""

    side: int = 448
    patch: int = 14
    most: int = 9  # slices of one picture, the overview not counted
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)


def best_grid(size: Size, rule: Slicing, *, most: int | None = None) -> tuple[int, int] | None:
    """(columns, rows) to cut a picture of `size` into, None for one that is not cut."""
    width, height = size
    most = rule.most if most is None else most
    wanted = min(math.ceil(width * height / rule.side**2), most)
    if wanted <= 1:
        return None
    counts = [n for n in (wanted - 1, wanted, wanted + 1) if 1 < n <= most]
    grids = [(columns, n // columns) for n in counts for columns in range(1, n + 1) if n % columns == 0]
    return min(grids, key=lambda g: abs(math.log(width / height) - math.log(g[0] / g[1])))


def fitted(size: Size, rule: Slicing, *, enlarge: bool) -> tuple[int, int]:
    """The whole-patch size nearest `size`, its area brought to one slice's when it is larger (or if `enlarge`)."""
    width, height = size
    if enlarge or width * height > rule.side**2:
        ratio = width / height
        height = int(rule.side / math.sqrt(ratio))
        width = int(height * ratio)
    return _multiple(width, rule.patch), _multiple(height, rule.patch)


def _multiple(length: float, of: int) -> int:
    return max(round(length / of) * of, of)


def slices(image: Image, rule: Slicing, *, most: int | None = None) -> list[Image]:
    """The overview, then the slices row by row; one picture alone when it is not cut."""
    image = image.convert("RGB")
    grid = best_grid(image.size, rule, most=most)
    overview = image.resize(fitted(image.size, rule, enlarge=grid is None), Resampling.BICUBIC)
    if grid is None:
        return [overview]
    cell = tuple(_multiple(length, n) / n for length, n in zip(image.size, grid, strict=True))
    width, height = fitted((cell[0], cell[1]), rule, enlarge=True)
    columns, rows = grid
    large = image.resize((width * columns, height * rows), Resampling.BICUBIC)
    corners = [(x * width, y * height) for y in range(rows) for x in range(columns)]
    return [overview, *(large.crop((x, y, x + width, y + height)) for x, y in corners)]


def patches(image: Image, rule: Slicing) -> tuple[Tensor, tuple[int, int]]:
    """A slice's patches, float32 [rows * columns, 3, patch, patch] in reading order, and its grid (rows, columns)."""
    pixels = np.asarray(image).astype(np.float32) / 255
    pixels = (pixels - np.array(rule.mean, np.float32)) / np.array(rule.std, np.float32)
    rows, columns = (length // rule.patch for length in pixels.shape[:2])
    cut = torch.from_numpy(pixels).reshape(rows, rule.patch, columns, rule.patch, 3)
    return cut.permute(0, 2, 4, 1, 3).flatten(0, 1).contiguous(), (rows, columns)
