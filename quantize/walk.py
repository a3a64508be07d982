"""The walk: decoder layer by decoder layer, from the safetensors files to quantized weights, one layer in memory.

Each layer is loaded, fed with what the quantized layers before it produce, quantized, and run again as an engine will
run it, so that later layers see the error of earlier ones. Knows no file format: it yields layers, and is told
through `finished` which of them an interrupted run has already made.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..recipes.progress import Step, Tell, silent
from ..recipes.samples import Sample
from .awq import awq
from .bnb import bnb
from .family import Group
from .gptq import gptq
from .grid import Grid, check_width
from .inputs import encode, media_mask
from .lockstep import Lockstep, Stop
from .method import Problem, Solution, in_original_terms, output_error, restored
from .rtn import rtn
from .skeleton import Skeleton, load_layer, load_outside, release, release_layer, set_parameter, vision

METHODS: dict[str, Callable[..., Solution]] = {"awq": awq, "gptq": gptq, "rtn": rtn, "bnb": bnb}
CALIBRATED = ("awq", "gptq", "rtn")  # rtn needs no inputs, but is measured on them


@dataclass(frozen=True)
class Layer:
    """One finished decoder layer: its solution, the relative output error of each linear on the calibrated inputs
    (squared; 0 is perfect), and the seconds it took. `solution` is None for a layer that was already on disk."""

    index: int
    solution: Solution | None
    errors: Mapping[str, float]
    seconds: float


@dataclass(frozen=True)
class Tokens:
    """How much the calibration holds."""

    samples: int
    text: int
    media: int


def linears(skeleton: Skeleton, keep: Sequence[str] = ()) -> dict[int, tuple[Group, ...]]:
    """Per decoder layer, the groups to quantize: the family's, less what starts with an entry of `keep`.

    An entry is a prefix of a module's or a checkpoint's name, whole words only
    (`layers.1` is not `layers.10`). Engines fuse the linears of a group, so a group is
    quantized whole or not at all: ValueError when `keep` splits one, matches nothing, or leaves nothing.
    """
    used: set[str] = set()
    found = {}
    for index in range(len(skeleton.layers)):
        prefix = skeleton.layer_prefix(index)
        chosen = []
        for group in skeleton.family.groups:
            kept = []
            for name in group.linears:
                full = f"{prefix}{name}"
                spellings = (full, name, skeleton.names[f"{full}.weight"].removesuffix(".weight"))
                hits = [k for k in keep if any(f"{s}.".startswith(k.rstrip(".") + ".") for s in spellings)]
                used.update(hits)
                kept.append(bool(hits))
            if any(kept) and not all(kept):
                raise ValueError(
                    f"keep splits {', '.join(group.linears)} of layer {index}; engines fuse them: keep all"
                )
            if not any(kept):
                chosen.append(group)
        found[index] = tuple(chosen)
    outside = {n for n in skeleton.names if not n.startswith(skeleton.family.layers + ".")}
    for k in keep:
        if k not in used and not any(n.startswith(k) or skeleton.names[n].startswith(k) for n in outside):
            raise ValueError(f"keep: nothing in the model is named {k!r}")
    if not any(found.values()):
        raise ValueError("keep leaves no linear to quantize; name fewer modules")
    return found


def check_groups(skeleton: Skeleton, plan: Mapping[int, tuple[Group, ...]], group_size: int) -> None:
    """ValueError when `group_size` does not divide the inputs of a linear that is to be quantized."""
    for index, groups in plan.items():
        for group in groups:
            for name in group.linears:
                stored = skeleton.names[f"{skeleton.layer_prefix(index)}{name}.weight"]
                check_width(stored.removesuffix(".weight"), skeleton.source.metas[stored].shape[1], group_size)


def count_tokens(skeleton: Skeleton, inputs: Sequence[Mapping[str, Tensor]]) -> Tokens:
    """Text and media tokens of the encoded samples."""
    media = sum(int(media_mask(skeleton, i["input_ids"]).sum()) for i in inputs)
    return Tokens(len(inputs), sum(i["input_ids"].numel() for i in inputs) - media, media)


def walk(
    skeleton: Skeleton,
    samples: Sequence[Sample],
    *,
    method: str,
    grid: Grid,
    plan: Mapping[int, tuple[Group, ...]],
    finished: Callable[[int], Mapping[str, Tensor] | None] = lambda index: None,
    tell: Tell = silent,
) -> Iterator[Layer]:
    """Quantize every decoder layer in turn, yielding each as soon as it is done.

    `finished(i)` gives layer i's 16-bit view (parameter name inside the layer -> tensor) where it is already on disk,
    else None; such a layer is run as it is, so the layers after it come out the same as without the interruption.
    """
    if method == "bnb":
        yield from _walk_uncalibrated(skeleton, method=method, grid=grid, plan=plan, finished=finished, tell=tell)
        return
    with torch.no_grad():
        load_outside(skeleton)
        inputs = [encode(skeleton, s) for s in samples]
        base = skeleton.module.base_model
        calls = [lambda i=i: base(**i, use_cache=False) for i in inputs]
        del inputs
        total = len(skeleton.layers)
        with Lockstep(skeleton.layers, calls) as steps:
            del calls
            for stop in steps:
                if stop.index == 0:
                    release(skeleton, vision(skeleton))
                start = time.monotonic()
                load_layer(skeleton, stop.index)
                done = finished(stop.index)
                if done is not None:
                    for name, value in done.items():
                        set_parameter(stop.layer, name, _ready(skeleton, value))
                    layer = Layer(stop.index, None, {}, 0.0)
                else:
                    layer = _quantize(skeleton, stop, plan[stop.index], method, grid, start)
                yield layer
                if stop.index + 1 < total:
                    stop.advance()
                else:
                    stop.calls.clear()  # nobody reads what comes out of the last layer
                release_layer(skeleton, stop.index)
                tell(Step("layer", stop.index + 1, total, _note(layer)))


def _walk_uncalibrated(
    skeleton: Skeleton,
    *,
    method: str,
    grid: Grid,
    plan: Mapping[int, tuple[Group, ...]],
    finished: Callable[[int], Mapping[str, Tensor] | None],
    tell: Tell,
) -> Iterator[Layer]:
    for index, layer in enumerate(skeleton.layers):
        start = time.monotonic()
        if finished(index) is not None:
            yield Layer(index, None, {}, 0.0)
            continue
        load_layer(skeleton, index)
        weights = {n: p.detach().float() for n, p in layer.named_parameters()}
        solution = METHODS[method](Problem(weights, plan[index], {}), grid)
        errors = {}
        for name, q in solution.quantized.items():
            w = weights[f"{name}.weight"]
            errors[name] = float((restored(q) - w).square().sum() / w.square().sum().clamp_min(1e-30))
        result = Layer(index, solution, errors, time.monotonic() - start)
        yield result
        release_layer(skeleton, index)
        tell(Step("layer", index + 1, len(skeleton.layers), _note(result)))


def _note(layer: Layer) -> str:
    if layer.solution is None:
        return "already done"
    worst = max(layer.errors, key=lambda n: layer.errors[n], default=None)
    return "" if worst is None else f"error {mean_error(layer):.2e}, most in {worst} {layer.errors[worst]:.2e}"


def mean_error(layer: Layer) -> float:
    """The mean over a layer's linears of their relative output error."""
    return sum(layer.errors.values()) / max(len(layer.errors), 1)


def _quantize(
    skeleton: Skeleton, stop: Stop, groups: tuple[Group, ...], method: str, grid: Grid, start: float
) -> Layer:
    grams = collect_grams(stop, groups)
    weights = {n: p.detach().float() for n, p in stop.layer.named_parameters()}
    extra = {}
    if method == "awq":
        extra = {"stored": skeleton.stored, "head_dim": head_dim(skeleton.module.config)}
    solution = METHODS[method](Problem(weights, groups, grams), grid, **extra)
    errors = {}
    for group in groups:
        for name in group.linears:
            before = weights[f"{name}.weight"]
            lost = output_error(in_original_terms(solution, name) - before, grams[group])
            errors[name] = float(lost / output_error(before, grams[group]).clamp_min(1e-30))
    for name, value in {
        **solution.changed,
        **{f"{n}.weight": restored(q) for n, q in solution.quantized.items()},
    }.items():
        set_parameter(stop.layer, name, _ready(skeleton, value))
    return Layer(stop.index, solution, errors, time.monotonic() - start)


def _ready(skeleton: Skeleton, value: Tensor) -> Tensor:
    """A tensor as an engine would hold it: rounded to the stored dtype, then in the compute dtype."""
    return value.to(skeleton.device).to(skeleton.stored).to(skeleton.dtype)


def head_dim(config: Any) -> int:
    """Width of one attention head of the text model."""
    text = config.get_text_config()
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def collect_grams(stop: Stop, groups: tuple[Group, ...]) -> dict[Group, Tensor]:
    """Run the layer on every halted call and accumulate, per group, H = sum x x^T / tokens, float32 [in, in].

    ValueError when a linear's inputs are not finite: no scale and no rounding can be judged on them.
    """
    grams: dict[Group, Tensor] = {}
    tokens: dict[Group, int] = {}

    def watch(group: Group) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach().flatten(0, -2).float()  # [tokens, in]
            if group not in grams:
                grams[group] = torch.zeros(x.shape[1], x.shape[1], device=x.device)
                tokens[group] = 0
            grams[group].addmm_(x.T, x)
            tokens[group] += x.shape[0]

        return hook

    handles = [stop.layer.get_submodule(g.linears[0]).register_forward_pre_hook(watch(g)) for g in groups]
    try:
        for call in stop.calls:
            stop.forward(*call.args, **call.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    for group, gram in grams.items():
        if not bool(torch.isfinite(gram).all()):
            raise ValueError(
                f"the inputs of {group.linears[0]} in decoder layer {stop.index} are not finite: the checkpoint "
                "overflows in its own dtype, or is damaged; --device cpu computes in float32"
            )
    return {g: h / tokens[g] for g, h in grams.items()}
