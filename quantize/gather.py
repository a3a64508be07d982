"""The Gram matrices of one decoder layer, gathered while it runs on every sample.

Knows no method: which linears share an input is told, and what they are fed is watched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .experts import Expert
from .family import Group
from .gram import TOKENS, Gram
from .lockstep import Call, Seen, Stop
from .ranks import total


def collect_grams(
    stop: Stop,
    groups: Sequence[Group],
    *,
    everything: Collection[Group] = (),
    hold: int = TOKENS,
    before: Callable[[Call], None] = lambda call: None,
) -> tuple[dict[Group, Tensor], int]:
    """Run the layer on every halted call and give, per group, H = sum x x^T / tokens, float32 [in, in]; none for a
    group that was fed nothing but zeros, or nothing at all, as a mixture's expert may be.

    The groups of `everything`, each inside an expert, get the inputs that they would have if every token of the layer
    came to that expert. `hold` inputs, about, are gathered before they are multiplied; `before` each call is called
    with it, a second time where the layer is run twice.

    Where an H is not finite the layer is run once more and the tokens are left out whose inputs are not: the second
    number is how many, in the linear that lacks most. ValueError when no token is left: no scale and no rounding can be
    judged then.
    """
    chosen = set(everything)
    grams, _ = _sum_grams(stop, groups, chosen, hold, before=before)
    spoilt = tuple(g for g in groups if not math.isfinite(_energy(grams[g])))
    for group in spoilt:
        del grams[group]  # before the next is summed: it may be the largest thing there is
    counts: dict[Group, tuple[int, int]] = {}
    if spoilt:
        again, counts = _sum_grams(stop, spoilt, chosen, hold, finite_only=True, before=before)
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
    stop: Stop,
    groups: Sequence[Group],
    everything: Collection[Group],
    hold: int,
    *,
    finite_only: bool = False,
    before: Callable[[Call], None] = lambda call: None,
) -> tuple[dict[Group, Tensor], dict[Group, tuple[int, int]]]:
    """Every group's H, of zeros where no token came; and with `finite_only` how many tokens it has and lacks."""
    sums: dict[str, Gram] = {}
    counts: dict[str, Tensor] = {}
    keys: dict[Group, str] = {}  # groups with the same inputs share a matrix: every expert's gate, given all tokens
    handles = []
    here: list[Call] = []  # the call under way
    unseen: set[str] = set()  # of its inputs: what comes after the last input wanted need not be computed

    def watch(key: str, inputs: Callable[[Tensor], Tensor] = lambda x: x) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = args[0] if args else kwargs["hidden_states"]
            x = here[0].kept(inputs(given.detach().flatten(0, -2)))  # [tokens, in]
            if finite_only:
                fine = x.float().square().sum(-1).isfinite()  # squares too: they are what is summed
                counts[key] += torch.stack([fine.sum(), (~fine).sum()])
                x = x[fine]
            sums[key].add(x)
            unseen.discard(key)
            if not unseen:
                raise Seen

        return hook

    for group in groups:
        weight = stop.layer.get_parameter(f"{group.linears[0]}.weight")
        watched, key, inputs = group.linears[0], group.linears[0], (lambda x: x)
        if group in everything:
            at, _, leaf = group.linears[0].rpartition(".")
            watched = at.rpartition(".")[0]
            if leaf == "down_proj":
                expert = stop.layer.get_submodule(at)
                assert isinstance(expert, Expert)
                inputs = expert.inner
            else:
                key = watched
        keys[group] = key
        if key not in sums:
            sums[key] = Gram(weight.shape[1], weight.device, hold=hold)
            counts[key] = torch.zeros(2, dtype=torch.int64, device=weight.device)
            module = stop.layer.get_submodule(watched)
            handles.append(module.register_forward_pre_hook(watch(key, inputs), with_kwargs=True))
    try:
        for call in stop.calls:
            before(call)
            here[:] = [call]
            unseen.update(sums)
            stop.look(call)
    finally:
        for handle in handles:
            handle.remove()
    found = {key: gram.mean() for key, gram in sums.items()}
    grams = {group: found[key] for group, key in keys.items()}
    if not finite_only:
        return grams, {}
    told = {key: total(c).tolist() for key, c in counts.items()}
    return grams, {group: (told[key][0], told[key][1]) for group, key in keys.items()}
