"""A checkpoint that another package packed, brought home as an ordinary artifact in the same format.

Its packed linears are read onto their grid, renamed to the base checkpoint's own names and packed again: the weights
they stand for stay the same to the bit. 16-bit tensors that a method changed (norms that absorbed scales) come from
the package's folder in the base's dtype, all others from the base. Knows no package: a folder is read by its config.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..quantize.family import Group
from ..quantize.grid import MIDDLE, Grid, Quantized
from ..quantize.plan import linears
from ..quantize.skeleton import Skeleton, build, checkpoint_names
from ..quantize.source import Meta
from ..recipes.hub import Base
from ..recipes.progress import Step, Tell, silent
from ..recipes.recipe import Recipe
from .artifact import Artifact, check_disk, finish
from .beside import copy_small_files, write_config, write_index
from .order import Order, base_entry, expected_bytes, files_of, quantized_names, versions
from .packed_folder import Packed, open_packed
from .packing import pack_lossless
from .view import packed_shape
from .words import mend_words
from .writer import Writer


def adopt(
    folder: Path,
    recipe: Recipe,
    base: Base,
    out: Path,
    *,
    method: str,
    symmetric: bool,
    backend: Mapping[str, Any],
    calibration: Mapping[str, Any] | None,
    tell: Tell = silent,
) -> Artifact:
    """Write into `out`, which `prepare` made ready, the artifact that the checkpoint in `folder` is of `base`.

    `method` and `symmetric` are what the package was asked for, `backend` what it reports of itself and its run,
    `calibration` the manifest's entry. ValueError where the folder is not what was asked: another grid or group size,
    linears packed outside the decoder or only some of those that engines fuse, other tensors than the base's.
    """
    packed = open_packed(folder)
    skeleton = build(base.path)
    names = _their_names(skeleton, packed)
    plan = _packed_groups(skeleton, packed, names)
    grid = Grid(recipe.group_size, symmetric, skeleton.stored)
    layer_files, rest = files_of(skeleton)
    order = Order(recipe, base, out, method, packed.format, grid, plan, layer_files, rest)
    check_disk(out, expected_bytes(skeleton, order))
    _check_rest(skeleton, packed, names)
    with Writer() as writer:
        for file, inside in rest.items():
            writer.copy(out / file, [(skeleton.source.files[n], n) for n in inside])
        for index, file in enumerate(layer_files):
            writer.save(out / file, _layer(skeleton, order, packed, names, index), {})
            tell(Step("adopt", index + 1, len(layer_files)))
        hashes = writer.hashes()
    write_index(out, (*layer_files, *rest))
    write_config(skeleton, order)
    copy_small_files(base.path, out)
    mend_words(out)
    manifest = {
        "name": f"{recipe.name}-{backend['backend']}-{method}",
        "method": method,
        "format": packed.format,
        "bits": 4,
        "group_size": recipe.group_size,
        "symmetric": symmetric,
        "backend": dict(backend),
        "recipe": dataclasses.asdict(recipe),
        "base": base_entry(skeleton, order),
        "calibration": calibration,
        "quantized": sorted(quantized_names(skeleton, order)),
        "layers": [{"index": i, "errors": {}} for i in range(len(layer_files))],
        "versions": versions(),
    }
    return finish(out, hashes, manifest)


def _their_names(skeleton: Skeleton, packed: Packed) -> dict[str, str]:
    """Module parameter name -> the folder's tensor name, `<linear>.weight` where it is packed."""
    shown = {n: m for n, m in packed.source.metas.items() if packed.owner(n) is None}
    shapes = {n: packed_shape(n, packed.format, packed.source) for n in packed.linears}
    shown |= {f"{linear}.weight": Meta(shape, None, 0) for linear, shape in shapes.items()}
    names, _ = checkpoint_names(skeleton.module, dataclasses.replace(packed.source, metas=shown))
    taken = set(names.values())
    for name in shown:  # a bias that the base does not have, as some packers add
        if name not in taken and name.rpartition(".")[0] in packed.linears and packed.source.get(name).any():
            raise ValueError(f"{packed.source.folder}: {name} belongs to a linear, and the base has no such tensor")
    return names


def _packed_groups(skeleton: Skeleton, packed: Packed, names: Mapping[str, str]) -> dict[int, tuple[Group, ...]]:
    """Per decoder layer, the groups that are packed. ValueError for half a group, and for linears of no group."""
    plan: dict[int, tuple[Group, ...]] = {}
    for index, groups in linears(skeleton).items():
        chosen = []
        for group in groups:
            theirs = [_linear(names, f"{skeleton.layer_prefix(index)}{n}") for n in group.linears]
            ours = [t in packed.linears for t in theirs]
            if any(ours) and not all(ours):
                raise ValueError(f"{theirs[ours.index(False)]} is not packed, but what engines fuse it with is")
            if all(ours):
                chosen.append(group)
        plan[index] = tuple(chosen)
    wanted = {
        _linear(names, f"{skeleton.layer_prefix(i)}{n}")
        for i, groups in plan.items()
        for g in groups
        for n in g.linears
    }
    if others := packed.linears - wanted:
        raise ValueError(f"{packed.source.folder}: {min(others)} is packed, which is no linear of a decoder layer")
    return plan


def _linear(names: Mapping[str, str], module: str) -> str:
    return names[f"{module}.weight"].removesuffix(".weight")


def _check_rest(skeleton: Skeleton, packed: Packed, names: Mapping[str, str]) -> None:
    """ValueError for a tensor outside the decoder layers that is not the base's: it would be lost."""
    for ours, theirs in names.items():
        outside = not ours.startswith(skeleton.family.layers + ".")
        if outside and ours in skeleton.names and _changed(skeleton, packed, ours, theirs) is not None:
            raise ValueError(f"{packed.source.folder}: {theirs} differs from the base's, outside the decoder layers")


def _changed(skeleton: Skeleton, packed: Packed, ours: str, theirs: str) -> Tensor | None:
    """The folder's tensor in the base's dtype, or None where it is the base's own, as its dtype holds it."""
    found, base = packed.source.get(theirs), skeleton.source.get(skeleton.names[ours])
    return None if torch.equal(base.to(found.dtype), found) else found.to(base.dtype)


def _layer(skeleton: Skeleton, order: Order, packed: Packed, names: Mapping[str, str], index: int) -> dict[str, Tensor]:
    """What the file of decoder layer `index` holds, under the base's names."""
    prefix = skeleton.layer_prefix(index)
    quantized = {f"{n}.weight" for group in order.plan[index] for n in group.linears}
    tensors: dict[str, Tensor] = {}
    for inside, name in skeleton.layer_names(index).items():
        theirs = names[prefix + inside]
        if inside in quantized:
            linear = name.removesuffix(".weight")
            x = _on_grid(packed.get(theirs.removesuffix(".weight")), order.grid, theirs)
            packing = pack_lossless(x, order.format, skeleton.stored)
            tensors |= {f"{linear}.{suffix}": t for suffix, t in packing.items()}
        else:
            changed = _changed(skeleton, packed, prefix + inside, theirs)
            tensors[name] = skeleton.source.get(name) if changed is None else changed
    return tensors


def _on_grid(x: Quantized, grid: Grid, name: str) -> Quantized:
    """`x` as what was asked for. ValueError where it is not."""
    if x.group_size != grid.group_size:
        raise ValueError(f"{name} has groups of {x.group_size}, and {grid.group_size} was asked for")
    if grid.symmetric and not bool((x.zero == MIDDLE).all()):
        raise ValueError(f"{name} is not symmetric: zero points from {int(x.zero.min())} to {int(x.zero.max())}, not 8")
    return dataclasses.replace(x, symmetric=grid.symmetric)
