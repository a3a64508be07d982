"""AWQ: its loss through Gram matrices is that of forward passes, its search finds what there is, scales fold away."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from halting import Halted, halted
from tiny import vlm

from mmq.quantize import awq
from mmq.quantize.grid import Grid, fake
from mmq.quantize.skeleton import set_parameter


@pytest.fixture(scope="module")
def layer(pebble: Path) -> Iterator[Halted]:
    with halted(pebble, 1) as found:
        yield found


def test_the_loss_is_that_of_forward_passes(layer: Halted) -> None:
    """For every group of a trained layer and several scales: tr(dW H dW^T) against what the linears themselves put out
    for the same samples, before and after: squared differences, summed over outputs, their mean over tokens."""
    grid = Grid()
    for group, gram in layer.grams.items():
        weights = [layer.weights[f"{n}.weight"] for n in group.linears]
        pool = torch.stack(awq.candidates(gram.diagonal().sqrt(), weights, 128)[::9])
        assert len(pool) >= 4
        found = awq.scale_losses(weights, gram, pool, grid)
        for s, loss in zip(pool, found, strict=True):
            forward = 0.0
            for name in group.linears:
                linear = layer.stop.layer.get_submodule(name)
                before = linear(layer.inputs[group])
                set_parameter(linear, "weight", fake(layer.weights[f"{name}.weight"] * s, grid) / s)
                after = linear(layer.inputs[group])
                set_parameter(linear, "weight", layer.weights[f"{name}.weight"])
                forward += float((after - before).double().square().sum(-1).mean())
            assert float(loss) == pytest.approx(forward, rel=1e-3)


@pytest.mark.parametrize("tried", [512, 128])
def test_the_search_in_two_stages_finds_nearly_the_best(
    layer: Halted, monkeypatch: pytest.MonkeyPatch, tried: int
) -> None:
    """All candidates on some of the rows, the best few on all, against all on all."""
    monkeypatch.setattr(awq, "FIRST_ROWS", tried)
    grid, in_stages = Grid(), 0
    for group, gram in layer.grams.items():
        weights = [layer.weights[f"{n}.weight"] for n in group.linears]
        in_stages += sum(len(w) for w in weights) > tried
        pool = torch.stack(awq.candidates(gram.diagonal().sqrt(), weights, 128))
        every = awq.scale_losses(weights, gram, pool, grid)
        best = awq.best_scale(weights, gram, grid)
        assert float(awq.scale_losses(weights, gram, best[None], grid)) <= 1.005 * float(every.min())
        assert float(every.min()) < 0.97 * float(every[0])  # there is something to find: the first is no scaling
    assert in_stages == (1 if tried == 512 else 4)


def test_of_few_rows_all_are_telling() -> None:
    """A mixture of two small experts has no more."""
    weights = [torch.randn(rows, 64) for rows in (32, 200)]
    assert torch.equal(awq.telling_rows(weights[:1], torch.eye(64), 32), weights[0])
    assert torch.equal(awq.telling_rows(weights, torch.eye(64), 32), torch.cat(weights))


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen3_vl"])
@pytest.mark.parametrize(("stored", "apart"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-3)])
def test_moved_scales_leave_the_layer_as_it_was(tmp_path: Path, kind: str, stored: torch.dtype, apart: float) -> None:
    """Before anything is rounded: norms and linears absorb what columns are multiplied by, value heads that several
    query heads read included. In 16 bit the bias of a linear that absorbs is rounded, and nothing else is lost."""
    with halted(vlm(kind, tmp_path / kind), 1) as found:
        problem = found.problem(stored)
        assert awq.absorbable(problem.groups[1], found.weights, {"self_attn.v_proj"}) == 2  # grouped queries
        call = found.stop.calls[0]
        before = found.stop.run(call)
        moved = awq.scale(problem, Grid())
        assert set(moved.columns) == {n for g in problem.groups for n in g.linears}
        assert set(moved.rows) == {"self_attn.v_proj", "mlp.up_proj"}
        for name, value in moved.changed.items():
            set_parameter(found.stop.layer, name, value)
        for group in problem.groups:
            for name in group.linears:
                assert float((moved.columns[name] - 1).abs().max()) > 0.01
                set_parameter(found.stop.layer, f"{name}.weight", moved.weight(name, slice(None)))
        after = found.stop.run(call)
        assert torch.linalg.norm(after - before) <= apart * torch.linalg.norm(before - call.hidden)


def test_heads_that_read_one_value_head_share_a_scale() -> None:
    """Four query heads of two channels over two value heads: each pair of heads gets one scale a channel."""
    s = torch.arange(8.0) + 1
    tied = awq.best_scale([torch.randn(16, 8)], torch.diag(s**2), Grid(8), tie=2, tie_block=2).view(2, 2, 2)
    assert torch.equal(tied[:, 0], tied[:, 1])
