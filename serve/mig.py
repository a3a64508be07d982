"""Slices of NVIDIA cards (MIG), from what nvidia-smi says of them. Runs nothing.

`nvidia-smi -L` names each slice and its id, `nvidia-smi -q -x` has its memory and, from most drivers, no id: a card's
slices have the same numbers in both. So seen in outputs of drivers 535 and 575 that others published; no card with
slices was at hand here.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass

_CARD = re.compile(r"GPU\s+\d+:\s*(.*?)\s*\(UUID:\s*(GPU-[^)\s]+)\)")
_SLICE = re.compile(r"MIG\s+(\S+)\s+Device\s+(\d+):\s*\(UUID:\s*(MIG-[^)\s]+)\)")


@dataclass(frozen=True)
class Slice:
    """A part of the card `card` (its id), `profile` as `3g.40gb`. Memory in bytes, 0 where nvidia-smi does not tell."""

    uuid: str
    card: str
    profile: str
    memory: int
    free: int


def parse_slices(listed: str, described: str) -> tuple[Slice, ...]:
    """The slices of `nvidia-smi -L`, in its order, with their memory from `nvidia-smi -q -x`."""
    sizes = _sizes(described)
    found, card = [], ""
    for line in listed.splitlines():
        if match := _CARD.match(line.strip()):
            card = match[2]
        elif match := _SLICE.match(line.strip()):
            memory, free = sizes.get((card, int(match[2])), (0, 0))
            found.append(Slice(match[3], card, match[1], memory, free))
    return tuple(found)


def _sizes(described: str) -> dict[tuple[str, int], tuple[int, int]]:
    """(card's id, slice's number) -> memory and free memory in bytes; without those that are not told."""
    try:
        root = ET.fromstring(described)  # the driver's own program wrote it
    except ET.ParseError:
        return {}
    found = {}
    for gpu in root.iter("gpu"):
        for part in gpu.iterfind("mig_devices/mig_device"):
            sizes = [_mebibytes(part.findtext(f"fb_memory_usage/{name}")) for name in ("total", "free")]
            number = (part.findtext("index") or "").strip()
            if number.isdigit() and all(sizes):
                found[(gpu.findtext("uuid") or "").strip(), int(number)] = (sizes[0] << 20, sizes[1] << 20)
    return found


def _mebibytes(text: str | None) -> int:
    match = re.fullmatch(r"\s*(\d+) MiB\s*", text or "")
    return int(match[1]) if match else 0
