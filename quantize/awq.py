"""AWQ: activation-aware weight quantization (Lin et al., 2023), solved from Gram matrices.

For each group of linears that share an input, search a per-channel scale s so that round(W s) / s loses least on the
calibrated inputs, fold 1/s into whatever feeds the group, then search each group's clip. The loss of a candidate is
tr(dW H dW^T) with H the input's Gram matrix, so no candidate runs the model again.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from .clip import best_shrink
from .family import Group
from .grid import Grid, fake, groups, quantize
from .method import Problem, Solution, output_error

STEPS = 20  # grid points of the exponent, as in the paper


def candidates(rms: Tensor, weights: list[Tensor], group_size: int) -> list[Tensor]:
    """Scales to try, each float32 [in]: rms^a, and rms^a / magnitude^(1-a), for a in 0, 1/20, ..., 19/20.

    rms [in]: root mean square of the input's channels. The second kind weighs in how large each column's weights are
    relative to the largest of its group, averaged over rows. The first with a = 0 is no scaling at all.
    """
    w = torch.cat(weights).abs()
    relative = groups(w, group_size) / groups(w, group_size).amax(-1, keepdim=True).clamp_min(1e-8)
    magnitude = relative.flatten(1).mean(0).clamp_min(1e-4)
    rms = rms.clamp_min(1e-4 * rms.max().clamp_min(1e-8))
    found = []
    for step in range(STEPS):
        a = step / STEPS
        for s in (rms**a, rms**a / magnitude ** (1 - a)):
            found.append(s / (s.max() * s.min()).sqrt())
    return found


def best_scale(weights: list[Tensor], gram: Tensor, grid: Grid, *, tie: int = 1, tie_block: int = 1) -> Tensor:
    """The per-channel scale, float32 [in], that loses least over `weights`, each [out, in], given their input's
    Gram matrix [in, in].

    With `tie` > 1 channels are query heads of width `tie_block` and each `tie` neighbouring heads read one value head:
    their scales must agree, so their statistics are averaged first.
    """
    rms = gram.diagonal().clamp_min(0).sqrt()
    best, winner = float("inf"), torch.ones_like(rms)
    for s in candidates(_tied(rms, tie, tie_block), weights, grid.group_size):
        s = _tied(s, tie, tie_block)
        loss = sum(float(output_error(fake(w * s, grid) / s - w, gram)) for w in weights)
        if loss < best:
            best, winner = loss, s
    return winner


def _tied(s: Tensor, tie: int, block: int) -> Tensor:
    if tie == 1:
        return s
    heads = s.view(-1, tie, block)  # [kv heads, query heads each, head_dim]
    return heads.mean(1, keepdim=True).expand_as(heads).reshape(-1).contiguous()


def awq(problem: Problem, grid: Grid, *, stored: torch.dtype = torch.bfloat16, head_dim: int = 128) -> Solution:
    """Scales, then clip, then rounding, for one decoder layer. `stored` is the dtype norms are written in.

    A norm that absorbs 1/s is rounded to `stored` first, and the scale that remains *after* that rounding is the one
    put on the weights, so the fold loses nothing. A group whose absorber cannot take the scale is left unscaled.
    """
    weights = dict(problem.weights)
    grams = dict(problem.grams)
    changed: dict[str, Tensor] = {}
    columns: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}
    chosen = {name for group in problem.groups for name in group.linears}
    for group in problem.groups:
        ws = [weights[f"{n}.weight"] for n in group.linears]
        tie = absorbable(group, weights, chosen)
        if tie == 0:
            continue
        s = best_scale(ws, grams[group], grid, tie=tie, tie_block=head_dim)
        absorber = str(group.absorber)
        if weights[f"{absorber}.weight"].ndim == 1:
            s = _fold_into_norm(absorber, s, weights, changed, stored=stored)
        else:
            rows[absorber] = s.view(-1, tie, head_dim)[:, 0].reshape(-1) if tie > 1 else s
            _fold_into_linear(absorber, rows[absorber], weights, changed, stored=stored)
        for name in group.linears:
            weights[f"{name}.weight"] = weights[f"{name}.weight"] * s
            columns[name] = s
        grams[group] = grams[group] / (s[:, None] * s[None, :])
    quantized = {}
    for group in problem.groups:
        for name in group.linears:
            w = weights[f"{name}.weight"]
            quantized[name] = quantize(w, grid, shrink=best_shrink(w, grams[group], grid))
    return Solution(quantized, changed, columns, rows)


def absorbable(group: Group, weights: dict[str, Tensor], quantized: Collection[str]) -> int:
    """How many channels of the group's input share one channel of its absorber: 1 as a rule, the number of query
    heads per value head between v and o under grouped-query attention, 0 when the scale cannot be folded.

    A norm takes a scale at any time, a linear only when it is `quantized` itself: one kept in 16 bit stays as it is.
    """
    if group.absorber is None or f"{group.absorber}.weight" not in weights:
        return 0
    if weights[f"{group.absorber}.weight"].ndim > 1 and group.absorber not in quantized:
        return 0
    width = weights[f"{group.linears[0]}.weight"].shape[1]
    rows = weights[f"{group.absorber}.weight"].shape[0]
    return width // rows if width % rows == 0 else 0


def _fold_into_norm(
    name: str, s: Tensor, weights: dict[str, Tensor], changed: dict[str, Tensor], *, stored: torch.dtype
) -> Tensor:
    """Divide a norm's weight [in] by `s`; returns the scale [in] that the group's weights must now carry, exactly."""
    key = f"{name}.weight"
    folded = (weights[key] / s).to(stored).float()
    exact = torch.where(folded != 0, weights[key] / folded, torch.ones_like(s))
    weights[key] = changed[key] = folded
    return exact


def _fold_into_linear(
    name: str, rows: Tensor, weights: dict[str, Tensor], changed: dict[str, Tensor], *, stored: torch.dtype
) -> None:
    """Divide the rows (and bias) of a linear by `rows` [out]. Its weight is quantized itself, so not rounded yet."""
    weights[f"{name}.weight"] = weights[f"{name}.weight"] / rows[:, None]
    bias = f"{name}.bias"
    if bias in weights:
        weights[bias] = changed[bias] = (weights[bias] / rows).to(stored).float()
