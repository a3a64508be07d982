"""The vision tower: SigLIP over slices of any shape (NaViT), each patch at the nearest of a fixed table of positions.

The encoder's layers are transformers' SigLIP. Knows no pictures and no text model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

Grid = tuple[int, int]  # rows, columns of a slice's patches


def nearest(count: int, side: int) -> Tensor:
    """Where `count` patches in a row lie in a table of `side`: long [count].

    In float32 and by repeated steps, as the models were trained: a quotient may fall on the other side of an edge.
    """
    places = torch.arange(0, 1 - 1e-6, float(1 / torch.tensor(count)))
    return torch.bucketize(places, torch.arange(1 / side, 1.0, 1 / side), right=True)


def real(grids: Sequence[Grid]) -> Tensor:
    """bool [slices, longest]: False behind a slice's own patches, where the batch is padded."""
    counts = torch.tensor([rows * columns for rows, columns in grids])
    return torch.arange(int(counts.max())) < counts[:, None]


class Embeddings(nn.Module):
    """Patches to vectors, with their positions."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.side = config.image_size // config.patch_size
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, config.patch_size, stride=config.patch_size
        )
        self.position_embedding = nn.Embedding(self.side**2, config.hidden_size)

    def forward(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """[patches, 3, p, p] of all slices behind one another -> [patches, hidden]."""
        where = [nearest(rows, self.side)[:, None] * self.side + nearest(cols, self.side) for rows, cols in grids]
        positions = torch.cat([w.flatten() for w in where]).to(patches.device)
        return self.patch_embedding(patches).flatten(1) + self.position_embedding(positions)


class Tower(nn.Module):
    """`config` is transformers' SiglipVisionConfig; `one_row` as in release.py."""

    def __init__(self, config: Any, *, one_row: bool) -> None:
        super().__init__()
        from transformers.models.siglip.modeling_siglip import SiglipEncoder

        self.one_row = one_row
        self.embeddings = Embeddings(config)
        self.encoder = SiglipEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """[patches, 3, p, p] of all slices behind one another -> [slices, longest, hidden], padded at the end."""
        placed = [(1, rows * columns) if self.one_row else (rows, columns) for rows, columns in grids]
        x = self.embeddings(patches, placed)
        x = pad_sequence(list(x.split([rows * columns for rows, columns in grids])), batch_first=True)
        seen = real(grids)
        mask = None if bool(seen.all()) else seen[:, None, None, :].to(x.device)  # the same for every head and query
        for layer in self.encoder.layers:
            x = layer(x, attention_mask=mask)
        return self.post_layernorm(x)
