"""A decoder made able to run without its weights, at its real widths: what detect.py looks at.

Linears become random matrices of rank two, so that a layer of any size costs next to nothing. Knows no model class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .experts import experts_of

RANDOM = 2**22  # numbers in a parameter that get random values; a larger one is a constant that takes no memory


def is_linear(module: Any) -> bool:
    """Whether a module is a linear and nothing more: a router may be one by class and put out two things."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


@contextmanager
def filled(module: Any, text: nn.Module, layers: nn.ModuleList) -> Iterator[None]:
    """The `text` model, which has the `layers`, able to run: linears of rank two, random embeddings, random values in
    the small parameters, learned positions and the like beside the layers too."""
    words = module.get_input_embeddings()
    hidden = module.config.get_text_config(decoder=True).hidden_size
    borrowed: list[tuple[nn.Module, str, nn.Parameter]] = []
    random = torch.Generator().manual_seed(0)
    replaced: list[nn.Module] = [words]
    words.forward = lambda ids, *a, **k: torch.randn(*ids.shape, hidden, generator=random)
    mixtures = dict(experts_of(layers)).values()
    for mixture in mixtures:
        mixture.forward = thin_experts(mixture, random)
        replaced.append(mixture)
    inside = {words, *(m for mixture in mixtures for m in mixture.modules())}
    for owner in dict.fromkeys((*layers.modules(), *text.modules())):
        if owner in inside:
            continue
        if is_linear(owner):
            owner.forward = thin(owner, random)
            replaced.append(owner)
        for name, old in owner._parameters.items():
            if old is not None and not is_linear(owner):
                borrowed.append((owner, name, old))
                value = torch.rand(old.shape, generator=random) + 0.5 if old.numel() <= RANDOM else None
                value = torch.full((), 0.01).expand(old.shape) if value is None else value
                owner._parameters[name] = nn.Parameter(value, requires_grad=False)
    try:
        yield
    finally:
        for owner in replaced:
            del owner.forward  # the instance attribute; the class's method shows again
        for owner, name, old in borrowed:
            owner._parameters[name] = old


def thin(linear: Any, random: torch.Generator) -> Callable[..., Tensor]:
    """The forward of a random matrix [out, in] of rank two, and of a random bias where there is one."""
    down = torch.randn(2, linear.in_features, generator=random) / linear.in_features**0.5
    up = torch.randn(linear.out_features, 2, generator=random)
    bias = None if linear.bias is None else torch.randn(linear.out_features, generator=random)

    def forward(input: Tensor) -> Tensor:
        out = (input.float() @ down.T) @ up.T
        return out if bias is None else out + bias

    return forward


def thin_experts(mixture: Any, random: torch.Generator) -> Callable[..., Tensor]:
    """The forward of one such matrix in the place of all experts: what they have to say is told by their names. What
    the router says shows all the same, weights that add up to one too: no two experts count alike."""
    wide = thin(nn.Linear(*[mixture[0].gate_proj.in_features] * 2, bias=False, device="meta"), random)

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return wide(hidden_states).relu() * (top_k_weights * (top_k_index + 1)).sum(-1, True)

    return forward
