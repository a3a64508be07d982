"""AWQ's scales (Lin et al., 2023), searched through Gram matrices.

For each group of linears that share an input, a per-channel scale s so that round(W s) / s loses least on the
calibrated inputs; 1/s is folded into whatever feeds the group. The loss of a candidate is tr(dW H dW^T) with H the
input's Gram matrix, so no candidate runs the model again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .descent import shared
from .family import Group
from .fused import fused
from .grid import Grid, fake, groups
from .method import Problem
from .ranks import share, total

STEPS = 20  # grid points of the exponent, as in the paper
FIRST_ROWS = 512  # output channels, about, on which every candidate is tried
FINALISTS = 3  # candidates that are then tried on all of them
TOGETHER = 2**26  # errors held at a time, float32: what fills a GPU, and little beside H


@dataclass
class Scaled:
    """A decoder layer whose scales have been moved. `weights` are as in Problem, still the original ones; `columns`
    [in] and `rows` [out] say by linear what its columns are to be multiplied and its rows divided by; `changed` are
    the 16-bit parameters that absorbed a scale."""

    weights: dict[str, Tensor]
    changed: dict[str, Tensor] = field(default_factory=dict)
    columns: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)

    def weight(self, name: str, rows: slice) -> Tensor:
        """These rows of linear `name` as they are to be rounded, float32 [rows, in]."""
        w = self.weights[f"{name}.weight"][rows].float()
        if name in self.columns:
            w = w * self.columns[name]
        if name in self.rows:
            w = w / self.rows[name][rows, None]
        return w


def candidates(rms: Tensor, weights: Sequence[Tensor], group_size: int) -> list[Tensor]:
    """Scales to try, each float32 [in]: rms^a, and rms^a / magnitude^(1-a), for a in 0, 1/20, ..., 19/20.

    rms [in]: root mean square of the input's channels. The second kind weighs in how large each column's weights are
    relative to the largest of its group, averaged over rows. The first with a = 0 is no scaling at all.
    """
    magnitude = torch.zeros_like(rms)
    for weight in weights:
        w = groups(weight.abs().float(), group_size)
        magnitude += (w / w.amax(-1, keepdim=True).clamp_min(1e-8)).flatten(1).sum(0)
    magnitude = (magnitude / sum(w.shape[0] for w in weights)).clamp_min(1e-4)
    rms = rms.clamp_min(1e-4 * rms.max().clamp_min(1e-8))
    found = []
    for step in range(STEPS):
        a = step / STEPS
        for s in (rms**a, rms**a / magnitude ** (1 - a)):
            found.append(s / (s.max() * s.min()).sqrt())
    return found


def best_scale(weights: Sequence[Tensor], gram: Tensor, grid: Grid, *, tie: int = 1, tie_block: int = 1) -> Tensor:
    """The per-channel scale, float32 [in], that loses least over `weights`, each [out, in], given their input's
    Gram matrix [in, in].

    All candidates are tried on some of the rows, the best few on all: the order of candidates shows on a few hundred
    rows, and the loss of a row costs in^2. With `tie` > 1 channels are query heads of width `tie_block`
    and each `tie` neighbouring heads read one value head: their scales must agree, so their statistics are averaged
    first.
    """
    rms = gram.diagonal().clamp_min(0).sqrt()
    pool = torch.stack(
        [shared(s, tie, tie_block) for s in candidates(shared(rms, tie, tie_block), weights, grid.group_size)]
    )
    if sum(w.shape[0] for w in weights) > FIRST_ROWS:
        first = scale_losses([telling_rows(weights, gram, grid.group_size)], gram, pool, grid)
        pool = pool[first.argsort(stable=True)[:FINALISTS]]
    return pool[scale_losses(weights, gram, pool, grid).argmin()]


def telling_rows(weights: Sequence[Tensor], gram: Tensor, group_size: int) -> Tensor:
    """About FIRST_ROWS rows [rows, in] of `weights`: half of them those that rounding will cost most, by the squared
    ranges of their groups and the energy of what these meet, half of them at regular distances.

    The first half because few rows can hold most of the loss (of pebble's gate and up, a twentieth holds 97%).
    """
    energy = groups(gram.diagonal()[None], group_size).mean(-1)  # [1, groups]
    costs = []
    for weight in weights:
        w = groups(weight, group_size)
        costs.append(((w.amax(-1) - w.amin(-1)).float().square() * energy).sum(1))
    cost = torch.cat(costs)
    chosen = torch.zeros_like(cost, dtype=torch.bool)
    chosen[:: max(1, len(cost) // (FIRST_ROWS // 2))] = True
    chosen[cost.argsort(stable=True)[-(FIRST_ROWS // 2) :]] = True
    return torch.cat([w[mine] for w, mine in zip(weights, chosen.split([len(w) for w in weights]), strict=True)])


def scale_losses(weights: Sequence[Tensor], gram: Tensor, pool: Tensor, grid: Grid) -> Tensor:
    """tr(dW H dW^T), summed over `weights`, of each scale in `pool` [candidates, in]: float32 [candidates]."""
    weight = torch.cat([w[share(w.shape[0])] for w in weights])
    rows, width = weight.shape
    together = max(1, TOGETHER // max(weight.numel(), 1))  # candidates whose errors go through H as one product
    delta = torch.empty(min(together, len(pool)), rows, width, device=gram.device)
    kernels = fused(gram)
    losses = []
    for scales in pool.split(together):
        d = delta[: len(scales)]
        if kernels:
            kernels.scaled_errors(weight, scales.contiguous(), grid, d)
        else:
            for s, out in zip(scales, d, strict=True):
                torch.sub(fake(weight.float() * s, grid) / s, weight.float(), out=out)
        losses.append((d.flatten(0, 1) @ gram).view_as(d).mul_(d).flatten(1).sum(1))
    return total(torch.cat(losses))


def scale(problem: Problem, grid: Grid) -> Scaled:
    """Search and move the scales of one decoder layer, as published."""
    moved = Scaled(dict(problem.weights))
    for group, tie in scalable(problem).items():
        weights = [moved.weights[f"{n}.weight"] for n in group.linears]
        found = best_scale(weights, problem.grams[group], grid, tie=tie, tie_block=problem.head_dim)
        fold(moved, group, found, tie, problem)
    return moved


def scalable(problem: Problem) -> dict[Group, int]:
    """The groups whose inputs a scale can be moved out of, each with how many channels share one (`absorbable`)."""
    chosen = {name for group in problem.groups for name in group.linears}
    ties = {group: absorbable(group, problem.weights, chosen) for group in problem.groups if group in problem.grams}
    return {group: tie for group, tie in ties.items() if tie}


def fold(moved: Scaled, group: Group, scale: Tensor, tie: int, problem: Problem) -> None:
    """Move `scale` [in] into the group's linears, and out of what feeds them.

    A norm that absorbs 1/s is rounded to the stored dtype first, and the scale that remains *after* that rounding is
    the one put on the weights, so the fold loses nothing. A group whose absorber cannot take the scale is left
    unscaled.
    """
    absorber = str(group.absorber)
    if moved.weights[f"{absorber}.weight"].ndim == 1:
        scale = _fold_into_norm(absorber, scale, moved, stored=problem.stored, offset=group.offset)
    else:
        rows = scale.view(-1, tie, problem.head_dim)[:, 0].reshape(-1) if tie > 1 else scale
        if group.last:
            rows = torch.cat([rows.new_ones(len(moved.weights[f"{absorber}.weight"]) - group.last), rows])
        if not _fold_into_linear(absorber, rows, moved, stored=problem.stored):
            return
    for name in group.linears:
        moved.columns[name] = scale
    for key in (f"{name}.weight" for name in group.beside):
        moved.weights[key] = moved.changed[key] = (moved.weights[key].float() * scale).to(problem.stored).float()


def absorbable(group: Group, weights: Mapping[str, Tensor], quantized: Collection[str]) -> int:
    """How many channels of the group's input share one channel of its absorber: 1 as a rule, the number of query
    heads per value head between v and o under grouped-query attention, 0 when the scale cannot be folded.

    A norm takes a scale at any time, a linear only when it is `quantized` itself: one kept in 16 bit stays as it is.
    """
    if group.absorber is None or f"{group.absorber}.weight" not in weights:
        return 0
    if weights[f"{group.absorber}.weight"].ndim > 1 and group.absorber not in quantized:
        return 0
    width = weights[f"{group.linears[0]}.weight"].shape[1]
    rows = group.last or weights[f"{group.absorber}.weight"].shape[0]
    return width // rows if width % rows == 0 else 0


def _fold_into_norm(name: str, s: Tensor, moved: Scaled, *, stored: torch.dtype, offset: float = 0.0) -> Tensor:
    """Divide what a norm multiplies by, its weight [in] and `offset`, by `s`, and its bias where it has one; gives the
    scale [in] that the group's weights must now carry, exactly."""
    key, bias = f"{name}.weight", f"{name}.bias"
    norm = moved.weights[key].float()
    folded = ((norm + offset) / s - offset).to(stored).float()
    kept = folded.isfinite() & (folded + offset != 0) & (norm + offset != 0)
    if bias in moved.weights:
        kept &= (moved.weights[bias].float() * (folded + offset) / (norm + offset)).to(stored).isfinite()
    folded = torch.where(kept, folded, norm)  # past float16's range: left as it was
    moved.weights[key] = moved.changed[key] = folded
    carried = torch.where(kept, (norm + offset) / (folded + offset), torch.ones_like(s))
    if bias in moved.weights:
        moved.weights[bias] = moved.changed[bias] = (moved.weights[bias].float() / carried).to(stored).float()
    return carried


def _fold_into_linear(name: str, rows: Tensor, moved: Scaled, *, stored: torch.dtype) -> bool:
    """Divide the rows (and bias) of a linear by `rows` [out]. Its weight is quantized itself, so not rounded yet.
    False, and nothing done, where the bias would leave the range of its dtype."""
    bias = f"{name}.bias"
    if bias in moved.weights:
        divided = (moved.weights[bias].float() / rows).to(stored).float()
        if not bool(divided.isfinite().all()):
            return False
        moved.weights[bias] = moved.changed[bias] = divided
    moved.rows[name] = rows
    return True
