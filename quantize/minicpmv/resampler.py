"""The resampler: a fixed number of learned queries looks once at a slice's patches, or at several frames' together.

Knows no pictures and no text model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .vision import Grid, real


def waves(places: Sequence[int], width: int) -> Tensor:
    """Sines, then cosines of each place: float32 [places, width] (Vaswani et al. 2017, section 3.5)."""
    half = width // 2
    speeds = 1.0 / 10000 ** (np.arange(half, dtype=np.float32) / np.float32(half))
    angles = np.outer(np.asarray(places, np.float32), speeds)
    return torch.from_numpy(np.concatenate([np.sin(angles), np.cos(angles)], axis=1))


def on_grid(grid: Grid, like: Tensor) -> Tensor:
    """[rows * columns, width], with the width, dtype and device of `like`: the first half says the column, the second
    the row."""
    rows, columns = grid
    half = like.shape[-1] // 2
    x = waves(range(columns), half).to(like)[None].expand(rows, -1, -1)
    y = waves(range(rows), half).to(like)[:, None].expand(-1, columns, -1)
    return torch.cat([x, y], dim=-1).flatten(0, 1)


class Resampler(nn.Module):
    """`width` is the text model's, `seen` the vision tower's; a head is 128 wide."""

    def __init__(self, queries: int, width: int, seen: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(queries, width))
        self.kv_proj = nn.Identity() if seen == width else nn.Linear(seen, width, bias=False)
        self.attn = nn.MultiheadAttention(width, width // 128, batch_first=True)
        self.ln_q = nn.LayerNorm(width, eps=1e-6)
        self.ln_kv = nn.LayerNorm(width, eps=1e-6)
        self.ln_post = nn.LayerNorm(width, eps=1e-6)
        self.proj = nn.Parameter(torch.empty(width, width))

    def forward(self, x: Tensor, grids: Sequence[Grid], frames: Sequence[Sequence[int]] | None = None) -> Tensor:
        """[slices, longest, seen] -> [slices, queries, width].

        `frames` packs frames together, and there is one output a group: each group is the times of its frames, -1 for
        a slice that has none.
        """
        values = self.ln_kv(self.kv_proj(x))
        keys = values + pad_sequence([on_grid(g, values) for g in grids], batch_first=True)
        padding = ~real(grids).to(x.device)
        if frames is not None:
            times = [t for group in frames for t in group]
            moments = waves([max(t, 0) for t in times], keys.shape[-1]) * torch.tensor([t >= 0 for t in times])[:, None]
            keys = keys + moments[:, None].to(keys)
            keys, values = (_together(part, frames) for part in (keys, values))
            padding = _together(padding, frames, fill=1)
        queries = self.ln_q(self.query).expand(len(values), -1, -1)
        out, _ = self.attn(queries, keys, values, key_padding_mask=padding, need_weights=False)
        return self.ln_post(out) @ self.proj


def _together(x: Tensor, frames: Sequence[Sequence[int]], *, fill: float = 0) -> Tensor:
    """The frames of each group behind one another: [frames, longest, ...] -> [groups, most * longest, ...]."""
    groups = x.split([len(group) for group in frames])
    return pad_sequence([g.flatten(0, 1) for g in groups], batch_first=True, padding_value=fill)
