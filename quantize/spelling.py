"""What a model's modules are called in its checkpoint, and which of them an engine must leave in 16 bit.

Knows names and shapes only, no tensor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from .skeleton import Skeleton


def skips(skeleton: Skeleton) -> tuple[str, ...]:
    """The substrings by which engines know the modules that hold no quantized linear, in the model's and in the
    checkpoint's spelling, each as high up as it goes: `visual.` for a vision tower, `lm_head`."""
    packed = set()
    for index, groups in enumerate(skeleton.family.groups):
        packed |= {skeleton.layer_prefix(index) + n for group in groups for n in group.linears}
    mine = {n for n, m in skeleton.module.named_modules() if isinstance(m, nn.Linear)}
    inside = f"{skeleton.family.layers}."
    rest = {n for n in mine - packed if not n.startswith(inside)}
    spelled = dict.fromkeys(n for name in sorted(rest) for n in spellings(skeleton, name))
    spelled |= dict.fromkeys(sorted(idle_linears(skeleton)))
    taken = packed | {n for name in packed for n in spellings(skeleton, name)}
    found: dict[str, None] = {}
    for name in spelled:
        parts = name.split(".")
        top = next(
            i for i in range(1, len(parts) + 1) if not any(t.startswith(".".join(parts[:i]) + ".") for t in taken)
        )
        path = ".".join(parts[:top]) + ("." if top < len(parts) else "")
        for short in (path.removeprefix("model."), path):
            if short.strip(".") and not any(short in f"{t}." for t in taken):
                found[short] = None
    return tuple(found)


def unread(skeleton: Skeleton) -> list[str]:
    """The stored tensors that no part of the model is read from: they are copied as they are."""
    used = {part for name in skeleton.names.values() for part in skeleton.source.parts(name)}
    return [name for name in skeleton.source.metas if name not in used]


def idle_linears(skeleton: Skeleton) -> list[str]:
    """Modules of the checkpoint, by the look of their tensors linears, that no part of the model is read from."""
    metas = skeleton.source.metas
    return [n.removesuffix(".weight") for n in unread(skeleton) if n.endswith(".weight") and len(metas[n].shape) == 2]


def check_layers(skeleton: Skeleton) -> None:
    """ValueError where a decoder layer's tensors hold more than the layer knows: it would not be the same model."""
    idle = [n for n in unread(skeleton) if n.endswith((".weight", ".bias"))]
    for index in range(len(skeleton.layers)):
        stored, dot, _ = next(iter(skeleton.layer_names(index).values())).partition(f".{index}.")
        own = [n for n in idle if dot and n.startswith(stored + dot)]
        if own:
            raise ValueError(
                f"{skeleton.source.folder}: {own[0]} is in decoder layer {index}, where "
                f"{type(skeleton.module).__name__} has no place for it: another model than its config.json says"
            )


def spellings(skeleton: Skeleton, module: str) -> tuple[str, ...]:
    """A module's name, and the checkpoint's names for it: those of the tensors that its weight is read from."""
    stored = skeleton.names.get(f"{module}.weight")
    parts = () if stored is None else skeleton.source.parts(stored)
    return tuple(dict.fromkeys((module, *(p.removesuffix(".weight") for p in parts))))
