"""What can absorb a per-channel scale of a group's input, found by trying.

A norm that made the input, or a linear before it through which a scale of its rows comes unchanged: its output is
divided, what the group is given is multiplied, and the layer must put out what it did. No rule here knows a name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .family import Group
from .thin import is_linear

SAME = 1e-4  # of the largest change a layer makes: a fold that is none changes it by tenths


@dataclass(frozen=True)
class Seen:
    """One call of a module inside the layer."""

    name: str
    module: Any
    given: Tensor
    gave: Tensor
    again: Callable[[], Tensor]  # the same call once more


def memory_of(x: Tensor) -> tuple[int, int, int]:
    return x.untyped_storage().data_ptr(), x.data_ptr(), x.numel()


def absorbed(
    seen: list[Seen],
    memory: Any,
    group: list[Seen],
    beside: list[Seen],
    run: Callable[[], Tensor],
    plain: Tensor,
    heads: tuple[int, int],
) -> Group:
    """The group with what can absorb a scale of its input: the norm that made it, else the last linear before it
    through which a scale of its rows, or of the last of them, comes unchanged. `beside`: what stays in 16 bit and reads
    the same; `heads`: how many there are of values, and the width of one."""
    wide, names, others = group[0].given.shape[-1], tuple(g.name for g in group), tuple(b.name for b in beside)
    linears = [g.module for g in (*group, *beside)]
    for one in seen:
        if memory_of(one.gave) == memory and not is_linear(one.module):
            weight = one.module._parameters["weight"]
            offset = offset_of(one) if weight is not None and weight.numel() == wide else None
            s = torch.rand(wide) * 1.5 + 0.5
            if offset is not None and folds(one.module, s, linears, s, run, plain):
                return Group(names, one.name, offset, beside=others)
            return Group(names, None)
    first = next(i for i, s in enumerate(seen) if s.name == group[0].name)
    for one in reversed(seen[:first]):
        if not is_linear(one.module) or one.module in linears:
            continue
        every = one.module.out_features
        for count in dict.fromkeys((every, wide, heads[0] * heads[1])):
            tie = wide // count
            if count > every or wide % count or (tie > 1 and count % heads[1]):
                continue
            rows = torch.rand(count) * 1.5 + 0.5
            s = rows if tie == 1 else rows.view(-1, heads[1]).repeat_interleave(tie, 0).flatten()
            if folds(one.module, torch.cat([torch.ones(every - count), rows]), linears, s, run, plain):
                return Group(names, one.name, last=count if count < every else 0, beside=others)
    return Group(names, None)


def folds(
    absorber: nn.Module, rows: Tensor, linears: list[nn.Module], s: Tensor, run: Callable[[], Tensor], plain: Tensor
) -> bool:
    """Whether the layer's output stays as it was with what `absorber` puts out divided and what `linears` are given
    multiplied."""
    divide: Any = lambda module, args, out: out / rows  # noqa: E731
    handles: list[Any] = [absorber.register_forward_hook(divide)]
    handles += [linear.register_forward_pre_hook(lambda module, args: (args[0] * s, *args[1:])) for linear in linears]
    try:
        return float((run() - plain).abs().max()) <= SAME * float(plain.abs().max())
    finally:
        for handle in handles:
            handle.remove()


def offset_of(one: Seen) -> float | None:
    """What a norm adds to its weight before it multiplies: 0, or Gemma's 1. None where it does neither."""
    weight, bias = one.module._parameters["weight"], one.module._parameters.get("bias")
    assert weight is not None
    kept = weight.data, None if bias is None else bias.data
    try:
        if bias is not None:
            bias.data = torch.zeros_like(bias)
        outs = []
        for value in (1.0, 3.0):
            weight.data = torch.full_like(kept[0], value)
            outs.append(one.again().double())
    finally:
        weight.data = kept[0]
        if bias is not None and kept[1] is not None:
            bias.data = kept[1]
    first, second = outs
    for offset in (0.0, 1.0):
        if torch.allclose(first * (3 + offset), second * (1 + offset), rtol=1e-3, atol=1e-5):
            return offset
    return None
