"""One decoder layer quantized where it stands: Gram matrices gathered, weights solved for, the result put in its place.

Knows nothing of the layers before and after it, and no file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from .awq import Scaled
from .family import Group
from .gather import collect_grams
from .grid import Grid, Quantized
from .lockstep import Stop
from .method import Problem, Solution, restored
from .pull import drift_of
from .skeleton import Skeleton, set_parameter
from .steps import STEPS, solve


@dataclass(frozen=True)
class Tokens:
    """How much the calibration holds."""

    samples: int
    text: int
    media: int


@dataclass(frozen=True)
class Layer:
    """One finished decoder layer. `solution` is None for one that was already on disk, `tokens` when no inputs were
    needed. `left_out` counts the tokens whose activations were not finite, so that they were not calibrated on."""

    index: int
    solution: Solution | None
    tokens: Tokens | None
    left_out: int = 0


def quantize_layer(
    skeleton: Skeleton,
    stop: Stop,
    groups: tuple[Group, ...],
    grid: Grid,
    steps: tuple[str, str],
    tokens: int,
    lap: Callable[[str], None],
) -> tuple[Solution, int]:
    """Quantize `groups` of the layer at `stop` by (method, quality) `steps`, and leave the result in the layer as an
    engine will hold it. `tokens` are all ranks'. Also returned: how many tokens were left out, their activations not
    finite. ValueError for a checkpoint whose weights or activations say nothing."""
    original = dict(stop.layer.named_parameters())
    pairs = list(zip(stop.calls[::2], stop.calls[1::2], strict=True)) if STEPS[steps].pull else []
    grams, left_out = collect_grams(replace(stop, calls=[a for a, _ in pairs]) if pairs else stop, groups)
    lap("forward and Gram matrices")
    weights = {n: p.detach() for n, p in original.items()}
    problem = Problem(weights, groups, grams, skeleton.stored, head_dim(skeleton.module.config), tokens)

    def fresh(group: Group, moved: Scaled, quantized: Mapping[str, Quantized]) -> tuple[Tensor, Tensor] | None:
        for name, value in moved.changed.items():
            set_parameter(stop.layer, name, ready(skeleton, value))
        for name in (n for g in groups for n in g.linears):
            weight = restored(quantized[name]) if name in quantized else moved.weight(name, slice(None))
            set_parameter(stop.layer, f"{name}.weight", ready(skeleton, weight))
        now = dict(stop.layer.named_parameters())
        columns = moved.columns.get(group.linears[0])
        return drift_of(stop, pairs, group, now=now, original=original, columns=columns)

    solution = sound(solve(problem, grid, STEPS[steps], lap, fresh=fresh if pairs else None), stop.index)
    del grams, problem, weights
    for name, value in solution.changed.items():
        set_parameter(stop.layer, name, ready(skeleton, value))
    for name, value in solution.quantized.items():
        set_parameter(stop.layer, f"{name}.weight", ready(skeleton, restored(value)))
    return solution, left_out


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


def head_dim(config: Any) -> int:
    """Width of one attention head of the text model."""
    text = config.get_text_config()
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
