"""Linears that a checkpoint stores as one and transformers computes as several: InternLM2's `wqkv`.

The model keeps the checkpoint's one linear, so that it is quantized, packed and named as engines expect it; what
transformers calls q_proj, k_proj and v_proj become its rows. Knows no model class.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Rows(nn.Module):
    """In the place of q_proj, k_proj or v_proj: some rows of what `joined` puts out, which runs once for the three.

    Rows stand in blocks, one for each value head: the query heads that read it, its key head, itself."""

    def __init__(self, joined: nn.Linear, kept: list[Tensor], *, role: int, blocks: int, width: int):
        super().__init__()
        self._joined = (joined,)  # a tuple, so that its parameters have one name only
        self._kept = kept  # the last output, for those that come after: shared by the three
        self.role, self.blocks, self.width = role, blocks, width

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., heads * width]."""
        if self.role == 0:
            self._kept[:] = [self._joined[0](x)]
        every = self._kept[0].unflatten(-1, (self.blocks, -1, self.width))
        mine = (slice(None, -2), slice(-2, -1), slice(-1, None))[self.role]
        if self.role == 2:
            self._kept.clear()
        return every[..., mine, :].flatten(-3)


def join(attention: Any, *, blocks: int, width: int, name: str = "wqkv") -> None:
    """Give an attention module with q_proj, k_proj and v_proj one linear `name` [(queries + 2) * blocks * width, in] in
    their place. They are called in this order, on the same input."""
    parts = [attention.q_proj, attention.k_proj, attention.v_proj]
    rows, first = sum(p.out_features for p in parts), parts[0]
    made = nn.Linear(first.in_features, rows, bias=first.bias is not None, device="meta", dtype=first.weight.dtype)
    attention.add_module(name, made)
    kept: list[Tensor] = []
    for role, part in enumerate(("q_proj", "k_proj", "v_proj")):
        setattr(attention, part, Rows(made, kept, role=role, blocks=blocks, width=width))
