"""What the router of a mixture does with the calibration: tokens that each expert saw, and which experts saw too few.

An expert is calibrated on the tokens that it gets. Where they are few for the width of its inputs, all tokens of the
layer are put beside them, with a weight (`blended`). Knows no method and no file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .experts import experts_of
from .family import Group
from .lockstep import Call
from .ranks import total

HOLD = 1024  # an expert's inputs gathered before they are multiplied: there are many experts
FLOOR = 4.0  # tokens to a channel of its inputs, from which on an expert's own say enough (docs/mixtures.md)
BESIDE = 1 / 16  # of so many tokens: as how many those of the layer count; half and four times as many measured alike
HELD = 2**32  # bytes of experts' Gram matrices at a time


@dataclass(frozen=True)
class Routed:
    """Tokens of the calibration that each expert of one layer's mixture got, those of text and of pictures; the
    experts that got fewer than `floor` and so were given all tokens of the layer besides, and those of them that got
    none."""

    path: str
    text: tuple[int, ...]
    media: tuple[int, ...]
    floor: int

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(a + b for a, b in zip(self.text, self.media, strict=True))

    @property
    def few(self) -> tuple[int, ...]:
        return tuple(i for i, n in enumerate(self.tokens) if n < self.floor)

    @property
    def unseen(self) -> tuple[int, ...]:
        return tuple(i for i, n in enumerate(self.tokens) if not n)


@contextmanager
def counting(
    layer: nn.Module, media: Sequence[Tensor]
) -> Iterator[tuple[Callable[[Call], None], Callable[[], tuple[Routed, ...]]]]:
    """While a layer runs, count what its experts get. `media[call.number]`, bool [tokens], says which of a call's
    tokens stand for pictures. Yielded: what is to be told of each call before it runs, and what gives the counts of
    all ranks afterwards."""
    now: list[Call] = []
    counted: set[tuple[str, int]] = set()  # a layer that is run once more gives its experts nothing new
    mixtures = dict(experts_of(layer))
    counts: dict[str, Tensor] = {}

    def before(call: Call) -> None:
        now[:] = [call]

    def hook(path: str) -> Callable[..., None]:
        def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if (path, now[0].number) in counted:
                return
            counted.add((path, now[0].number))
            chosen = args[1] if len(args) > 1 else kwargs["top_k_index"]  # [tokens, k]
            mask = media[now[0].number].to(chosen.device)
            if len(mask) != len(chosen):
                raise ValueError(f"{len(chosen)} tokens come to the experts where the samples have {len(mask)}")
            for kind in (0, 1):
                mine = chosen[mask == bool(kind)].flatten()
                counts[path][kind] += torch.bincount(mine, minlength=counts[path].shape[1])

        return count

    handles = []
    for path, experts in mixtures.items():
        device = next(experts.parameters()).device
        counts[path] = torch.zeros(2, len(experts), dtype=torch.int64, device=device)
        handles.append(experts.register_forward_pre_hook(hook(path), with_kwargs=True))

    def seen() -> tuple[Routed, ...]:
        found = []
        for path, count in counts.items():
            text, pictures = total(count).tolist()
            width = layer.get_parameter(f"{path}.0.gate_proj.weight").shape[1]
            found.append(Routed(path, tuple(text), tuple(pictures), floor_of(width)))
        counts.clear()
        return tuple(found)

    try:
        yield before, seen
    finally:
        for handle in handles:
            handle.remove()


def floor_of(width: int) -> int:
    """The fewest tokens that an expert with inputs of this width is calibrated on alone."""
    return int(FLOOR * width)


def blended(own: Tensor | None, every: Tensor, tokens: int, floor: int) -> Tensor:
    """H of an expert that got so few `tokens`: of its `own` H and that of `every` token of the layer, float32 [in, in],
    as if these were some tokens more (BESIDE of `floor`). `own` is spent."""
    if own is None:
        return every
    weight = BESIDE * floor
    return own.mul_(tokens).add_(every, alpha=weight).div_(tokens + weight)


def apart(layer: nn.Module, groups: Sequence[Group]) -> tuple[tuple[Group, ...], tuple[Group, ...]]:
    """The groups outside the layer's mixtures, and those inside."""
    paths = [f"{path}." for path, _ in experts_of(layer)]
    inside = tuple(g for g in groups if any(g.linears[0].startswith(p) for p in paths))
    return tuple(g for g in groups if g not in set(inside)), inside


def owner(group: Group) -> tuple[str, int]:
    """The mixture and the number of the expert that a group inside one belongs to."""
    path, number, _ = group.linears[0].rsplit(".", 2)
    return path, int(number)


def of_experts(groups: Sequence[Group], mixtures: Sequence[Routed], which: str) -> tuple[Group, ...]:
    """Those groups whose experts are among `few` or `unseen` of their mixture."""
    chosen = {(seen.path, number) for seen in mixtures for number in getattr(seen, which)}
    return tuple(g for g in groups if owner(g) in chosen)


def portions(layer: nn.Module, groups: Sequence[Group], limit: int) -> list[tuple[Group, ...]]:
    """The experts' groups in portions whose Gram matrices, with the inputs that wait for them, take at most `limit`
    bytes; the groups of one expert stay together, and one expert at least is in each."""
    sizes: dict[tuple[str, int], int] = {}
    members: dict[tuple[str, int], list[Group]] = {}
    for group in groups:
        weight = layer.get_parameter(f"{group.linears[0]}.weight")
        size = gram_bytes(weight.shape[1], weight.dtype.itemsize, shared=len(group.linears) > 1)
        sizes[owner(group)] = sizes.get(owner(group), 0) + size
        members.setdefault(owner(group), []).append(group)
    found: list[list[Group]] = []
    left = 0
    for one, mine in members.items():
        if not found or sizes[one] > left:
            found.append([])
            left = limit
        found[-1] += mine
        left -= sizes[one]
    return [tuple(portion) for portion in found]


def gram_bytes(width: int, item: int, *, shared: bool = False) -> int:
    """What an expert's Gram matrix [width, width] takes with the inputs that wait for it; and, where it is not `shared`
    by all experts, that of every token of the layer."""
    return 4 * width**2 * (1 if shared else 2) + HOLD * width * item
