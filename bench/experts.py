"""What an expert that saw few tokens is best calibrated on: `python -m mmq.bench.experts OUT.json`.

Pebble is no mixture, but its MLPs stand in for one: their inputs on the calibration set are sorted into clusters of
directions, as a router sorts tokens, and the MLP is quantized as each cluster's expert, on so many of the cluster's
tokens, on all tokens of the layer, or on both (routing.blended). What it then puts out is judged on tokens of the same
cluster from other samples. And what one scale of the input is worth, taken into the norm for all of them at once
(quantize/mixture.py), to experts that saw all their tokens. Knows no engine and no file format.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, silu

from ..quantize.awq import telling_rows
from ..quantize.family import Group
from ..quantize.grid import Grid
from ..quantize.inputs import micro_batches
from ..quantize.lockstep import Lockstep
from ..quantize.method import Problem, restored
from ..quantize.routing import blended, floor_of
from ..quantize.skeleton import build, embeddings, load, load_layer, release_layer
from ..quantize.steps import STEPS, Steps, solve
from ..recipes.calibration import drawn
from ..recipes.hub import fetch
from ..recipes.pebble.tasks import samples
from ..recipes.samples import Sample

AS_EXPERTS = {way: replace(STEPS["awq", way], even=False) for way in ("fast", "default")}  # as quantize/layer.py has it
COUNTS = (0, 64, 256, 1024, 4096)  # tokens that the expert saw
CLUSTERS = 5
LAYERS = (1, 2, 3)
GATE_UP = Group(("mlp.gate_proj", "mlp.up_proj"), None)
DOWN = Group(("mlp.down_proj",), "mlp.up_proj")


def study(*, seed: int = 0) -> dict[str, Any]:
    """By layer and number of tokens, the error of each way: the mean over clusters of |y - y'|^2 / |y|^2, of all
    tokens together ("energy") and as a mean over tokens ("token")."""
    torch.manual_seed(seed)
    calibration, test = (mlp_inputs(s) for s in (drawn(480), list(samples("test", 120))))
    found = {}
    for layer in LAYERS:
        x, weights = calibration[layer]
        found[f"layer {layer}"] = compare(x, test[layer][0], weights) | {"scale": scales(x, test[layer][0], weights)}
    return found


def mlp_inputs(given: Sequence[Sample]) -> dict[int, tuple[Tensor, dict[str, Tensor]]]:
    """By decoder layer of pebble in 16 bit: what its MLP reads, float32 [tokens, hidden], and its MLP's weights."""
    skeleton = build(fetch("pebble").path)
    found = {}
    with torch.no_grad():
        load(skeleton, embeddings(skeleton))
        base = skeleton.module.base_model
        batches = micro_batches(skeleton, given, tokens=4096)
        with Lockstep(skeleton.layers, [lambda b=b: base(**b, use_cache=False) for b in batches]) as steps:
            for stop in steps:
                load_layer(skeleton, stop.index)
                seen: list[Tensor] = []
                gate = stop.layer.get_submodule("mlp.gate_proj")
                handle = gate.register_forward_pre_hook(_into(seen))
                for call in stop.calls:
                    stop.run(call)
                handle.remove()
                weights = {n: p.detach().clone() for n, p in stop.layer.named_parameters() if n.startswith("mlp.")}
                found[stop.index] = torch.cat(seen), weights
                stop.advance()
                release_layer(skeleton, stop.index)
    return found


def _into(seen: list[Tensor]) -> Callable[..., None]:
    return lambda module, args: seen.append(args[0].flatten(0, -2))


def compare(x: Tensor, test: Tensor, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The errors of one layer's MLP as every cluster's expert; x, test: [tokens, hidden]."""
    centres = clusters(x, CLUSTERS)
    mine, theirs = (nearest(t, centres) for t in (x, test))
    every = grams(x, weights)
    sums: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for cluster in range(CLUSTERS):
        tokens, judged = x[mine == cluster], test[theirs == cluster]
        if len(tokens) < max(COUNTS) or len(judged) < 100:
            continue
        tokens = tokens[torch.randperm(len(tokens))]
        for count in COUNTS:
            own = grams(tokens[:count], weights) if count else {}
            both = {g: blended(own[g].clone() if own else None, every[g], count, floor_of(x.shape[1])) for g in every}
            ways = {"own": own, "every": every, "both": both} if count else {"every": every}
            for way, chosen in ways.items():
                sums.setdefault((count, way), []).append(errors(chosen, judged, weights, tokens=len(x)))
    found: dict[str, Any] = {"clusters": len(sums[0, "every"])}
    for (count, way), pairs in sums.items():
        energy, token = (sum(p[i] for p in pairs) / len(pairs) for i in (0, 1))
        found.setdefault(str(count), {})[way] = {"energy": round(energy, 6), "token": round(token, 6)}
    return found


def scales(x: Tensor, test: Tensor, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The errors of one layer's MLP as every cluster's expert, without a scale of its input and with one for all."""
    centres = clusters(x, CLUSTERS)
    mine, theirs = (nearest(t, centres) for t in (x, test))
    found: dict[str, Any] = {}
    for quality in ("fast", "default"):
        steps = AS_EXPERTS[quality]
        ones = torch.ones(x.shape[1])
        for way, scale in (("none", ones), ("one", one_scale(grams(x, weights)[GATE_UP], weights, steps, len(x)))):
            packed = {n: w if "down_proj" in n else w * scale for n, w in weights.items()}
            pairs = []
            for cluster in range(CLUSTERS):
                tokens, judged = x[mine == cluster] / scale, test[theirs == cluster] / scale
                if len(tokens) >= 1000 and len(judged) >= 100:
                    pairs.append(errors(grams(tokens, packed), judged, packed, tokens=len(x), steps=steps))
            energy, token = (sum(p[i] for p in pairs) / len(pairs) for i in (0, 1))
            found.setdefault(quality, {})[way] = {"energy": round(energy, 6), "token": round(token, 6)}
    return found


def one_scale(gram: Tensor, weights: Mapping[str, Tensor], steps: Steps, tokens: int) -> Tensor:
    """The scale [hidden] that a norm before all experts would be given, on H of every token of the layer."""
    rows = telling_rows([weights[f"{n}.weight"] for n in GATE_UP.linears], gram, 64)
    group = Group(("rows",), "norm")
    parts = {"rows.weight": rows, "norm.weight": torch.ones(len(gram))}
    return 1 / solve(Problem(parts, (group,), {group: gram}, tokens=tokens), Grid(64), steps).changed["norm.weight"]


def clusters(x: Tensor, count: int) -> Tensor:
    """Directions [count, hidden] around which the tokens lie, by k-means on the sphere."""
    points = normalize(x, dim=1)
    centres = points[torch.randperm(len(x))[:count]]
    for _ in range(20):
        mine = (points @ centres.T).argmax(1)
        centres = normalize(torch.stack([points[mine == c].sum(0) + centres[c] * 1e-6 for c in range(count)]), dim=1)
    return centres


def nearest(x: Tensor, centres: Tensor) -> Tensor:
    return (normalize(x, dim=1) @ centres.T).argmax(1)


def grams(x: Tensor, weights: Mapping[str, Tensor]) -> dict[Group, Tensor]:
    """H of what the MLP's linears read where it is given `x` [tokens, hidden]."""
    inner = _inner(x, weights)
    return {GATE_UP: x.T @ x / len(x), DOWN: inner.T @ inner / len(x)}


def _inner(x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    return silu(x @ weights["mlp.gate_proj.weight"].T) * (x @ weights["mlp.up_proj.weight"].T)


def errors(
    chosen: Mapping[Group, Tensor],
    judged: Tensor,
    weights: Mapping[str, Tensor],
    *,
    tokens: int,
    steps: Steps = AS_EXPERTS["default"],
) -> tuple[float, float]:
    """Of the MLP quantized on `chosen`, on the tokens `judged` [tokens, hidden]: relative squared error of all
    together, and the mean over tokens."""
    problem = Problem(dict(weights), (GATE_UP, DOWN), {g: h.clone() for g, h in chosen.items()}, tokens=tokens)
    solution = solve(problem, Grid(64), steps)
    packed = {f"{n}.weight": restored(q) for n, q in solution.quantized.items()}
    after, before = (_inner(judged, w) @ w["mlp.down_proj.weight"].T for w in (packed, weights))
    lost, energy = (after - before).square().sum(1), before.square().sum(1).clamp_min(1e-12)
    return float(lost.sum() / energy.sum()), float((lost / energy).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    asked.out.write_text(json.dumps(study(seed=asked.seed), indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
