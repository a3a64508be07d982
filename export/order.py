"""An order: a run settled in every detail, and what of it follows by arithmetic: files, names, bytes.

Knows no algorithm, and writes nothing.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .. import __version__
from ..quantize.family import Group
from ..quantize.grid import Grid
from ..quantize.head import Head
from ..quantize.routing import apart
from ..quantize.skeleton import Skeleton
from ..recipes.hub import Base
from ..recipes.recipe import Recipe, model_on

REST_SHARD = 2**30  # bytes of untouched tensors in one file
PACKED = 1.15  # with scales and zero points, of what the codes take


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
    head: Head | None = None  # where it is quantized too: the last of the layer files is its own


def files_of(skeleton: Skeleton, head: Head | None = None) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """Names of the layer files (one more for a `head` to be quantized), and of the files for everything else with the
    tensors each holds."""
    count = len(skeleton.layers)
    inside = {p for i in range(count) for c in skeleton.layer_names(i).values() for p in skeleton.source.parts(c)}
    if head:
        count += 1
        inside.add(f"{head.stored}.weight")  # where it is the embeddings' weight too, that one stays
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


def check_experts(skeleton: Skeleton, plan: Mapping[int, tuple[Group, ...]], format: str) -> None:
    """ValueError where a mixture's experts stay in 16 bit and the format cannot say so: of GPTQ's settings vLLM asks
    `dynamic` alone, which other engines do not read."""
    for index, groups in plan.items():
        _, every = apart(skeleton.layers[index], skeleton.family.groups[index])
        if every and format in ("gptq", "bnb") and not set(every) & set(groups):
            raise ValueError(
                f"format {format} cannot say that the experts of layer {index} stay in 16 bit; keep something else, or "
                "use awq or compressed-tensors"
            )


def check_floats(skeleton: Skeleton, order: Order) -> None:
    """ValueError where a weight to be quantized is stored as integers or in 8 bits: without the scales that go with
    them these are other numbers."""
    source = skeleton.source
    for name in (f"{linear}.weight" for linear in quantized_names(skeleton, order)):
        if (name in source.metas or name in source.derived) and source.meta(name).dtype is None:
            raise ValueError(
                f"{order.base.name}: {name} is stored in fewer than 16 bits or as integers; mmq starts from a 16-bit "
                "checkpoint"
            )


def quantized_names(skeleton: Skeleton, order: Order) -> Iterator[str]:
    """Checkpoint names, without `.weight`, of every linear that is quantized."""
    for index, groups in order.plan.items():
        names = skeleton.layer_names(index)
        for group in groups:
            for linear in group.linears:
                yield names[f"{linear}.weight"].removesuffix(".weight")
    if order.head:
        yield order.head.stored


def expected_bytes(skeleton: Skeleton, order: Order) -> int:
    """About how much the artifact will take: 4 bits and a scale for what is quantized, the rest as it is."""
    source, head = skeleton.source, order.head
    names = [f"{name}.weight" for name in quantized_names(skeleton, order)]
    packed = sum(source.meta(name).nbytes for name in names if name in source.metas or name in source.derived)
    untied = 2 * head.rows * head.width if head and f"{head.stored}.weight" not in source.metas else 0
    left = sum(m.nbytes for m in source.metas.values()) - packed
    return left + int((packed + untied) / 4 * PACKED) + 16 * 2**20


def address(recipe: Recipe, base: Base) -> str:
    """What `fetch` finds the base by again."""
    return (
        str(base.path) if base.hub == "local" else base.name if base.hub == "embedded" else model_on(recipe, base.hub)
    )


def base_entry(skeleton: Skeleton, order: Order) -> dict[str, Any]:
    """The manifest's `base`."""
    return {
        "model": address(order.recipe, order.base),
        "hub": order.base.hub,
        "revision": order.base.revision,
        "weight_bytes": sum(m.nbytes for m in skeleton.source.metas.values()),
    }


def versions() -> dict[str, str]:
    """The versions that made an artifact, of what is installed."""
    found = {"mmq": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "safetensors", "bitsandbytes"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
