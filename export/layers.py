"""Finished layers become files as the walk goes, and files of an earlier run count as finished layers.

A layer's tensors are packed and handed to the writer, with a note of its errors beside them for the manifest. Out of
GPU memory, the walk goes on from the last finished layer with less. Knows no algorithm and no engine.
"""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..quantize.grid import Quantized
from ..quantize.layer import Layer
from ..quantize.memory import Memory
from ..quantize.ranks import agreed, rank, world
from ..quantize.routing import Routed
from ..quantize.skeleton import Skeleton, release
from ..quantize.walk import walk
from ..recipes.folder import headers
from ..recipes.progress import Step, Tell
from ..recipes.samples import Sample
from .artifact import SCRATCH, to_json
from .marks import keep_pace, pace
from .order import Order
from .packing import LAYOUTS, pack_blocks
from .view import restored_tensors
from .writer import Writer


def write_layers(
    skeleton: Skeleton, order: Order, samples: Sequence[Sample], writer: Writer, memory: Memory, tell: Tell,
    lap: Callable[[str], None],
) -> None:  # fmt: skip
    """Walk, and hand each layer to the writer. Out of GPU memory, go on from the last finished layer with smaller
    micro-batches, in the end with activations on the host; RuntimeError when nothing helps."""
    while True:
        try:
            for layer in walk(
                skeleton,
                samples,
                method=order.recipe.method,
                quality=order.recipe.quality,
                grid=order.grid,
                plan=order.plan,
                head=order.head,
                done=agreed(done_layers(order)),
                finished=lambda index: _finished(skeleton, order, index),
                micro_batch=memory.micro_batch,
                park=memory.park,
                held=memory.held,
                tell=tell,
                lap=lap,
            ):
                if layer.solution is not None and rank() == 0:
                    tensors, note = _layer_tensors(skeleton, order, layer)
                    writer.save(
                        order.out / order.layer_files[layer.index],
                        tensors,
                        {_note(order.out, layer.index): to_json(note)},
                    )
                    del tensors
                del layer  # its codes are as large as half a layer, and the next one is about to be made
            return
        except torch.OutOfMemoryError:
            smaller = memory.smaller()
            if smaller is None or world() > 1:
                raise
        keep_pace(order.out, pace(smaller))
        memory = smaller  # outside the handler, whose traceback holds every tensor of the failed attempt
        writer.hashes()
        release(skeleton, skeleton.names)
        gc.collect()
        torch.cuda.empty_cache()
        tell(Step("memory", 1, 1, f"the GPU's memory is full: {memory}"))


def _layer_tensors(skeleton: Skeleton, order: Order, layer: Layer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a layer's file holds, and the note that waits beside it for the manifest."""
    assert layer.solution is not None
    tensors: dict[str, Tensor] = {}
    if order.head and layer.index == len(skeleton.layers):
        q = layer.solution.quantized[order.head.name]
        assert isinstance(q, Quantized)
        packed = pack_blocks(q, LAYOUTS[order.format], skeleton.stored, device=skeleton.device)
        return {f"{order.head.stored}.{suffix}": t for suffix, t in packed.items()}, _told(layer)
    for inside, name in skeleton.layer_names(layer.index).items():
        linear = inside.removesuffix(".weight")
        if inside.endswith(".weight") and linear in layer.solution.quantized:
            q = layer.solution.quantized[linear]
            if isinstance(q, Quantized):
                packed = LAYOUTS[order.format].pack(q, skeleton.stored)
                tensors |= {f"{name.removesuffix('.weight')}.{suffix}": t for suffix, t in packed.items()}
            else:
                tensors |= {f"{name}.{suffix}".rstrip("."): t for suffix, t in q.tensors.items()}
        elif inside in layer.solution.changed:
            tensors[name] = layer.solution.changed[inside].to(skeleton.source.get(name).dtype)
        else:
            tensors[name] = skeleton.source.get(name)
    return tensors, _told(layer)


def _told(layer: Layer) -> dict[str, Any]:
    """A layer's note."""
    assert layer.solution is not None
    return {
        "index": layer.index,
        "errors": {n: float(f"{e:.6g}") for n, e in layer.solution.errors.items()},
        "fallbacks": dict(layer.solution.fallbacks),
        "left_out": layer.left_out,
        **({"experts": [_experts(seen) for seen in layer.mixtures]} if layer.mixtures else {}),
        "tokens": None if layer.tokens is None else dataclasses.asdict(layer.tokens),
    }


def _experts(seen: Routed) -> dict[str, Any]:
    """What the manifest says of a mixture: tokens by expert, and the experts that were given all tokens of the layer
    besides, those that got fewer than `floor`."""
    return {
        "at": seen.path,
        "text": list(seen.text),
        "media": list(seen.media),
        "floor": seen.floor,
        "all_tokens": list(seen.few),
        "unseen": list(seen.unseen),
    }


def _finished(skeleton: Skeleton, order: Order, index: int) -> dict[str, Tensor]:
    stored = restored_tensors(order.out / order.layer_files[index], order.format)
    return {inside: stored[name] for inside, name in skeleton.layer_names(index).items() if name in stored}


def done_layers(order: Order) -> set[int]:
    """The layers whose files are there, whole and with their notes."""
    return {i for i, f in enumerate(order.layer_files) if is_whole(order.out / f) and read_note(order.out, i)}


def is_whole(path: Path) -> bool:
    """Whether `path` is a safetensors file that was not cut short (by a machine that stopped, say)."""
    try:
        headers(path)
    except OSError:
        return False
    return True


def _note(out: Path, index: int) -> Path:
    """Where a layer's errors wait for the manifest. Not in the shard's own metadata: its order there is random."""
    return out / f"{SCRATCH}layer-{index}.json"


def read_note(out: Path, index: int) -> dict[str, Any]:
    """What waits beside a finished layer; empty when it is missing or damaged."""
    try:
        note = json.loads(_note(out, index).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) and note.keys() >= {"index", "errors", "tokens"} else {}
