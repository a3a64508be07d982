"""Which linears of a model are quantized: the family's groups, less what the user keeps in 16 bit.

Knows shapes and names only, no tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .family import Group
from .grid import check_width
from .routing import apart
from .skeleton import Skeleton


def linears(skeleton: Skeleton, keep: Sequence[str] = ()) -> dict[int, tuple[Group, ...]]:
    """Per decoder layer, the groups to quantize: the family's, less what starts with an entry of `keep`.

    An entry is a prefix of a module's or a checkpoint's name, whole words only
    (`layers.1` is not `layers.10`). Engines fuse the linears of a group, so a group is
    quantized whole or not at all, and so are all experts of a mixture: ValueError when `keep` splits one, matches
    nothing, or leaves nothing.
    """
    used: set[str] = set()
    found = {}
    for index in range(len(skeleton.layers)):
        prefix = skeleton.layer_prefix(index)
        chosen = []
        for group in skeleton.family.groups[index]:
            kept = []
            for name in group.linears:
                full = f"{prefix}{name}"
                spellings = (full, name, skeleton.names[f"{full}.weight"].removesuffix(".weight"))
                hits = [k for k in keep if any(_begins(s, k) for s in spellings)]
                used.update(hits)
                kept.append(bool(hits))
            if any(kept) and not all(kept):
                raise ValueError(
                    f"keep splits {', '.join(group.linears)} of layer {index}; engines fuse them: keep all"
                )
            if not any(kept):
                chosen.append(group)
        _, experts = apart(skeleton.layers[index], skeleton.family.groups[index])
        if 0 < sum(group in chosen for group in experts) < len(experts):
            raise ValueError(
                f"keep splits the experts of layer {index}; engines make them one tensor: keep all or none"
            )
        found[index] = tuple(chosen)
    beside = {n for n in skeleton.names if not n.startswith(skeleton.family.layers + ".")}
    for k in keep:
        if k not in used and not any(_begins(n, k) or _begins(skeleton.names[n], k) for n in beside):
            raise ValueError(f"keep: nothing in the model is named {k!r}")
    if not any(found.values()):
        if used:
            raise ValueError("keep leaves no linear to quantize; name fewer modules")
        why = "; ".join(skeleton.notes)
        raise ValueError(f"the model's decoder layers have no linear that could be quantized{why and f' ({why})'}")
    return found


def _begins(name: str, entry: str) -> bool:
    """Whether a name begins with an entry of `keep`, whole words only."""
    return f"{name}.".startswith(f"{entry.rstrip('.')}.")


def check_groups(skeleton: Skeleton, plan: Mapping[int, tuple[Group, ...]], group_size: int) -> None:
    """ValueError when `group_size` does not divide the inputs of a linear that is to be quantized."""
    for index, groups in plan.items():
        for group in groups:
            for name in group.linears:
                stored = skeleton.names[f"{skeleton.layer_prefix(index)}{name}.weight"]
                check_width(stored.removesuffix(".weight"), skeleton.source.meta(stored).shape[1], group_size)
