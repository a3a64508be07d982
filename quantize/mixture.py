"""The norm before a mixture, and the scale it absorbs for all experts at once.

The norm's output is read by every expert, by the router and, where there are any, by the shared experts and their gate.
A scale that the norm absorbs goes into the columns of all of them: quantized ones carry it into their rounding, those
in 16 bit are multiplied and rounded again. So there is one scale for all, judged on the rows of all experts that
rounding costs most, and on every token of the layer. Knows no file and no engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .awq import telling_rows
from .experts import Experts, expert_groups, experts_of
from .family import Group
from .gather import collect_grams
from .grid import Grid
from .lockstep import Stop
from .method import Problem
from .steps import Steps, solve

ROWS = "rows"  # the name under which rows of many linears are judged as one


def mixture_groups(
    layer: nn.Module, run: Callable[[], Tensor], absorbs: Callable[[str, list[nn.Module]], float | None]
) -> tuple[Group, ...]:
    """The groups of a layer's experts (`expert_groups`), gate and up with the norm that can absorb a scale of all of
    them together, and with whatever else reads it in `beside`. `run` runs the layer; `absorbs(norm, readers)` tries the
    fold and gives the norm's offset, None where it is none."""
    found = {group.linears: group for group in expert_groups(layer)}
    for path, mixture in experts_of(layer):
        norm, readers = _around(layer, path, mixture, run)
        offset = None
        if norm is not None:
            offset = absorbs(norm, [mixture, *(layer.get_submodule(name) for name in readers)])
        if offset is not None:
            for number in range(len(mixture)):
                linears = (f"{path}.{number}.gate_proj", f"{path}.{number}.up_proj")
                found[linears] = Group(linears, norm, offset, beside=readers)
    return tuple(found.values())


def _around(
    layer: nn.Module, path: str, mixture: Experts, run: Callable[[], Tensor]
) -> tuple[str | None, tuple[str, ...]]:
    """The norm whose output a mixture is given, and the other modules with a matrix that are given the same memory."""
    inside = set(mixture.modules())
    given: dict[str, Tensor] = {}
    made: dict[str, Tensor] = {}
    handles = []

    def before(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given[name] = next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))

        return record

    def after(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            if isinstance(out, Tensor):
                made[name] = out

        return record

    for name, module in layer.named_modules():
        weight = module._parameters.get("weight")
        if module is mixture or (weight is not None and weight.ndim == 2 and module not in inside):
            handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
        elif weight is not None and weight.ndim == 1:
            handles.append(module.register_forward_hook(after(name)))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    if path not in given:
        return None, ()
    norm = next((name for name, out in made.items() if _same(out, given[path])), None)
    return norm, tuple(name for name, x in given.items() if name != path and _same(x, given[path]))


def _same(x: Tensor, y: Tensor) -> bool:
    return x.data_ptr() == y.data_ptr() and x.numel() == y.numel()


def share_scale(
    stop: Stop,
    groups: Sequence[Group],
    quantized: Iterable[str],
    grid: Grid,
    steps: Steps,
    *,
    stored: torch.dtype,
    tokens: int,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A scale of the input of the experts of `groups` in the layer at `stop`, where their norm can absorb it.

    `quantized` are all linears of the layer that are to be quantized, `stored` the norm's dtype on disk. Returned, by
    name: the norm's parameters as they are to be, float32; and what the columns of each matrix that reads the norm are
    to be multiplied by, [in]. The layer itself is left as it was.
    """
    norms_now: dict[str, Tensor] = {}
    columns: dict[str, Tensor] = {}
    packed = set(quantized)
    first = {g.absorber: g for g in reversed(groups) if g.absorber and len(g.linears) > 1}
    for norm, group in first.items():
        mine = [n for g in groups if g.absorber == norm for n in g.linears]
        mine += [n for n in group.beside if n in packed]
        grams, _ = collect_grams(stop, (group,), everything=(group,))
        if group not in grams:
            continue
        layer = stop.layer
        rows = telling_rows([layer.get_parameter(f"{n}.weight").detach() for n in mine], grams[group], grid.group_size)
        one = Group((ROWS,), norm, group.offset)
        norms = {n: p.detach() for n, p in layer.get_submodule(str(norm)).named_parameters()}
        weights = {f"{ROWS}.weight": rows, **{f"{norm}.{n}": p for n, p in norms.items()}}
        problem = Problem(weights, (one,), {one: grams.pop(group)}, stored, tokens=tokens)
        folded = solve(problem, grid, replace(steps, pull=False)).changed
        key = f"{norm}.weight"
        if key not in folded:
            continue
        before, now = norms["weight"].float() + group.offset, folded[key] + group.offset
        scale = torch.where(now != 0, before / now, torch.ones_like(now))
        norms_now |= folded
        columns |= dict.fromkeys((f"{n}.weight" for n in (*mine, *group.beside)), scale)
    return norms_now, columns
