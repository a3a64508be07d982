"""The descent on AWQ's scales: its slope is that of its objective, which falls to one valley; so does what rounding
really costs; and nothing that breaks a division breaks it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from halting import Halted, halted
from torch import Tensor

from mmq.quantize import descent
from mmq.quantize import steps as pipeline
from mmq.quantize.awq import best_scale
from mmq.quantize.descent import descended, expected_loss, first_scale, slope
from mmq.quantize.gptq import factored
from mmq.quantize.grid import Grid
from mmq.quantize.steps import STEPS, solve

GRIDS = pytest.mark.parametrize("grid", [Grid(32), Grid(32, symmetric=True)], ids=["asymmetric", "symmetric"])


def problem(rows: int = 96, width: int = 128, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and an H of uneven channels, correlated."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=random) * torch.exp(0.3 * torch.randn(width, generator=random))
    x = torch.randn(4 * width, width, generator=random) * torch.exp(0.7 * torch.randn(width, generator=random))
    return weight, (x.T @ x + 0.3 * x.T.roll(1, 0) @ x.roll(1, 1)) / len(x)


def by_hand(weight: Tensor, costs: Tensor, s: Tensor, grid: Grid) -> float:
    """F as the module's docstring has it, one number after another."""
    total = 0.0
    for start in range(0, len(s), grid.group_size):
        own = range(start, start + grid.group_size)
        squares = 0.0
        for row in (weight * s).tolist():
            low, high = min(0.0, *(row[j] for j in own)), max(0.0, *(row[j] for j in own))
            squares += max(-low, high) ** 2 if grid.symmetric else (high - low) ** 2
        total += squares * sum(float(costs[j] / s[j] ** 2) for j in own)
    return total


@GRIDS
def test_the_objective_is_the_equation(grid: Grid) -> None:
    weight, gram = problem()
    s = torch.linspace(0.5, 2, 128)
    found = expected_loss([weight[:40], weight[40:].double()], gram.diagonal(), s, grid)
    assert float(found) == pytest.approx(by_hand(weight, gram.diagonal(), s, grid), rel=1e-4)


@GRIDS
@pytest.mark.parametrize(("tie", "block"), [(1, 1), (2, 16), (2, 32), (2, 64)])
def test_the_slope_is_that_of_the_objective(grid: Grid, tie: int, block: int) -> None:
    """Against central differences, in float64; groups that do not span zero among them. Every group is alone, or with
    those that share its scales; with all of them where a group holds two heads."""
    weight, gram = (t.double() for t in problem())
    weight[:20] = weight[:20].abs()
    logs = descent.shared(torch.linspace(-1, 1, 128, dtype=torch.float64), tie, block)
    costs, step = gram.diagonal().clone(), 1e-6
    found = slope(weight, costs, logs, grid, tie=tie, tie_block=block)
    channels = torch.arange(128)
    for j in range(0, 128, 9):
        same = (channels // (tie * block) == j // (tie * block)) & (channels % block == j % block)
        alike = channels[same] if tie > 1 else channels[j : j + 1]
        own = torch.isin(channels // 32, alike // 32) if tie == 1 or block >= 32 else channels >= 0
        ends = []
        for side in (-step, step):
            moved = logs.clone()
            moved[alike] += side
            ends.append(by_hand(weight[:, own], costs[own], moved.exp()[own], grid))
        rise = (ends[1] / ends[0] - 1) / (2 * step)
        assert float(found[j]) == pytest.approx(rise, rel=1e-4, abs=1e-6)
    if tie == 1:
        assert float(found.sum()) == pytest.approx(0, abs=1e-9)  # all scales together change nothing


@GRIDS
def test_there_is_one_valley(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    """log F is convex in log s, and the descent from very different starts ends at the same height."""
    weight, gram = problem()
    random = torch.Generator().manual_seed(1)
    costs = gram.diagonal().clone()

    def height(logs: Tensor) -> float:
        return float(expected_loss([weight], costs, logs.exp(), grid).log())

    for _ in range(50):
        a, b = torch.randn(2, 128, generator=random)
        assert height((a + b) / 2) <= (height(a) + height(b)) / 2 + 1e-5
    monkeypatch.setattr(descent, "STEPS", 600)
    identity = torch.diag(costs)  # its pivots are its diagonal, whatever the order
    starts = [torch.ones(128), torch.exp(torch.randn(128, generator=random))]
    ends = [height(descended([weight], factored(identity, s, damp=1e-6), grid).log()) for s in starts]
    assert ends[0] == pytest.approx(ends[1], abs=2e-3)
    assert ends[0] < min(height(s.log()) for s in starts) - 0.1


def test_each_step_looks_at_other_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """An eighth of the rows a step ends within one percent of all of them."""
    weight, gram = problem(rows=1024)
    ends = []
    for rows in (1024, 128):
        monkeypatch.setattr(descent, "ROWS", rows)
        s = descended([weight[:700], weight[700:]], factored(gram), Grid(32))
        ends.append(float(expected_loss([weight], gram.diagonal(), s, Grid(32))))
    assert ends[1] == pytest.approx(ends[0], rel=0.01)
    assert ends[0] < 0.9 * float(expected_loss([weight], gram.diagonal(), torch.ones(128), Grid(32)))


def test_heads_that_share_a_scale_still_do() -> None:
    weight, gram = problem()
    start = first_scale([weight], gram, tie=2, tie_block=16)
    found = descended([weight], factored(gram, start), Grid(32), tie=2, tie_block=16)
    for s in (start, found):
        heads = s.view(4, 2, 16)
        assert torch.equal(heads[:, 0], heads[:, 1])
    assert float((found / start).std()) > 0.01


def test_a_rescaled_model_begins_at_the_same_place() -> None:
    """What its channels were multiplied by, its start is too, but for one factor over all."""
    weight, gram = problem()
    by = torch.exp(torch.linspace(-2, 2, 128))
    one, two = first_scale([weight], gram), first_scale([weight / by], gram * by[:, None] * by)
    ratio = two / (one * by)
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))


@pytest.fixture(scope="module")
def layer(pebble: Path) -> Iterator[Halted]:
    with halted(pebble, 1) as found:
        yield found


@GRIDS
def test_it_goes_down_from_awqs_best_on_a_trained_layer(layer: Halted, grid: Grid) -> None:
    falls = []
    for group, gram in layer.grams.items():
        weights = [layer.weights[f"{n}.weight"] for n in group.linears]
        start = best_scale(weights, gram, grid)
        factor = factored(gram, start, damp=0.1)
        found = descended(weights, factor, grid)
        before, after = (expected_loss(weights, factor.costs() * start.square(), s, grid) for s in (start, found))
        falls.append(1 - float(after / before))
        assert float((found / start).log().abs().max()) < 3
    assert min(falls) > 0.01
    assert max(falls) > 0.1


@pytest.mark.parametrize("asked", [("awq", "default"), ("gptq", "default")], ids="-".join)
def test_rounding_a_trained_layer_costs_less(
    layer: Halted, asked: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the layer's linears put out, measured, and not what was brought down."""

    def lost() -> float:
        return sum(solve(layer.problem(torch.bfloat16), Grid(128, asked[0] == "gptq"), STEPS[asked]).errors.values())

    descending = lost()
    monkeypatch.setattr(pipeline, "descended", lambda weights, factor, *_, **__: factor.columns)
    assert descending < 0.97 * lost()


@GRIDS
def test_what_says_nothing_moves_nothing(grid: Grid) -> None:
    """No weights, and weights or an H that are no numbers: the start, untouched."""
    weight, gram = problem()
    start = torch.linspace(0.5, 2, 128)
    factor = factored(gram, start)
    for w, f in (
        (weight * 0, factor),
        (weight * torch.nan, factor),
        (weight, dataclasses.replace(factor, pivots=factor.pivots * torch.nan)),
    ):
        assert torch.equal(descended([w], f, grid), start)


@GRIDS
@pytest.mark.parametrize("loud", [1.0, 1e4, 1e8])
def test_dead_and_loud_channels(grid: Grid, loud: float) -> None:
    """Channels without input, without weights, alike, and ten thousand times as loud: all scales stay finite, and none
    goes further than the steps can carry it."""
    weight, gram = problem()
    by = torch.ones(128)
    by[:33] = 0
    by[[40, 90]] = loud
    gram = gram * by[:, None] * by
    gram[60:70] = gram[60]
    gram[:, 60:70] = gram[:, 60:61]
    weight[:, 100] = 0
    weight[3] = 0
    start = first_scale([weight], gram)
    found = descended([weight], factored(gram, start), grid)
    assert found.isfinite().all()
    assert (found > 0).all()
    assert float((found / start).log().abs().max()) < 2 * descent.STEPS * descent.LENGTH
    assert not torch.equal(found, start)


def test_damping_goes_by_no_units_where_nothing_takes_a_scale() -> None:
    """A model whose channels were rescaled is rounded with the same errors handed on. A share of H's mean diagonal, as
    it is, would leave to one loud channel what all others are damped by."""
    weight, gram = problem()
    by = torch.exp(0.8 * torch.randn(128, generator=torch.Generator().manual_seed(1)))
    steps = STEPS["awq", "default"]
    one = pipeline._unscaled([weight[:40], weight[40:]], gram, 0.2, steps)
    other = pipeline._unscaled([weight / by], gram * by[:, None] * by, 0.2, steps)
    assert torch.equal(one.order, other.order)
    b = by[one.order]
    torch.testing.assert_close(
        other.follow, one.follow * b[:, None] / b, rtol=1e-3, atol=1e-3 * float(b.max() / b.min())
    )
    torch.testing.assert_close(other.pivots, one.pivots * b.square(), rtol=1e-3, atol=0)
    published = pipeline._unscaled([weight], gram, 0.2, STEPS["gptq", "fast"])
    torch.testing.assert_close(published.pivots, factored(gram, damp=0.2).pivots)
