"""The Gram matrices of one decoder layer, gathered while it runs on every sample.

Knows no method: which linears share an input is told, and what they are fed is watched.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .family import Group
from .gram import Gram
from .lockstep import Stop
from .ranks import total


def collect_grams(stop: Stop, groups: tuple[Group, ...]) -> tuple[dict[Group, Tensor], int]:
    """Run the layer on every halted call and give, per group, H = sum x x^T / tokens, float32 [in, in]; none for a
    group that was fed nothing but zeros, or nothing at all, as a mixture's expert may be.

    Where an H is not finite the layer is run once more and the tokens are left out whose inputs are not: the second
    number is how many, in the linear that lacks most. ValueError when no token is left: no scale and no rounding can be
    judged then.
    """
    grams, _ = _sum_grams(stop, groups)
    spoilt = tuple(g for g in groups if not math.isfinite(_energy(grams[g])))
    for group in spoilt:
        del grams[group]  # before the next is summed: it may be the largest thing there is
    counts: dict[Group, tuple[int, int]] = {}
    if spoilt:
        again, counts = _sum_grams(stop, spoilt, finite_only=True)
        grams |= again
    for group, (kept, _) in counts.items():
        if not kept or not math.isfinite(_energy(grams[group])):
            raise ValueError(
                f"the inputs of {group.linears[0]} in decoder layer {stop.index} are not finite: the checkpoint "
                "overflows in its own dtype, or is damaged; --device cpu computes in float32"
            )
    left_out = max((lost for _, lost in counts.values()), default=0)
    return {group: gram for group, gram in grams.items() if _energy(gram)}, left_out


def _energy(gram: Tensor) -> float:
    return float(gram.diagonal().sum())


def _sum_grams(
    stop: Stop, groups: tuple[Group, ...], *, finite_only: bool = False
) -> tuple[dict[Group, Tensor], dict[Group, tuple[int, int]]]:
    """Every group's H, of zeros where no token came; and with `finite_only` how many tokens it has and lacks."""
    sums: dict[Group, Gram] = {}
    counts: dict[Group, Tensor] = {}

    def watch(group: Group) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach().flatten(0, -2)  # [tokens, in]
            if finite_only:
                fine = x.float().square().sum(-1).isfinite()  # squares too: they are what is summed
                counts[group] += torch.stack([fine.sum(), (~fine).sum()])
                x = x[fine]
            sums[group].add(x)

        return hook

    for group in groups:
        weight = stop.layer.get_parameter(f"{group.linears[0]}.weight")
        sums[group] = Gram(weight.shape[1], weight.device)
        counts[group] = torch.zeros(2, dtype=torch.int64, device=weight.device)
    handles = [stop.layer.get_submodule(g.linears[0]).register_forward_pre_hook(watch(g)) for g in groups]
    try:
        for call in stop.calls:
            stop.run(call)
    finally:
        for handle in handles:
            handle.remove()
    grams = {g: sums.pop(g).mean() for g in groups}
    if not finite_only:
        return grams, {}
    told = {g: total(c).tolist() for g, c in counts.items()}
    return grams, {g: (kept, lost) for g, (kept, lost) in told.items()}
