"""GPUs by name: memory, bandwidth and compute capability, so that a plan needs no card at hand.

Figures are the makers' data sheets'. Memory counts the sheet's GB as GiB, as the chips are built, less a sixteenth
where error correction lives in the memory itself and is on as shipped (GDDR6 cards for servers)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .machine import GIB, Gpu, Machine, sized

ANY = 8.9  # the compute capability of a card of which only the size is given: a current one
INLINE_ECC = 15 / 16  # of the memory is left by error correction that is kept in it


@dataclass(frozen=True)
class Card:
    """One kind of card: bytes of memory, bytes a second of bandwidth, CUDA compute capability."""

    name: str
    memory: int
    bandwidth: float
    capability: float

    @property
    def gpu(self) -> Gpu:
        """The card as if it were here, empty."""
        return Gpu(self.name, self.memory, self.memory, self.capability)


def _card(name: str, gib: float, gbs: float, capability: float, *, ecc: bool = False) -> Card:
    return Card(name, int(gib * GIB * (INLINE_ECC if ecc else 1)), gbs * 1e9, capability)


CARDS = {
    "3060": _card("GeForce RTX 3060", 12, 360, 8.6),
    "3090": _card("GeForce RTX 3090", 24, 936, 8.6),
    "4060ti-16g": _card("GeForce RTX 4060 Ti 16GB", 16, 288, 8.9),
    "4080": _card("GeForce RTX 4080", 16, 716.8, 8.9),
    "4090": _card("GeForce RTX 4090", 24, 1008, 8.9),
    "5090": _card("GeForce RTX 5090", 32, 1792, 12.0),
    "t4": _card("T4", 16, 320, 7.5, ecc=True),
    "a10": _card("A10", 24, 600, 8.6, ecc=True),
    "a30": _card("A30", 24, 933, 8.0),
    "a40": _card("A40", 48, 696, 8.6, ecc=True),
    "l4": _card("L4", 24, 300, 8.9, ecc=True),
    "l40s": _card("L40S", 48, 864, 8.9, ecc=True),
    "a6000": _card("RTX A6000", 48, 768, 8.6),
    "a100-40g": _card("A100 40GB", 40, 1555, 8.0),
    "a100": _card("A100 80GB SXM", 80, 2039, 8.0),
    "h100": _card("H100 80GB SXM", 80, 3350, 9.0),
    "h20": _card("H20", 96, 4000, 9.0),
    "h200": _card("H200", 140, 4800, 9.0),  # sold as 141 GB; whole GiB below it
}


def card_named(name: str) -> Card:
    """The card of this name, however it is spelled (`RTX 4090`, `4090`). ValueError with the known names."""
    plain = re.sub(r"[\s_]+", "-", name.strip().lower())
    plain = re.sub(r"^(nvidia-|geforce-|rtx-|tesla-)+", "", plain)
    if plain not in CARDS:
        raise ValueError(f"no card {name!r} in the table; known are {', '.join(CARDS)}; or give --vram, as 24GiB")
    return CARDS[plain]


def chosen_card(machine: Machine, *, vram: int | None = None, card: str | None = None) -> tuple[Gpu, float | None]:
    """The card to plan for and its bandwidth: `vram` bytes of some card, one of the table, else this machine's first.

    ValueError for both at once, and where neither is given on a machine without a GPU, or with one of unknown size.
    """
    if vram is not None and card is not None:
        raise ValueError("give --vram or --card, not both")
    if card is not None:
        found = card_named(card)
        return found.gpu, found.bandwidth
    if vram is not None:
        return Gpu("a card of this size", vram, vram, machine.gpus[0].capability if machine.gpus else ANY), None
    if not machine.gpus:
        raise ValueError("this machine has no GPU to plan for; give --vram 24GiB or --card 4090")
    return sized(machine.gpus[0]), None
