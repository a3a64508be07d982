"""From a recipe and a base checkpoint to a whole artifact on disk, written as the walk goes.

One file per finished decoder layer, then the untouched rest, then the small files an engine needs, then the manifest.
An interrupted run leaves finished files behind and is taken up at the next layer. Knows no algorithm and no engine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..quantize import memory as budget
from ..quantize.grid import Grid
from ..quantize.head import head_of
from ..quantize.inputs import suited
from ..quantize.memory import Memory
from ..quantize.plan import check_groups, linears
from ..quantize.ranks import agreed, rank, world
from ..quantize.skeleton import Skeleton, build, read_config, template_notes
from ..quantize.walk import CALIBRATED, no_lap
from ..recipes.hub import Base
from ..recipes.progress import Step, Tell, silent
from ..recipes.recipe import Recipe, check_pinned
from ..recipes.samples import Sample, digest
from .artifact import Artifact, check_disk, check_elsewhere, finish, open_artifact, prepare, unfinished
from .beside import copy_small_files, write_config, write_index
from .config import check_head, settle
from .key import base_mark, key_of
from .layers import done_layers, is_whole, read_note, write_layers
from .marks import Pace, keep_pace, marks, pace, paces
from .order import (
    Order,
    address,
    base_entry,
    check_experts,
    check_floats,
    expected_bytes,
    files_of,
    quantized_names,
    versions,
)
from .subject import text_config
from .words import mend_words
from .writer import Writer


def make(
    recipe: Recipe,
    base: Base,
    out: Path,
    *,
    samples: Sequence[Sample],
    calibration: str,
    device: str = "cpu",
    max_vram: int | None = None,
    overwrite: bool = False,
    renew: bool = False,
    tell: Tell = silent,
    lap: Callable[[str], None] = no_lap,
) -> Artifact:
    """Quantize `base` as `recipe` says into the folder `out`. `calibration` is the set's name, for the manifest.

    ValueError for what cannot be made as asked, OSError for files and disk, before anything is written. No more than
    `max_vram` bytes of GPU memory are taken (None: what is free); `lap(stage)` is called at the end of each stage, for
    whoever measures. `overwrite` replaces what is in `out`; so does `renew`, but for an unfinished run of the same.
    """
    symmetric, format = settle(recipe.method, recipe.symmetric, recipe.format)
    check_elsewhere(out, base.path)
    config = read_config(base.path)
    if recipe.family and config.get("model_type") != recipe.family:
        raise ValueError(
            f"{base.name} is of family {config.get('model_type')}, its recipe says {recipe.family}; name the model "
            "that the recipe means, or mend the recipe"
        )
    if config.get("quantization_config") or text_config(config).get("quantization_config"):
        raise ValueError(
            f"{base.name} is quantized already, and mmq starts from 16 bit: name the model that it was made from (`mmq "
            "convert` puts int4 weights as they are into another format)"
        )
    if recipe.method in CALIBRATED and len(samples) < world():
        raise ValueError(f"{len(samples)} samples for {world()} processes: each needs at least one")
    check_pinned(recipe, local=base.hub in ("local", "embedded"))
    skeleton = build(base.path, device=device, trust=recipe.trust_remote_code)
    key = key_of(recipe, base_mark(base, address(recipe, base)), digest(samples) if samples else None)
    samples = suited(skeleton, samples)
    plan = linears(skeleton, recipe.keep)
    grid = Grid(recipe.group_size, symmetric, skeleton.stored)
    if recipe.method != "bnb":
        check_groups(skeleton, plan, recipe.group_size)
    check_experts(skeleton, plan, format)
    head = head_of(skeleton, grid) if recipe.head == "int4" else None
    if head:
        check_head(format, symmetric, head.rows, skeleton.module.config.get_text_config().model_type)
    layer_files, rest = files_of(skeleton, head)
    order = Order(recipe, base, out, recipe.method, format, grid, plan, layer_files, rest, head)
    check_floats(skeleton, order)
    lap("skeleton")
    mine = marks(recipe, base, skeleton, samples)
    needed = expected_bytes(skeleton, order)
    memory = Memory()
    overwrite = overwrite or (renew and not unfinished(out, mine))
    begun = agreed(() if overwrite else paces(out))
    if recipe.method in CALIBRATED:
        memory = _settle_memory(skeleton, order, samples, needed, max_vram, begun, tell)
    if rank() == 0:
        there = sum(p.stat().st_size for p in out.glob("*.safetensors"))  # made already, or about to be replaced
        check_disk(out, needed - there)
        taken_up = prepare(out, mine, overwrite=overwrite)
        if taken_up and begun and begun[-1] != pace(memory):
            tell(Step("resume", 1, 1, f"begun with {begun[-1]}; now {pace(memory)}: the same only within rounding"))
        if recipe.method in CALIBRATED:
            keep_pace(out, pace(memory))
    agreed(None)  # nobody looks into the folder before it is prepared
    lap("marks")
    with Writer() as writer:
        if rank() == 0:
            for file, names in rest.items():
                if is_whole(out / file):
                    writer.hash(out / file)
                else:
                    writer.copy(out / file, [(skeleton.source.files[n], n) for n in names])
            for index in sorted(done_layers(order)):
                writer.hash(out / layer_files[index])
        write_layers(skeleton, order, samples, writer, memory, tell, lap)
        tell(Step("copy", 0, 1))
        hashes = writer.hashes()
        tell(Step("copy", 1, 1))
    lap("wait for the files")
    if rank() > 0:
        agreed(None)
        return open_artifact(out)
    notes = [read_note(out, i) for i in range(len(layer_files))]
    tokens = notes[0]["tokens"]
    notes = [{k: v for k, v in n.items() if k != "tokens"} for n in notes]
    write_index(out, (*layer_files, *rest))
    write_config(skeleton, order)
    beside = [*copy_small_files(base.path, out), *mend_words(out)]
    of_samples = template_notes(base.path, skeleton)
    made = finish(
        out,
        hashes,
        {
            "name": f"{recipe.name}-{recipe.method}",
            "key": key,
            "method": recipe.method,
            "format": format,
            "bits": 4,
            "group_size": 64 if recipe.method == "bnb" else recipe.group_size,
            "symmetric": symmetric,
            "quality": recipe.quality,
            "recipe": dataclasses.asdict(recipe),
            "base": base_entry(skeleton, order),
            "calibration": None if tokens is None else {"name": calibration, "digest": mine["calibration"], **tokens},
            "quantized": sorted(quantized_names(skeleton, order)),
            "layers": notes[: len(skeleton.layers)],
            "head": notes[-1] | {"name": head.stored, "untied": head.tied} if head else None,
            "notes": [*(n for n in skeleton.notes if samples or n not in of_samples), *beside],
            "paces": [dataclasses.asdict(p) for p in paces(out)],  # more than one: the bytes are so within rounding
            "versions": versions(),
        },
    )
    agreed(None)  # the other ranks may open it now
    lap("manifest")
    return made


def _settle_memory(
    skeleton: Skeleton, order: Order, samples: Sequence[Sample], disk: int, max_vram: int | None,
    begun: Sequence[Pace], tell: Tell,
) -> Memory:  # fmt: skip
    """What the walk may take, told before it starts: what it took when it was `begun`, where that fits. ValueError when
    the model does not go into what there is."""
    method, quality = order.recipe.method, order.recipe.quality
    work = budget.workload(skeleton, order.plan, samples, head=order.head.rows if order.head else 0)
    device = skeleton.device
    work_done = work.layers * budget.flops(work, method, quality) + budget.head_flops(work, method, quality)
    seconds = work_done / (budget.EFFICIENCY * budget.speed(device))
    told = [f"layers{' and head' if work.head else ''} about {seconds:.0f} s"]
    memory = begun[-1].memory if begun else Memory()
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        limit = min(max_vram or free, free)
        memory = budget.within(work, method, quality, limit, first=memory)
        told.append(f"GPU {budget.gpu_bytes(work, method, quality, memory) / 2**30:.1f} of {limit / 2**30:.1f} GiB")
        if max_vram:
            torch.cuda.set_per_process_memory_fraction(max(limit - budget.CONTEXT, 1) / total, device)
    told += [f"host {budget.host_bytes(work, memory) / 2**30:.1f} GiB", f"disk {disk / 2**30:.2f} GiB"]
    if memory != Memory():
        told.append(str(memory))
    tell(Step("estimate", 1, 1, ", ".join(told)))
    return memory
