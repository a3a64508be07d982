"""How long work tells where it is: one small event, one callback type. Knows nothing of terminals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """One step of long work: `done` of `total` units of `name` are finished; `note` is for a human."""

    name: str
    done: int
    total: int
    note: str = ""


Tell = Callable[[Step], None]


def silent(step: Step) -> None:
    """The listener that does not listen."""
