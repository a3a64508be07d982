"""The walk: decoder layer by decoder layer, from the safetensors files to quantized weights, one layer in memory.

Each layer is loaded, fed with what the quantized layers before it produce, quantized, and run again as an engine will
run it, so that later layers see the error of earlier ones. Knows no file format: it yields layers, and is told
through `finished` which of them an interrupted run has already made.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..recipes.progress import Step, Tell, silent
from ..recipes.samples import Sample
from .bnb import bnb
from .device import tensor_cores
from .family import Group
from .fused import fused
from .grid import Grid
from .head import Head, Listener, after_layers, quantize_head
from .inputs import media_mask, micro_batches
from .layer import How, Layer, Tokens, quantize_layer, ready, sound
from .lockstep import Call, Lockstep, Stop
from .memory import MICRO_BATCH
from .method import Problem
from .pull import place
from .ranks import own, total
from .routing import HELD
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
from .steps import STEPS

CALIBRATED = ("awq", "gptq", "rtn")  # rtn needs no inputs, but is measured on them


def no_lap(name: str) -> None:
    """Nobody measures: see `walk`."""


def walk(
    skeleton: Skeleton,
    samples: Sequence[Sample],
    *,
    method: str,
    quality: str,
    grid: Grid,
    plan: Mapping[int, tuple[Group, ...]],
    head: Head | None = None,
    done: Collection[int] = (),
    finished: Callable[[int], Mapping[str, Tensor]] | None = None,
    micro_batch: int = MICRO_BATCH,
    park: bool = False,
    held: int = HELD,
    tell: Tell = silent,
    lap: Callable[[str], None] = no_lap,
) -> Iterator[Layer]:
    """Quantize every decoder layer in turn, then the output `head` where there is one (as if it were one layer more),
    yielding each as soon as it is done.

    `done` are the layers that are already on disk, and `finished(i)` gives the 16-bit view of such a layer i (parameter
    name inside the layer -> tensor): it is run as it is, so the layers after it come out the same as without the
    interruption; the walk ends with the last layer that is not `done`. A forward pass takes about `micro_batch` tokens;
    with `park` what is between layers waits on the host; experts' Gram matrices take at most `held` bytes at a time.
    Under several ranks (ranks.py) each takes its share of the samples and of the rows. `lap(stage)` is called at the
    end of each stage, for whoever measures.
    """
    if method == "bnb":
        yield from _walk_uncalibrated(skeleton, grid=grid, plan=plan, done=done, tell=tell)
        return
    count = len(skeleton.layers)
    last = max((i for i in range(count + (head is not None)) if i not in done), default=None)
    if last is None:
        return
    listener = Listener(skeleton, head) if head and last == count else None
    counted = [0, 0, 0]
    both = STEPS[method, quality].pull  # every micro-batch twice: as the quantized model runs it, and as the 16-bit one
    with torch.no_grad(), tensor_cores():  # they weigh errors against each other
        warming = _warm(skeleton, plan, grid)
        read_ahead(skeleton, 0)
        load(skeleton, embeddings(skeleton))
        base = skeleton.module.base_model
        pictures: list[Tensor] = []  # by call, bool [tokens]: which of them stand for pictures

        def calls() -> Iterator[Callable[[], Any]]:
            for inputs in micro_batches(skeleton, own(samples), tokens=micro_batch):
                ids = inputs["input_ids"]
                mask = media_mask(skeleton, ids).flatten()
                media = int(mask.sum())
                for number, more in enumerate((len(ids), ids.numel() - media, media)):
                    counted[number] += more
                for stream in range(1 + both):
                    pictures.append(mask)
                    yield partial(_run, base, inputs, None if stream else listener)
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
                solution, left_out, mixtures = None, 0, ()
                if stop.index in done:
                    assert finished is not None
                    for name, value in finished(stop.index).items():
                        set_parameter(stop.layer, name, ready(skeleton, value))
                else:
                    how = How(grid, STEPS[method, quality], sum(counted[1:]), lap, pictures, held)
                    solution, left_out, mixtures = quantize_layer(skeleton, stop, plan[stop.index], how)
                layer = Layer(stop.index, solution, Tokens(*counted), left_out, mixtures)
                note = _note(layer)
                yield layer
                del layer, solution
                lap("pack")
                if stop.index < last:
                    now = dict(stop.layer.named_parameters()) if both else {}
                    if stop.index == count - 1:
                        load(skeleton, after_layers(skeleton))
                    stop.advance(partial(_as_its_stream, stop, now, original))
                    place(stop.layer, now)
                    lap("forward, quantized")
                else:
                    stop.calls.clear()  # nobody reads what comes out of it
                release_layer(skeleton, stop.index)
                tell(Step("layer", stop.index + 1, count, note))
        if head and listener:
            release(skeleton, after_layers(skeleton))
            gram, left_out = listener.mean()
            solution = quantize_head(
                skeleton, head, gram, grid, (method, quality), sum(counted[1:]), partial(_tell_rows, tell, head)
            )
            lap("head")
            yield Layer(count, solution, Tokens(*counted), left_out)


def _run(base: Any, inputs: Mapping[str, Tensor], listener: Listener | None) -> None:
    """One forward pass of all but the head. What comes out is of use to nobody but the `listener`."""
    output = base(**inputs, use_cache=False)
    if listener:
        listener.hear(inputs["input_ids"], output)


def _tell_rows(tell: Tell, head: Head, rows: int) -> None:
    tell(Step("head", rows, head.rows))


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
    widths = [skeleton.source.meta(n).shape[1] for n in names]
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
        result = Layer(index, sound(bnb(Problem(weights, plan[index], {}), grid), index), None)
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
    few, unseen = (sum(len(getattr(seen, kind)) for seen in layer.mixtures) for kind in ("few", "unseen"))
    told += [f"{few} experts given all tokens"] if few else []
    told += [f"{unseen} of them unseen"] if unseen else []
    return "; ".join(told)
