"""One decoder layer quantized where it stands: Gram matrices gathered, weights solved for, the result put in its place.

Knows nothing of the layers before and after it, and no file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from .awq import Scaled
from .detect import heads_of
from .family import Group
from .gather import collect_grams
from .grid import Grid, Quantized
from .lockstep import Stop
from .method import Problem, Solution, restored
from .mixture import share_scale
from .pull import drift_of
from .routing import HELD, HOLD, Routed, apart, blended, counting, of_experts, owner, portions
from .skeleton import Skeleton, set_parameter
from .steps import Steps, solve


@dataclass(frozen=True)
class Tokens:
    """How much the calibration holds."""

    samples: int
    text: int
    media: int


@dataclass(frozen=True)
class Layer:
    """One finished decoder layer. `solution` is None for one that was already on disk, `tokens` when no inputs were
    needed. `left_out` counts the tokens whose activations were not finite, so that they were not calibrated on;
    `mixtures` say what the experts saw."""

    index: int
    solution: Solution | None
    tokens: Tokens | None
    left_out: int = 0
    mixtures: tuple[Routed, ...] = ()


@dataclass(frozen=True)
class How:
    """What every layer is quantized by. `tokens` are all ranks'; `media[call.number]`, bool [tokens], says which of a
    call's tokens stand for pictures; experts' Gram matrices take at most `held` bytes at a time."""

    grid: Grid
    steps: Steps
    tokens: int
    lap: Callable[[str], None]
    media: Sequence[Tensor] = ()
    held: int = HELD


def quantize_layer(
    skeleton: Skeleton, stop: Stop, groups: tuple[Group, ...], how: How
) -> tuple[Solution, int, tuple[Routed, ...]]:
    """Quantize `groups` of the layer at `stop`, and leave the result in the layer as an engine will hold it. Also
    returned: how many tokens were left out, their activations not finite, and what the experts saw. ValueError for a
    checkpoint whose weights or activations say nothing."""
    common, inside = apart(stop.layer, groups)
    solution, left_out, shared = Solution({}), 0, {}
    if inside and how.steps.scale:
        shared = _scale_mixture(skeleton, stop, groups, inside, how)
        how.lap("scale search")
    if common:
        solution, left_out = _quantize_common(skeleton, stop, common, how)
    if not inside:
        return solution, left_out, ()
    more, lost, mixtures = _quantize_experts(skeleton, stop, inside, how)
    return joined(Solution({}, shared), joined(solution, more)), max(left_out, lost), mixtures


def _scale_mixture(
    skeleton: Skeleton, stop: Stop, groups: tuple[Group, ...], inside: tuple[Group, ...], how: How
) -> dict[str, Tensor]:
    """Put a scale of the experts' input into the layer, which computes what it did; gives the 16-bit parameters that
    are others now. What is to be quantized keeps the compute dtype's precision."""
    quantized = {n for g in groups for n in g.linears}
    mine = replace(stop, calls=stop.calls[::2]) if how.steps.pull else stop
    kept, columns = share_scale(mine, inside, quantized, how.grid, how.steps, stored=skeleton.stored, tokens=how.tokens)
    for name, scale in columns.items():
        value = stop.layer.get_parameter(name).float() * scale
        if name.removesuffix(".weight") in quantized:
            set_parameter(stop.layer, name, value.to(skeleton.dtype))
        else:
            kept[name] = value.to(skeleton.stored).float()
    for name, value in kept.items():
        set_parameter(stop.layer, name, ready(skeleton, value))
    return kept


def _quantize_common(skeleton: Skeleton, stop: Stop, groups: tuple[Group, ...], how: How) -> tuple[Solution, int]:
    original = dict(stop.layer.named_parameters())
    pairs = list(zip(stop.calls[::2], stop.calls[1::2], strict=True)) if how.steps.pull else []
    grams, left_out = collect_grams(replace(stop, calls=[a for a, _ in pairs]) if pairs else stop, groups)
    how.lap("forward and Gram matrices")
    weights = {n: p.detach() for n, p in original.items()}
    _, head_dim = heads_of(skeleton.module.config, stop.index)
    problem = Problem(weights, groups, grams, skeleton.stored, head_dim, how.tokens)

    def fresh(group: Group, moved: Scaled, quantized: Mapping[str, Quantized]) -> tuple[Tensor, Tensor] | None:
        for name, value in moved.changed.items():
            set_parameter(stop.layer, name, ready(skeleton, value))
        for name in (n for g in groups for n in g.linears):
            weight = restored(quantized[name]) if name in quantized else moved.weight(name, slice(None))
            set_parameter(stop.layer, f"{name}.weight", ready(skeleton, weight))
        now = dict(stop.layer.named_parameters())
        columns = moved.columns.get(group.linears[0])
        return drift_of(stop, pairs, group, now=now, original=original, columns=columns)

    solution = sound(solve(problem, how.grid, how.steps, how.lap, fresh=fresh if pairs else None), stop.index)
    del grams, problem, weights
    put(skeleton, stop, solution)
    return solution, left_out


def _quantize_experts(
    skeleton: Skeleton, stop: Stop, groups: tuple[Group, ...], how: How
) -> tuple[Solution, int, tuple[Routed, ...]]:
    """The experts, after the rest of the layer is quantized, so many at a time as their Gram matrices leave room for.
    Which experts a token goes to differs between the quantized and the 16-bit model, so there is nothing to pull to."""
    plain = replace(how.steps, pull=False, even=False)  # for what few tokens of an expert's own say, damped too little
    mine = replace(stop, calls=stop.calls[::2]) if how.steps.pull else stop
    solution, left_out, mixtures = Solution({}), 0, ()
    for portion in portions(stop.layer, groups, how.held):
        with counting(stop.layer, how.media) as (before, seen):
            grams, lost = collect_grams(mine, portion, hold=HOLD, before=before)
            mixtures = seen()  # the same each time
        few = of_experts(portion, mixtures, "few")
        if few:
            every, also = collect_grams(mine, few, everything=few, hold=HOLD)
            lost = max(lost, also)
            told = {seen.path: seen for seen in mixtures}
            for group in [g for g in few if g in every]:
                path, number = owner(group)
                tokens_here = told[path].tokens[number]
                grams[group] = blended(grams.get(group), every.pop(group), tokens_here, told[path].floor)
        how.lap("forward and Gram matrices")
        names = [f"{n}.weight" for g in portion for n in g.linears]
        weights = {n: stop.layer.get_parameter(n).detach() for n in names}
        # by the tokens of the layer: an expert's own serve it better only where gate and up are scaled, and not always
        problem = Problem(weights, portion, grams, skeleton.stored, tokens=how.tokens)
        solved = sound(solve(problem, how.grid, plain, how.lap), stop.index)
        del grams, problem, weights
        put(skeleton, stop, solved)
        solution, left_out = joined(solution, solved), max(left_out, lost)
    return solution, left_out, mixtures


def put(skeleton: Skeleton, stop: Stop, solution: Solution) -> None:
    """Leave a solution in the layer, as an engine will hold it."""
    for name, value in solution.changed.items():
        set_parameter(stop.layer, name, ready(skeleton, value))
    for name, value in solution.quantized.items():
        set_parameter(stop.layer, f"{name}.weight", ready(skeleton, restored(value)))


def joined(one: Solution, other: Solution) -> Solution:
    """Two solutions of different linears as one."""
    return Solution(
        {**one.quantized, **other.quantized},
        {**one.changed, **other.changed},
        {**one.errors, **other.errors},
        {**one.fallbacks, **other.fallbacks},
    )


def sound(solution: Solution, index: int) -> Solution:
    """The same. ValueError where a linear's weights were not finite, so that nothing can be said of its error."""
    for name, error in solution.errors.items():
        if not math.isfinite(error):
            raise ValueError(
                f"the weights of {name} in decoder layer {index} are not finite: the checkpoint is damaged"
            )
    return solution


def ready(skeleton: Skeleton, value: Tensor) -> Tensor:
    """A tensor as an engine would hold it: rounded to the stored dtype, then in the compute dtype."""
    return value.to(skeleton.device).to(skeleton.stored).to(skeleton.dtype)
