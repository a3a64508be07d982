"""The pull towards the 16-bit model: what a group of linears is to put out on the inputs that it really gets.

The layers before a group are quantized, and so are the groups before it in its own layer; its inputs x have drifted
from the inputs y it has in the 16-bit model. The weights that put out W y when they are given x are, by least squares,
W + W C (H + damping)^-1, with H = mean x x^T and the drift C = mean (y - x) x^T (Li et al., GPTAQ, 2025, equation 8, in
closed form; Zhang et al., Qronos, 2025). They are then rounded like any others. Both streams run in lockstep: each
micro-batch is there twice, once as the 16-bit model sees it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .family import Group
from .gram import Cross, Gram
from .lockstep import Call, Seen, Stop
from .ranks import total

PIECE = 2**25  # weights solved for at a time, float32


def push(weight: Tensor, drift: Tensor, columns: Tensor | None) -> Tensor:
    """W C, float32 [rows, in], for `weight` [rows, in] whose columns carry the scale `columns` [in]; C [in, in] in the
    inputs' own terms, which is spent."""
    if columns is not None:
        drift /= columns[:, None]
        drift /= columns
    return weight @ drift


def pulled(pushed: Tensor, follow: Tensor, pivots: Tensor, order: Tensor) -> Tensor:
    """W C (H + damping)^-1, float32 [rows, in], in the place of `pushed`, which is W C. `follow`, `pivots`: the factor
    of the damped and scaled H in the given `order` (gptq.feedback)."""
    for rows in pushed.split(max(1, PIECE // pushed.shape[1])):
        x = rows[:, order]
        x = torch.linalg.solve_triangular(follow.mT, x, upper=True, left=False, unitriangular=True)
        x /= pivots
        rows[:, order] = torch.linalg.solve_triangular(follow, x, upper=False, left=False, unitriangular=True)
    return pushed


def place(layer: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Put these parameters, by name inside the layer, where the layer's own are."""
    for name, parameter in parameters.items():
        path, _, leaf = name.rpartition(".")
        layer.get_submodule(path)._parameters[leaf] = parameter


def inputs_of(stop: Stop, call: Call, group: Group) -> Tensor | None:
    """What the group's linears are given in one call, [tokens, in]; None where the call never comes to them."""
    found: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(call.kept(args[0].detach().flatten(0, -2)))
        raise Seen

    handle = stop.layer.get_submodule(group.linears[0]).register_forward_pre_hook(hook)
    try:
        stop.look(call)
    finally:
        handle.remove()
    return found[0] if found else None


def drift_of(
    stop: Stop,
    pairs: Sequence[tuple[Call, Call]],
    group: Group,
    *,
    now: Mapping[str, nn.Parameter],
    original: Mapping[str, nn.Parameter],
    columns: Tensor | None,
) -> tuple[Tensor, Tensor] | None:
    """H and C of the group's inputs, float32 [in, in], in the inputs' own terms; None when no token came to it.

    `pairs`: each micro-batch as the quantized and as the 16-bit model runs it. `now`, `original`: the layer's
    parameters in either; those of `now` divide the group's inputs by `columns` [in]. Tokens that are not finite in one
    of the two are left out.
    """
    gram: Gram | None = None
    cross: Cross | None = None
    for mine, theirs in pairs:
        place(stop.layer, original)
        y = inputs_of(stop, theirs, group)
        place(stop.layer, now)
        x = inputs_of(stop, mine, group)
        if x is None or y is None:
            continue
        apart = ((y / columns if columns is not None else y.float()) - x).to(x.dtype)
        # their squares too: what is summed is no larger
        fine = torch.isfinite(x.float().square().sum(1)) & torch.isfinite(apart.float().square().sum(1))
        x, apart = x[fine], apart[fine]
        if gram is None or cross is None:
            gram, cross = Gram(x.shape[1], x.device), Cross(x.shape[1], x.device)
        gram.add(x)
        cross.add(apart, x)
    if gram is None or cross is None:
        return None
    tokens = int(total(torch.tensor(gram.tokens, device=cross.total.device)))
    h, c = gram.mean(), cross.mean(tokens)
    if columns is not None:
        for matrix in (h, c):
            matrix *= columns[:, None]
            matrix *= columns
    return h, c
