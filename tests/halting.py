"""What several tests of the quantizer's steps share: a real model's decoder layer with what it was fed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmq.quantize.detect import heads_of
from mmq.quantize.family import Group
from mmq.quantize.gather import collect_grams
from mmq.quantize.inputs import encode
from mmq.quantize.lockstep import Lockstep, Stop
from mmq.quantize.method import Problem
from mmq.quantize.skeleton import Skeleton, build, load_layer, load_outside
from mmq.recipes.calibration import drawn


@dataclass
class Halted:
    """A decoder layer of a real model with what it was fed: H and the very inputs, [tokens, in] by group."""

    skeleton: Skeleton
    stop: Stop
    weights: dict[str, Tensor]
    grams: dict[Group, Tensor]
    inputs: dict[Group, Tensor]

    def problem(self, stored: torch.dtype) -> Problem:
        _, head_dim = heads_of(self.skeleton.module.config, self.stop.index)
        return Problem(self.weights, tuple(self.grams), dict(self.grams), stored, head_dim)


@contextmanager
def halted(folder: Path, index: int) -> Iterator[Halted]:
    """The model in `folder`, all of six samples standing before decoder layer `index`."""
    skeleton = build(folder)
    load_outside(skeleton)
    base = skeleton.module.base_model
    batches = [encode(skeleton, s) for s in drawn(6)]
    with torch.no_grad(), Lockstep(skeleton.layers, [lambda b=b: base(**b, use_cache=False) for b in batches]) as steps:
        for stop in steps:
            load_layer(skeleton, stop.index)
            if stop.index == index:
                groups = skeleton.family.groups[index]
                seen: dict[Group, list[Tensor]] = {g: [] for g in groups}

                def watch(group: Group, seen: dict[Group, list[Tensor]] = seen) -> Any:
                    return lambda module, args: seen[group].append(args[0].flatten(0, -2).clone())

                hooks = [stop.layer.get_submodule(g.linears[0]).register_forward_pre_hook(watch(g)) for g in groups]
                grams, left_out = collect_grams(stop, groups)
                assert left_out == 0
                for hook in hooks:
                    hook.remove()
                weights = {n: p.detach() for n, p in stop.layer.named_parameters()}
                yield Halted(skeleton, stop, weights, grams, {g: torch.cat(xs) for g, xs in seen.items()})
                stop.calls.clear()
                return
            stop.advance()
