"""What a packed folder can become: a conversion settled before anything is written, or refused. Reads headers and zero
points alone. Knows no engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..quantize.grid import MIDDLE
from .config import check_head
from .packed_folder import Packed, open_packed
from .subject import Subject, read_subject

FORMATS = ("awq", "gptq", "compressed-tensors")


@dataclass(frozen=True)
class Move:
    """A conversion settled: what is read, what it becomes, and whether its tensors stay as they are."""

    subject: Subject
    packed: Packed
    format: str
    group_size: int
    symmetric: bool
    copied: bool
    dtype: torch.dtype


def settle(folder: Path, format: str | None) -> Move:
    """Look at `folder` and say what it can become. `format` None is its own. ValueError for a move that would lose
    something or that no engine loads, OSError as the folder's files give it."""
    subject = read_subject(folder)
    if subject.method == "bitsandbytes":
        raise ValueError(f"{folder}: bitsandbytes' code book is no grid of integers; quantize the base again")
    if not subject.method:
        raise ValueError(f"{folder} is not quantized; `mmq quantize` makes an int4 artifact of it")
    packed = open_packed(folder)
    target = format or packed.format
    if target not in FORMATS:
        raise ValueError(f"no format {target!r} to convert to; it can be {', '.join(FORMATS)}")
    sizes = {x.group or x.inputs for x in subject.packed}
    if len(sizes) > 1:
        raise ValueError(f"{folder} has groups of {', '.join(map(str, sorted(sizes)))}; a format's config names one")
    if target != packed.format and (uneven := [x.name for x in subject.packed if x.outputs % 8]):
        raise ValueError(f"{folder}: {uneven[0]} has outputs that are no multiple of 8; {target} packs whole words")
    if ordered := [n for n in subject.tensors if n.endswith(".weight_g_idx")]:
        raise ValueError(f"{folder}: {ordered[0]}: columns in activation order, which no other format holds")
    skewed = [n for n in sorted(packed.linears) if not _is_middle(packed, n)]
    if skewed and _says_symmetric(subject.quantization):
        raise ValueError(
            f"{folder}: {skewed[0]} has zero points other than 8 and the config says symmetric, so engines take them "
            "for 8: one of the two is wrong; mend the config (sym or symmetric: false; GPTQ's checkpoint_format)"
        )
    if target == "gptq" and skewed:
        raise ValueError(
            f"{folder} is asymmetric ({skewed[0]} has zero points other than 8), and no engine loads GPTQ so; "
            "it can be awq or compressed-tensors"
        )
    if subject.head is not None and subject.head.packed:
        check_head(target, not skewed, subject.head.outputs)
    dtype = torch.float16 if subject.dtype == "float16" else torch.bfloat16
    copied = target == packed.format and packed.stored_less == 1
    zeros_stored = any(n.endswith(".weight_zero_point") for n in subject.tensors)  # though every one may be 8
    return Move(subject, packed, target, sizes.pop(), not (skewed or (copied and zeros_stored)), copied, dtype)


def _says_symmetric(declared: Mapping[str, Any]) -> bool:
    """Whether a GPTQ or compressed-tensors config declares a symmetric grid, whose zero points engines do not read."""
    groups = (declared.get("config_groups") or {}).values()
    said = [declared.get("sym"), *((group.get("weights") or {}).get("symmetric") for group in groups)]
    return True in said and False not in said


def _is_middle(packed: Packed, linear: str) -> bool:
    """Whether every zero point of a linear is 8. Reads the zero points alone."""
    name = f"{linear}.weight_zero_point" if packed.format == "compressed-tensors" else f"{linear}.qzeros"
    if name not in packed.source.metas:
        return True
    nibble = MIDDLE - (packed.stored_less if packed.format == "gptq" else 0)
    word = torch.tensor([nibble * 0x11111111], dtype=torch.int64).to(torch.int32)
    return bool((packed.source.get(name) == word).all())
