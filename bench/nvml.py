"""What the card itself tells, by NVML: bytes in use at their highest, joules taken. Nothing where NVML is not there.

Of the first card that this process may use. Knows no engine: whoever begins a spell says whose it is.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
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
    than at its begin; joules taken meanwhile, or in the part of it that was asked for, None where nobody tells."""

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


def begin(card: Card | None) -> Callable[..., Spell | None]:
    """Watch the card from now on; what it returns ends the spell and tells it. None without a card.

    The joules are those between two moments of time.perf_counter, where `end` is given such a `window`.
    """
    if card is None:
        return lambda window=None: None
    start = used(card)
    highest, over = [start], threading.Event()
    meter = [(time.perf_counter(), joules(card))]

    def look() -> None:
        while not over.wait(EVERY):
            highest.append(max(highest.pop(), used(card)))
            meter.append((time.perf_counter(), joules(card)))

    watch = threading.Thread(target=look, daemon=True)
    watch.start()

    def end(window: tuple[float, float] | None = None) -> Spell:
        over.set()
        watch.join()
        last = used(card)
        meter.append((time.perf_counter(), joules(card)))
        return Spell(last - start, max(highest[0], last) - start, taken(meter, window))

    return end


def taken(meter: Sequence[tuple[float, float | None]], window: tuple[float, float] | None = None) -> float | None:
    """Joules between the two moments of `window`, else from first to last, by readings (moment, joules) in their order;
    between two readings evenly. None where a reading is missing."""
    told = [(at, value) for at, value in meter if value is not None]
    if len(told) < len(meter):
        return None

    def at(moment: float) -> float:
        for (before, low), (after, high) in itertools.pairwise(told):
            if moment <= after:
                share = (moment - before) / (after - before) if after > before else 1.0
                return low + max(0.0, share) * (high - low)
        return told[-1][1]

    first, last = window or (told[0][0], told[-1][0])
    return at(last) - at(first)


def peak_of(spells: Iterable[Spell]) -> int:
    """The most that one server held, by the spells in which it alone was at work: its start, then its runs."""
    held = most = 0
    for spell in spells:
        most = max(most, held + spell.peak)
        held += spell.grew
    return most
