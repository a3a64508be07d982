"""From a recipe and a base checkpoint to a whole artifact on disk, written as the walk goes.

One file per finished decoder layer, then the untouched rest, then the small files an engine needs, then the manifest.
An interrupted run leaves finished files behind and is taken up at the next layer. Knows no algorithm and no engine.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..quantize import memory as budget
from ..quantize.family import Group
from ..quantize.grid import Grid, Quantized
from ..quantize.layer import Layer
from ..quantize.memory import Memory
from ..quantize.plan import check_groups, linears
from ..quantize.ranks import agreed, rank, world
from ..quantize.skeleton import Skeleton, build, read_config, release
from ..quantize.walk import CALIBRATED, no_lap, walk
from ..recipes.folder import headers
from ..recipes.hub import Base
from ..recipes.progress import Step, Tell, silent
from ..recipes.recipe import Recipe, model_on
from ..recipes.samples import Sample, digest
from .artifact import SCRATCH, Artifact, check_disk, finish, hash_file, open_artifact, prepare, to_json, write_json
from .config import CONFIGS, Packing, settle
from .packing import LAYOUTS
from .view import restored_tensors
from .writer import Writer

REST_SHARD = 2**30  # bytes of untouched tensors in one file
LEFT_BEHIND = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".msgpack", ".h5", ".md", ".part")
NOT_COPIED = ("config.json", "model.safetensors.index.json", "mmq.json")


@dataclass(frozen=True)
class Order:
    """A run settled in every detail: what will be written where."""

    recipe: Recipe
    base: Base
    out: Path
    method: str
    format: str
    grid: Grid
    plan: Mapping[int, tuple[Group, ...]]
    layer_files: tuple[str, ...]
    rest: Mapping[str, tuple[str, ...]]  # file -> tensor names


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
    tell: Tell = silent,
    lap: Callable[[str], None] = no_lap,
) -> Artifact:
    """Quantize `base` as `recipe` says into the folder `out`. `calibration` is the set's name, for the manifest.

    ValueError for what cannot be made as asked, OSError for files and disk, before anything is written. No more than
    `max_vram` bytes of GPU memory are taken (None: what is free); `lap(stage)` is called at the end of each stage, for
    whoever measures.
    """
    symmetric, format = settle(recipe.method, recipe.symmetric, recipe.format)
    if read_config(base.path).get("quantization_config"):
        raise ValueError(f"{base.name} is quantized already; mmq starts from a 16-bit checkpoint")
    if recipe.method in CALIBRATED and len(samples) < world():
        raise ValueError(f"{len(samples)} samples for {world()} processes: each needs at least one")
    skeleton = build(base.path, device=device)
    plan = linears(skeleton, recipe.keep)
    grid = Grid(recipe.group_size, symmetric, skeleton.stored)
    if recipe.method != "bnb":
        check_groups(skeleton, plan, recipe.group_size)
    layer_files, rest = files_of(skeleton)
    order = Order(recipe, base, out, recipe.method, format, grid, plan, layer_files, rest)
    lap("skeleton")
    marks = {
        "recipe": dataclasses.asdict(recipe),
        "base": {"config": hash_file(base.path / "config.json"), "revision": base.revision, "tensors": _mark(skeleton)},
        "calibration": digest(samples) if recipe.method in CALIBRATED else None,
        "device": skeleton.device.type,
        "versions": {name: v for name, v in versions().items() if name != "python"},
    }
    marks = json.loads(json.dumps(marks))  # as it will read back
    needed = expected_bytes(skeleton, order)
    memory = Memory()
    if recipe.method in CALIBRATED:
        memory = _settle_memory(skeleton, order, samples, needed, max_vram, tell)
    if rank() == 0:
        there = sum(p.stat().st_size for p in out.glob("*.safetensors"))  # made already, or about to be replaced
        check_disk(out, needed - there)
        prepare(out, marks, overwrite=overwrite)
    agreed(None)  # nobody looks into the folder before it is prepared
    lap("marks")
    with Writer() as writer:
        if rank() == 0:
            for file, names in rest.items():
                if _whole(out / file):
                    writer.hash(out / file)
                else:
                    writer.copy(out / file, [(skeleton.source.files[n], n) for n in names])
            for index in sorted(_done(order)):
                writer.hash(out / layer_files[index])
        _write_layers(skeleton, order, samples, writer, memory, tell, lap)
        tell(Step("copy", 0, 1))
        hashes = writer.hashes()
        tell(Step("copy", 1, 1))
    lap("wait for the files")
    if rank() > 0:
        agreed(None)
        return open_artifact(out)
    notes = [_read_note(out, i) for i in range(len(layer_files))]
    tokens = notes[0]["tokens"]
    write_index(order)
    write_config(skeleton, order)
    copy_small_files(base.path, out)
    made = finish(
        out,
        hashes,
        {
            "name": f"{recipe.name}-{recipe.method}",
            "method": recipe.method,
            "format": format,
            "bits": 4,
            "group_size": 64 if recipe.method == "bnb" else recipe.group_size,
            "symmetric": symmetric,
            "quality": recipe.quality,
            "recipe": dataclasses.asdict(recipe),
            "base": {
                "model": address(recipe, base),
                "hub": base.hub,
                "revision": base.revision,
                "weight_bytes": sum(m.nbytes for m in skeleton.source.metas.values()),
            },
            "calibration": None if tokens is None else {"name": calibration, "digest": marks["calibration"], **tokens},
            "quantized": sorted(quantized_names(skeleton, order)),
            "layers": [{k: v for k, v in n.items() if k != "tokens"} for n in notes],
            "versions": versions(),
        },
    )
    agreed(None)  # the other ranks may open it now
    lap("manifest")
    return made


def _settle_memory(
    skeleton: Skeleton, order: Order, samples: Sequence[Sample], disk: int, max_vram: int | None, tell: Tell
) -> Memory:
    """What the walk may take, told before it starts. ValueError when the model does not go into what there is."""
    method, quality = order.recipe.method, order.recipe.quality
    work = budget.workload(skeleton, order.plan, samples)
    device = skeleton.device
    seconds = work.layers * budget.flops(work, method, quality) / (budget.EFFICIENCY * budget.speed(device))
    told = [f"layers about {seconds:.0f} s"]
    memory = Memory()
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        limit = min(max_vram or free, free)
        memory = budget.within(work, method, quality, limit)
        told.append(f"GPU {budget.gpu_bytes(work, method, quality, memory) / 2**30:.1f} of {limit / 2**30:.1f} GiB")
        if max_vram:
            torch.cuda.set_per_process_memory_fraction(max(limit - budget.CONTEXT, 1) / total, device)
    told += [f"host {budget.host_bytes(work, memory) / 2**30:.1f} GiB", f"disk {disk / 2**30:.2f} GiB"]
    if memory != Memory():
        told.append(str(memory))
    tell(Step("estimate", 1, 1, ", ".join(told)))
    return memory


def _write_layers(
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
                done=agreed(_done(order)),
                finished=lambda index: _finished(skeleton, order, index),
                micro_batch=memory.micro_batch,
                park=memory.park,
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
        memory = smaller  # outside the handler, whose traceback holds every tensor of the failed attempt
        writer.hashes()
        release(skeleton, skeleton.names)
        gc.collect()
        torch.cuda.empty_cache()
        tell(Step("memory", 1, 1, f"the GPU's memory is full: {memory}"))


def _done(order: Order) -> set[int]:
    """The layers whose files are there, whole and with their notes."""
    return {i for i, f in enumerate(order.layer_files) if _whole(order.out / f) and _read_note(order.out, i)}


def _whole(path: Path) -> bool:
    """Whether `path` is a safetensors file that was not cut short (by a machine that stopped, say)."""
    try:
        headers(path)
    except OSError:
        return False
    return True


def address(recipe: Recipe, base: Base) -> str:
    """What `fetch` finds the base by again."""
    return (
        str(base.path) if base.hub == "local" else base.name if base.hub == "embedded" else model_on(recipe, base.hub)
    )


def versions() -> dict[str, str]:
    """The versions that made an artifact, of what is installed."""
    found = {"mmq": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "safetensors", "bitsandbytes"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def files_of(skeleton: Skeleton) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """Names of the layer files, and of the files for everything else with the tensors each holds."""
    count = len(skeleton.layers)
    inside = {c for i in range(count) for c in skeleton.layer_names(i).values()}
    shards: list[list[str]] = [[]]
    size = 0
    for name, meta in skeleton.source.metas.items():
        if name in inside:
            continue
        if shards[-1] and size + meta.nbytes > REST_SHARD:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += meta.nbytes
    total = count + len(shards)
    files = [f"model-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total)]
    return tuple(files[:count]), {f: tuple(names) for f, names in zip(files[count:], shards, strict=True)}


def _mark(skeleton: Skeleton) -> dict[str, str]:
    """A cheap mark of the base's tensors by file, so that a run is not taken up against other weights."""
    stats = {p.name: p.stat() for p in sorted(skeleton.source.folder.glob("*.safetensors"))}
    return {name: f"{s.st_size} bytes, changed {s.st_mtime_ns / 1e9:.6f}" for name, s in stats.items()}


def quantized_names(skeleton: Skeleton, order: Order) -> Iterator[str]:
    """Checkpoint names, without `.weight`, of every linear that is quantized."""
    for index, groups in order.plan.items():
        names = skeleton.layer_names(index)
        for group in groups:
            for linear in group.linears:
                yield names[f"{linear}.weight"].removesuffix(".weight")


def expected_bytes(skeleton: Skeleton, order: Order) -> int:
    """About how much the artifact will take: 4 bits and a scale for what is quantized, the rest as it is."""
    packed = {f"{n}.weight" for n in quantized_names(skeleton, order)}
    total = 0
    for name, meta in skeleton.source.metas.items():
        total += int(meta.nbytes / 4 * 1.15) if name in packed else meta.nbytes
    return total + 16 * 2**20


def _finished(skeleton: Skeleton, order: Order, index: int) -> dict[str, Tensor]:
    stored = restored_tensors(order.out / order.layer_files[index], order.format)
    return {inside: stored[name] for inside, name in skeleton.layer_names(index).items() if name in stored}


def _layer_tensors(skeleton: Skeleton, order: Order, layer: Layer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a layer's file holds, and the note that waits beside it for the manifest."""
    assert layer.solution is not None
    tensors: dict[str, Tensor] = {}
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
    return tensors, {
        "index": layer.index,
        "errors": {n: float(f"{e:.6g}") for n, e in layer.solution.errors.items()},
        "fallbacks": dict(layer.solution.fallbacks),
        "left_out": layer.left_out,
        "tokens": None if layer.tokens is None else dataclasses.asdict(layer.tokens),
    }


def _note(out: Path, index: int) -> Path:
    """Where a layer's errors wait for the manifest. Not in the shard's own metadata: its order there is random."""
    return out / f"{SCRATCH}layer-{index}.json"


def _read_note(out: Path, index: int) -> dict[str, Any]:
    """What waits beside a finished layer; empty when it is missing or damaged."""
    try:
        note = json.loads(_note(out, index).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) and note.keys() >= {"index", "errors", "tokens"} else {}


def write_index(order: Order) -> None:
    where: dict[str, str] = {}
    total = 0
    for file in (*order.layer_files, *order.rest):
        where |= dict.fromkeys((n for n in headers(order.out / file) if n != "__metadata__"), file)
        total += (order.out / file).stat().st_size
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    write_json(order.out / "model.safetensors.index.json", index)


def write_config(skeleton: Skeleton, order: Order) -> None:
    """The base's config.json as it stands, and the quantization it now has."""
    quantized = set(quantized_names(skeleton, order))
    spelled = {n.removesuffix(".weight"): c.removesuffix(".weight") for n, c in skeleton.names.items()}
    skipped = []
    for name, module in skeleton.module.named_modules():
        if isinstance(module, nn.Linear) and spelled.get(name) not in quantized:
            skipped += [name, spelled.get(name, name)]
    dtype = str(skeleton.stored).removeprefix("torch.")
    packing = Packing(
        order.format, order.grid.group_size, order.grid.symmetric, skeleton.family.skip, tuple(skipped), dtype
    )
    config = read_config(order.base.path)
    config["quantization_config"] = CONFIGS[order.format](packing)
    write_json(order.out / "config.json", config)


def copy_small_files(base: Path, out: Path) -> None:
    """Everything beside the weights: processors, tokenizer, chat template, generation config, the model's own code.

    Not what is hidden: of the hub, of git, or of the user (a .env with a token).
    """
    for path in sorted(base.iterdir()):
        hidden = path.name.startswith(".")
        if path.is_file() and not hidden and path.name not in NOT_COPIED and path.suffix not in LEFT_BEHIND:
            shutil.copyfile(path, out / path.name)
