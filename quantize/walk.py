"""The walk: decoder layer by decoder layer, from the safetensors files to quantized weights, one layer in memory.

Each layer is loaded, fed with what the quantized layers before it produce, quantized, and run again as an engine will
run it, so that later layers see the error of earlier ones. Knows no file format: it yields layers, and is told
through `finished` which of them an interrupted run has already made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..recipes.progress import Step, Tell, silent
from ..recipes.samples import Sample
from .awq import Scaled
from .bnb import bnb
from .family import Group
from .fused import fused
from .gather import collect_grams
from .grid import Grid, Quantized, check_width
from .inputs import media_mask, micro_batches
from .lockstep import Call, Lockstep, Stop
from .memory import MICRO_BATCH
from .method import Problem, Solution, restored
from .pull import drift_of, place
from .ranks import own, total
from .skeleton import (
    READERS,
    Skeleton,
    embeddings,
    load,
    load_layer,
    read_ahead,
    release,
    release_layer,
    set_parameter,
)
from .steps import STEPS, solve

CALIBRATED = ("awq", "gptq", "rtn")  # rtn needs no inputs, but is measured on them


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


def no_lap(name: str) -> None:
    """Nobody measures: see `walk`."""


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


def walk(
    skeleton: Skeleton,
    samples: Sequence[Sample],
    *,
    method: str,
    quality: str,
    grid: Grid,
    plan: Mapping[int, tuple[Group, ...]],
    done: Collection[int] = (),
    finished: Callable[[int], Mapping[str, Tensor]] | None = None,
    micro_batch: int = MICRO_BATCH,
    park: bool = False,
    tell: Tell = silent,
    lap: Callable[[str], None] = no_lap,
) -> Iterator[Layer]:
    """Quantize every decoder layer in turn, yielding each as soon as it is done.

    `done` are the layers that are already on disk, and `finished(i)` gives the 16-bit view of such a layer i (parameter
    name inside the layer -> tensor): it is run as it is, so the layers after it come out the same as without the
    interruption; the walk ends with the last layer that is not `done`. A forward pass takes about `micro_batch` tokens;
    with `park` what is between layers waits on the host. Under several ranks (ranks.py) each takes its share of the
    samples and of the rows. `lap(stage)` is called at the end of each stage, for whoever measures.
    """
    if method == "bnb":
        yield from _walk_uncalibrated(skeleton, grid=grid, plan=plan, done=done, tell=tell)
        return
    count = len(skeleton.layers)
    last = max((i for i in range(count) if i not in done), default=None)
    if last is None:
        return
    counted = [0, 0, 0]
    both = STEPS[method, quality].pull  # every micro-batch twice: as the quantized model runs it, and as the 16-bit one
    with torch.no_grad(), tensor_cores():
        warming = _warm(skeleton, plan, grid)
        read_ahead(skeleton, 0)
        load(skeleton, embeddings(skeleton))
        base = skeleton.module.base_model

        def calls() -> Iterator[Callable[[], Any]]:
            for inputs in micro_batches(skeleton, own(samples), tokens=micro_batch):
                ids = inputs["input_ids"]
                media = int(media_mask(skeleton, ids).sum())
                for number, more in enumerate((len(ids), ids.numel() - media, media)):
                    counted[number] += more
                for _ in range(1 + both):
                    yield lambda inputs=inputs: base(**inputs, use_cache=False)
                for tensor in inputs.values():
                    if tensor.is_floating_point():  # pixels: the vision tower has seen them, and the frames hold them
                        tensor.untyped_storage().resize_(0)
                tell(Step("samples", counted[0], len(samples)))

        with Lockstep(skeleton.layers, calls(), park=park) as steps:
            for stop in steps:
                if stop.index == 0:
                    release(skeleton, embeddings(skeleton))
                    counted = total(torch.tensor(counted, device=skeleton.device)).tolist()
                    warming.result()
                    lap("vision tower and embeddings")
                load_layer(skeleton, stop.index)
                if stop.index < last:
                    read_ahead(skeleton, stop.index + 1)
                lap("load")
                original = dict(stop.layer.named_parameters()) if both else {}
                solution, left_out = None, 0
                if stop.index in done:
                    assert finished is not None
                    for name, value in finished(stop.index).items():
                        set_parameter(stop.layer, name, _ready(skeleton, value))
                else:
                    solution, left_out = _quantize(
                        skeleton, stop, plan[stop.index], grid, (method, quality), sum(counted[1:]), lap
                    )
                layer = Layer(stop.index, solution, Tokens(*counted), left_out)
                note = _note(layer)
                yield layer
                del layer, solution
                lap("pack")
                if stop.index < last:
                    now = dict(stop.layer.named_parameters()) if both else {}
                    stop.advance(partial(_as_its_stream, stop, now, original))
                    place(stop.layer, now)
                    lap("forward, quantized")
                else:
                    stop.calls.clear()  # nobody reads what comes out of it
                release_layer(skeleton, stop.index)
                tell(Step("layer", stop.index + 1, count, note))


@contextmanager
def tensor_cores() -> Iterator[None]:
    """Float32 products on the tensor cores (TF32: ten bits of mantissa), which weigh errors against each other; sums
    stay float32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _as_its_stream(
    stop: Stop, now: Mapping[str, nn.Parameter], original: Mapping[str, nn.Parameter], call: Call
) -> None:
    """Give the layer the weights by which this call is to go on: every other call is the 16-bit model's."""
    place(stop.layer, original if call.number % 2 and original else now)


def _warm(skeleton: Skeleton, plan: Mapping[int, tuple[Group, ...]], grid: Grid) -> Future[None]:
    """Compile the kernels that this model needs while its pictures are looked at."""
    kernels = fused(torch.empty(0, device=skeleton.device))
    prefix, groups = skeleton.layer_prefix(0), next(iter(plan.values()))
    names = [skeleton.names[f"{prefix}{g.linears[0]}.weight"] for g in groups]
    widths = [skeleton.source.metas[n].shape[1] for n in names]
    if kernels is None:
        return READERS.submit(lambda: None)
    return READERS.submit(kernels.warm, grid, widths, skeleton.device)


def _walk_uncalibrated(
    skeleton: Skeleton, *, grid: Grid, plan: Mapping[int, tuple[Group, ...]], done: Collection[int], tell: Tell
) -> Iterator[Layer]:
    for index, layer in enumerate(skeleton.layers):
        if index in done:
            yield Layer(index, None, None)
            continue
        load_layer(skeleton, index)
        weights = {n: p.detach() for n, p in layer.named_parameters()}
        result = Layer(index, _sound(bnb(Problem(weights, plan[index], {}), grid), index), None)
        yield result
        release_layer(skeleton, index)
        tell(Step("layer", index + 1, len(skeleton.layers), _note(result)))


def _note(layer: Layer) -> str:
    if layer.solution is None:
        return "already done"
    errors = layer.solution.errors
    worst = max(errors, key=lambda n: errors[n], default=None)
    mean = sum(errors.values()) / max(len(errors), 1)
    told = [] if worst is None else [f"error {mean:.2e}, most in {worst} {errors[worst]:.2e}"]
    told += [f"{len(layer.solution.fallbacks)} plainly rounded"] if layer.solution.fallbacks else []
    told += [f"{layer.left_out} tokens left out"] if layer.left_out else []
    return "; ".join(told)


def _quantize(
    skeleton: Skeleton,
    stop: Stop,
    groups: tuple[Group, ...],
    grid: Grid,
    steps: tuple[str, str],
    tokens: int,
    lap: Callable[[str], None],
) -> tuple[Solution, int]:
    original = dict(stop.layer.named_parameters())
    pairs = list(zip(stop.calls[::2], stop.calls[1::2], strict=True)) if STEPS[steps].pull else []
    grams, left_out = collect_grams(replace(stop, calls=[a for a, _ in pairs]) if pairs else stop, groups)
    lap("forward and Gram matrices")
    weights = {n: p.detach() for n, p in original.items()}
    problem = Problem(weights, groups, grams, skeleton.stored, head_dim(skeleton.module.config), tokens)

    def fresh(group: Group, moved: Scaled, quantized: Mapping[str, Quantized]) -> tuple[Tensor, Tensor] | None:
        for name, value in moved.changed.items():
            set_parameter(stop.layer, name, _ready(skeleton, value))
        for name in (n for g in groups for n in g.linears):
            ready = restored(quantized[name]) if name in quantized else moved.weight(name, slice(None))
            set_parameter(stop.layer, f"{name}.weight", _ready(skeleton, ready))
        now = dict(stop.layer.named_parameters())
        columns = moved.columns.get(group.linears[0])
        return drift_of(stop, pairs, group, now=now, original=original, columns=columns)

    solution = _sound(solve(problem, grid, STEPS[steps], lap, fresh=fresh if pairs else None), stop.index)
    del grams, problem, weights
    for name, value in solution.changed.items():
        set_parameter(stop.layer, name, _ready(skeleton, value))
    for name, value in solution.quantized.items():
        set_parameter(stop.layer, f"{name}.weight", _ready(skeleton, restored(value)))
    return solution, left_out


def _sound(solution: Solution, index: int) -> Solution:
    """The same. ValueError where a linear's weights were not finite, so that nothing can be said of its error."""
    for name, error in solution.errors.items():
        if not math.isfinite(error):
            raise ValueError(
                f"the weights of {name} in decoder layer {index} are not finite: the checkpoint is damaged"
            )
    return solution


def _ready(skeleton: Skeleton, value: Tensor) -> Tensor:
    """A tensor as an engine would hold it: rounded to the stored dtype, then in the compute dtype."""
    return value.to(skeleton.device).to(skeleton.stored).to(skeleton.dtype)


def head_dim(config: Any) -> int:
    """Width of one attention head of the text model."""
    text = config.get_text_config()
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
