"""The steps from a decoder layer's weights to integers, and which of them each method takes at each quality.

Every method is a row of the same four steps: move scales between layers (awq.py, descent.py), clip each group's range
(clip.py), then round, to nearest (grid.py) or with error feedback (gptq.py). So all of them end in the same grids, and
a format is free to hold any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .awq import Scaled, fold, scalable, scale
from .clip import best_shrink
from .descent import descended, first_scale
from .family import Group
from .gptq import DAMP, Factor, damping, factored, rescaled, round_columns
from .gram import diagonal_blocks
from .grid import Grid, Quantized, fit, groups, rows_of, split_rows, stacked
from .judge import judged, nearest, weighing
from .method import Problem, Solution
from .pull import pulled, push
from .ranks import everyones, rank, sent, share, spread, total, world

PULL = 0.5  # how far; 0.25 to 1 measured alike, 0.5 best (docs/quality.md)
UNREACHED = "the calibration fed it nothing, or nothing but zeros"


@dataclass(frozen=True)
class Steps:
    """What is done to a layer before and while it is rounded."""

    scale: bool = False  # from the published candidates; where errors are fed back, by descent (descent.py)
    clip: bool = False
    feedback: bool = False
    pull: bool = False  # towards what the group puts out in the 16-bit model, on the inputs it really gets
    even: bool = True  # where `scale` finds nothing to take one, H is damped as if something had


STEPS: dict[tuple[str, str], Steps] = {
    ("rtn", "default"): Steps(),
    ("awq", "fast"): Steps(scale=True, clip=True),  # AWQ as published
    ("gptq", "fast"): Steps(feedback=True),  # GPTQ as published, groups static
    ("awq", "default"): Steps(scale=True, clip=True, feedback=True),
    ("gptq", "default"): Steps(scale=True, clip=True, feedback=True),
    ("awq", "best"): Steps(scale=True, clip=True, feedback=True, pull=True),
    ("gptq", "best"): Steps(scale=True, clip=True, feedback=True, pull=True),
}


Fresh = Callable[[Group, Scaled, Mapping[str, Quantized]], tuple[Tensor, Tensor] | None]


def solve(
    problem: Problem,
    grid: Grid,
    steps: Steps,
    lap: Callable[[str], None] = lambda stage: None,
    *,
    fresh: Fresh | None = None,
) -> Solution:
    """Quantize one decoder layer by `steps`; the Gram matrices are taken out of `problem` on the way.

    What was searched is held against plain rounding row by row, and the better of the two is kept. A linear on which
    the search lost more as a whole is among the solution's `fallbacks`, as is one that no token reached. ValueError
    when widths do not fit. `lap(stage)` is called at the end of each stage, for whoever measures. With `pull`,
    `fresh(group, moved, quantized)` gives H and the drift (pull.py) of a group's inputs now that the groups before it
    are quantized.
    """
    owners = _owners(problem)
    moved = scale(problem, grid) if steps.scale and not steps.feedback else Scaled(dict(problem.weights))
    factors = _factors(moved, problem, owners, grid, steps) if steps.feedback else {}
    lap("scales")
    quantized: dict[str, Quantized] = {}
    lost: dict[str, Tensor] = {}
    fallbacks: dict[str, str] = {}
    reached = set(problem.grams)
    pull = fresh if steps.pull else None
    if pull:
        problem.grams.clear()  # each group's is taken anew when its turn comes
    ready = _by_owner(moved, problem, owners, factors, grid, steps) if world() > 1 and not pull else {}
    # the largest H first, where no group waits for another: what it takes is gone when the others are rounded
    for group in problem.groups if pull else sorted(problem.groups, key=lambda g: -_width(problem, g)):
        gram = problem.grams.pop(group, None)  # the last to need it: it is the largest thing there is
        shares = [share(len(problem.weights[f"{n}.weight"])) for n in group.linears]
        pushed = None
        if pull and group in reached:
            gram, drift = pull(group, moved, quantized) or (None, None)
            if drift is not None:
                pushed = push(_weight(moved, group, shares), drift, moved.columns.get(group.linears[0]))
            del drift
            lap("forward, both streams")
        if group in ready:
            rounded, aim, why = ready.pop(group)
        else:
            damp = _damp(problem, group, steps)
            factor = factors.pop(group, None)
            rounded, aim, why = _round(moved, group, shares, gram, factor, pushed, damp, grid, steps)
            del factor
        del pushed
        fallbacks |= dict.fromkeys(group.linears, why) if why else {}
        lap("clip and rounding")
        searched = gram is not None and (steps.clip or steps.feedback)
        weigh = weighing(gram)
        del gram
        now, costs = judged(problem, moved, group, shares, rounded, aim, weigh, grid, tried=searched)
        quantized |= now
        lost |= costs
        del weigh, rounded, aim  # the next group may be about to need the room
        lap("errors")
    names = [name for group in problem.groups for name in group.linears]
    errors: dict[str, float] = {}
    sums = total(torch.stack([lost[name] for name in names])).tolist()  # the device is waited for once
    for name, (energy, kept, found, plain) in zip(names, sums, strict=True):
        errors[name], searched, by_rounding = (loss / max(energy, 1e-30) for loss in (kept, found, plain))
        if not found <= plain:
            fallbacks[name] = f"the search lost {searched:.2e} of its output, rounding {by_rounding:.2e}"
    return Solution({name: quantized[name] for name in names}, moved.changed, errors, fallbacks)


def _owners(problem: Problem) -> dict[Group, int]:
    """The rank that factors each group's H and, where no group waits for another, rounds the group."""
    shapes = {g: [problem.weights[f"{n}.weight"].shape for n in g.linears] for g in problem.groups}
    # what the products cost: H's factor in^3 / 3, handing the errors on out in^2
    costs = [each[0][1] ** 2 * (each[0][1] / 3 + sum(out for out, _ in each)) for each in shapes.values()]
    return dict(zip(shapes, spread(costs), strict=True))


def _width(problem: Problem, group: Group) -> int:
    return problem.weights[f"{group.linears[0]}.weight"].shape[1]


def _damp(problem: Problem, group: Group, steps: Steps) -> float:
    return damping(_width(problem, group), problem.tokens) if steps.scale else DAMP


def _factors(
    moved: Scaled, problem: Problem, owners: Mapping[Group, int], grid: Grid, steps: Steps
) -> dict[Group, Factor]:
    """The factor of H for each group that is this rank's, and with `scale` every group's scale, found by its owner and
    moved by all: what the descent goes by is what rounding needs, so H is factored once."""
    ties = scalable(problem) if steps.scale else {}
    found: dict[Group, Factor] = {}
    scales: dict[Group, Tensor] = {}
    for group, gram in problem.grams.items():
        if owners[group] != rank() or not bool(gram.diagonal().any()):
            continue
        tied = {"tie": ties[group], "tie_block": problem.head_dim} if group in ties else {}
        weights = [problem.weights[f"{n}.weight"] for n in group.linears]
        damp = _damp(problem, group, steps)
        try:
            if tied:
                factor = factored(gram, first_scale(weights, gram, **tied), damp=damp)
                scales[group] = descended(weights, factor, grid, **tied)
            elif steps.pull:
                continue
            else:
                factor = _unscaled(weights, gram, damp, steps)
        except ValueError:  # rounding meets it again, and says so
            continue
        if not steps.pull:  # else H is taken anew when the group's turn comes
            found[group] = factor
        del factor
    for group, tie in ties.items():
        none = torch.ones(len(problem.grams[group]), device=problem.grams[group].device)
        fold(moved, group, sent(scales.get(group, none), owners[group]), tie, problem)
        if group in found:
            found[group] = rescaled(found[group], moved.columns.get(group.linears[0], none))
    return found


def _unscaled(weights: Sequence[Tensor], gram: Tensor, damp: float, steps: Steps) -> Factor:
    """The factor of H where nothing takes a scale. Damped as it would be had something taken one: the mean of a
    diagonal with outliers in it is theirs, and a share of it drowns all other channels (docs/quality.md)."""
    if not (steps.scale and steps.even):
        return factored(gram, damp=damp)
    factor = factored(gram, first_scale(weights, gram), damp=damp)
    return rescaled(factor, torch.ones_like(gram.diagonal()))


def _round(
    moved: Scaled, group: Group, shares: list[slice], gram: Tensor | None, factor: Factor | None, pushed: Tensor | None,
    damp: float, grid: Grid, steps: Steps,
) -> tuple[Quantized, Tensor | None, str]:  # fmt: skip
    """This rank's rows of all the group's linears, one below the other: rows are independent, so one piece of work.
    With it, the weights that it was to come near where these are others, and why not all of `steps` were taken."""
    weight = _weight(moved, group, shares)
    columns = moved.columns.get(group.linears[0])
    size = grid.group_size
    if gram is None:
        return nearest(weight, grid), None, UNREACHED
    shrink = None
    if not steps.feedback:
        if steps.clip:
            blocks = diagonal_blocks(gram, size)
            if columns is not None:
                s = columns.view(-1, size)
                blocks /= s[:, :, None] * s[:, None, :]
            shrink = best_shrink(weight, blocks, grid)
        return nearest(weight, grid, shrink), None, ""
    try:
        if factor is None and columns is None:
            whole = [moved.weights[f"{n}.weight"] for n in group.linears]  # of all ranks' rows, so that all damp alike
            factor = _unscaled(whole, gram, damp, steps)
        factor = factor or factored(gram, columns, damp=damp)
    except ValueError as e:
        return nearest(weight, grid), None, f"no error feedback: {e}"
    g = groups(weight, size)
    low, high = g.amin(-1), g.amax(-1)
    if steps.clip:
        shrink = best_shrink(weight, factor.costs(), grid)
        low, high = low * shrink, high * shrink
    scale, zero = fit(low, high, grid)
    aim = None
    if pushed is not None:
        weight = aim = pulled(pushed, factor.follow, factor.pivots, factor.order).mul_(PULL).add_(weight)
    weight = weight[:, factor.order]
    weight = weight.T.contiguous()  # one copy less at a time than in one line
    return round_columns(weight, factor.follow, factor.order, scale, zero, symmetric=grid.symmetric), aim, ""


def _by_owner(
    moved: Scaled, problem: Problem, owners: Mapping[Group, int], factors: dict[Group, Factor], grid: Grid, steps: Steps
) -> dict[Group, tuple[Quantized, None, str]]:
    """What `_round` gives for this rank's rows of every group, each group rounded whole by one rank: its H is factored
    and its columns are gone through one by one, and neither takes less time for fewer rows."""
    shapes = {g: [problem.weights[f"{n}.weight"].shape for n in g.linears] for g in problem.groups}
    mine: dict[Group, Quantized] = {}
    why: dict[Group, str] = {}
    for group, each in shapes.items():
        if owners[group] == rank():
            all_rows = [slice(0, out) for out, _ in each]
            gram, damp = problem.grams.get(group), _damp(problem, group, steps)
            factor = factors.pop(group, None)
            mine[group], _, why[group] = _round(moved, group, all_rows, gram, factor, None, damp, grid, steps)
            del factor
    why = {group: said for told in everyones(why) for group, said in told.items()}
    ready = {}
    for group, each in shapes.items():
        device = problem.weights[f"{group.linears[0]}.weight"].device
        found = mine.pop(group, None) or _unwritten(sum(out for out, _ in each), each[0][1], grid, device)
        q, scale, zero = (sent(t, owners[group]) for t in (found.q, found.scale, found.zero))
        found = replace(found, q=q, scale=scale, zero=zero)
        linears = split_rows(found, [out for out, _ in each])
        ready[group] = stacked([rows_of(x, share(len(x.q))) for x in linears]), None, why[group]
    return ready


def _unwritten(rows: int, width: int, grid: Grid, device: torch.device) -> Quantized:
    count = width // grid.group_size
    q, zero = (torch.empty(rows, n, dtype=torch.uint8, device=device) for n in (width, count))
    return Quantized(q, torch.empty(rows, count, device=device), zero, grid.group_size, grid.symmetric)


def _weight(moved: Scaled, group: Group, shares: list[slice]) -> Tensor:
    return torch.cat([moved.weight(n, rows) for n, rows in zip(group.linears, shares, strict=True)])
