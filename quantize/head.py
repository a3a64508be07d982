"""The output head in int4: its inputs gathered while the last layer runs, its rows quantized a block at a time.

A head is as large as several layers, but its rows are independent once H is known, so no more than a block of them is
ever on the device. Knows no file format.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .family import Group
from .gram import Gram
from .grid import Grid, Quantized, check_width
from .inputs import media_mask
from .judge import PIECE
from .method import Problem, Solution, output_squares
from .ranks import total
from .skeleton import Skeleton, names_of, outside, vision
from .steps import STEPS, solve

EIGHT = 8  # rows that share a word in some formats: no block may end within one
INPUT = "model.embed_tokens.weight"  # how most checkpoints' names of token embeddings end


@dataclass(frozen=True)
class Head:
    """The linear that gives the logits. `name` is its module, `stored` the linear's name in checkpoints, `source` the
    tensor that its weight is read from: another's where the two are `tied`."""

    name: str
    stored: str
    source: str
    tied: bool
    rows: int
    width: int


def head_of(skeleton: Skeleton, grid: Grid) -> Head:
    """The model's head. ValueError where it has none that could be quantized, or its width does not go into groups."""
    module = skeleton.module.get_output_embeddings()
    if module is None:
        raise ValueError("the model has no output head that transformers knows of; leave --head out")
    name = next(n for n, m in skeleton.module.named_modules() if m is module)
    rows, width = module.weight.shape
    own, embedded = skeleton.names.get(f"{name}.weight"), _embedding(skeleton)
    if own is None and embedded is None:
        raise ValueError(f"no tensor of the checkpoint is the weight of {name}; leave --head out")
    stored = own or _beside(str(embedded))
    config = skeleton.module.config
    declared = getattr(config, "tie_word_embeddings", False) or config.get_text_config().tie_word_embeddings
    check_width(name, width, grid.group_size)
    return Head(name, stored.removesuffix(".weight"), own or str(embedded), bool(own is None or declared), rows, width)


def _embedding(skeleton: Skeleton) -> str | None:
    embedding = skeleton.module.get_input_embeddings()
    path = next((n for n, m in skeleton.module.named_modules() if m is embedding), "")
    return skeleton.names.get(f"{path}.weight")


def _beside(embedding: str) -> str:
    """What a head of its own is called in a checkpoint whose token embeddings have this name."""
    known = embedding.endswith(INPUT)
    return f"{embedding.removesuffix(INPUT) if known else ''}lm_head.weight"


def after_layers(skeleton: Skeleton) -> list[str]:
    """The parameters that run between the last decoder layer and the head: the final norm, of all that is beside the
    layers and neither a lookup (Gemma 4 has one larger than its layers) nor a tower (Phi-4-multimodal)."""
    module, text = skeleton.module, skeleton.family.layers.rpartition(".")[0] + "."
    lookups = [m for m in module.modules() if isinstance(m, nn.Embedding)]
    apart = (module.get_input_embeddings(), module.get_output_embeddings(), *lookups)
    others = set(vision(skeleton)).union(*(names_of(skeleton, m) for m in apart))
    named = dict(module.named_parameters())
    return [n for n in outside(skeleton) if n.startswith(text) and n in named and n not in others]


class Listener:
    """What the head is fed, summed to H. Tokens that stand for pieces of a picture are left out, for nobody reads what
    the head says there; so are those that are not finite, which are counted."""

    def __init__(self, skeleton: Skeleton, head: Head):
        self._skeleton = skeleton
        self._gram = Gram(head.width, skeleton.device)
        self._left_out = torch.zeros(1, dtype=torch.int64, device=skeleton.device)

    def hear(self, ids: Tensor, output: Any) -> None:
        """`ids` int64 [batch, tokens], and what the model under the head gives for them."""
        x = output.last_hidden_state[~media_mask(self._skeleton, ids)]  # [tokens, hidden]
        fine = x.float().square().sum(-1).isfinite()
        self._left_out += (~fine).sum()
        self._gram.add(x[fine])

    def mean(self) -> tuple[Tensor, int]:
        """H float32 [in, in] of every rank's tokens, and how many were left out. ValueError where none was finite."""
        left_out = int(total(self._left_out))
        h = self._gram.mean()
        if not bool(h.diagonal().sum() > 0):
            raise ValueError("the inputs of the output head are not finite, or zero: the checkpoint is damaged")
        return h, left_out


def quantize_head(
    skeleton: Skeleton,
    head: Head,
    gram: Tensor,
    grid: Grid,
    steps: tuple[str, str],
    tokens: int,
    tell: Callable[[int], None] = lambda rows: None,
) -> Solution:
    """Quantize the head by the clip and the rounding of (method, quality) `steps`, on H `gram` [in, in] of `tokens`
    tokens. There is nothing before it to take a scale, and nothing behind it to make up for an error. The codes are
    left on the host; `tell(rows)` is called after each block."""
    weight = skeleton.source.get(head.source)
    step = max(EIGHT, PIECE // head.width // EIGHT * EIGHT)
    how = replace(STEPS[steps], pull=False, even=False)  # even, each block would go by its own rows, for nothing
    group = Group((head.name,), None)
    q = torch.empty((head.rows, head.width), dtype=torch.uint8)
    scale = torch.empty((head.rows, head.width // grid.group_size))
    zero = torch.empty(scale.shape, dtype=torch.uint8)
    energy = lost = 0.0
    worse: dict[str, int] = {}
    for start in range(0, head.rows, step):
        rows = slice(start, min(start + step, head.rows))
        block = weight[rows].to(skeleton.device).to(skeleton.stored).to(skeleton.dtype)
        problem = Problem({f"{head.name}.weight": block}, (group,), {group: gram}, skeleton.stored, tokens=tokens)
        solution = solve(problem, grid, how)
        found = solution.quantized[head.name]
        assert isinstance(found, Quantized)
        q[rows], scale[rows], zero[rows] = found.q, found.scale, found.zero
        here = float(output_squares(block.float(), gram).sum())
        energy += here
        lost += here * solution.errors[head.name]
        for why in solution.fallbacks.values():
            worse[why] = worse.get(why, 0) + rows.stop - rows.start
        tell(rows.stop)
    why = {head.name: "; ".join(f"{n} rows: {w}" for w, n in worse.items())} if worse else {}
    whole = Quantized(q, scale, zero, grid.group_size, grid.symmetric)
    error = lost / max(energy, 1e-30)
    if not math.isfinite(error):
        raise ValueError(f"the weights of {head.name} are not finite: the checkpoint is damaged")
    return Solution({head.name: whole}, {}, {head.name: error}, why)
