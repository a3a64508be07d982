"""What the card itself tells, by NVML: bytes in use at their highest, joules taken. Nothing where NVML is not there.

Of the first card that this process may use. Knows no engine: whoever begins a spell says whose it is.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

EVERY = 0.05  # seconds between two looks at the memory


@dataclass(frozen=True)
class Card:
    """An opened card. `nvml` is the library's module, `handle` its own."""

    nvml: Any
    handle: Any


@dataclass(frozen=True)
class Spell:
    """What changed on the card between two moments: bytes more in use at its end (`grew`) and at the highest (`peak`)
    than at its begin; joules taken meanwhile, None where the card does not tell."""

    grew: int
    peak: int
    joules: float | None


def open_card() -> tuple[Card | None, str]:
    """The first card, and "" or why there is none."""
    try:
        import pynvml  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None, "nvidia-ml-py is not installed"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    try:
        pynvml.nvmlInit()
        if visible.startswith(("GPU-", "MIG-")):
            return Card(pynvml, pynvml.nvmlDeviceGetHandleByUUID(visible)), ""
        return Card(pynvml, pynvml.nvmlDeviceGetHandleByIndex(int(visible or 0))), ""
    except (pynvml.NVMLError, ValueError) as e:
        return None, f"NVML does not answer ({e})"


def used(card: Card) -> int:
    """Bytes in use on the card, by all processes."""
    return int(card.nvml.nvmlDeviceGetMemoryInfo(card.handle).used)


def joules(card: Card) -> float | None:
    """Joules that the card has taken since its driver was loaded; None before Volta and where it is not allowed."""
    try:
        return card.nvml.nvmlDeviceGetTotalEnergyConsumption(card.handle) / 1000
    except card.nvml.NVMLError:
        return None


def begin(card: Card | None) -> Callable[[], Spell | None]:
    """Watch the card from now on; what it returns ends the spell and tells it. None without a card."""
    if card is None:
        return lambda: None
    start, energy = used(card), joules(card)
    highest, over = [start], threading.Event()

    def look() -> None:
        while not over.wait(EVERY):
            highest.append(max(highest.pop(), used(card)))

    watch = threading.Thread(target=look, daemon=True)
    watch.start()

    def end() -> Spell:
        over.set()
        watch.join()
        last, taken = used(card), joules(card)
        spent = None if energy is None or taken is None else taken - energy
        return Spell(last - start, max(highest[0], last) - start, spent)

    return end


def peak_of(spells: Iterable[Spell]) -> int:
    """The most that one server held, by the spells in which it alone was at work: its start, then its runs."""
    held = most = 0
    for spell in spells:
        most = max(most, held + spell.peak)
        held += spell.grew
    return most
