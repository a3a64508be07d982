"""A plot of a report, for a desk and a phone, with its numbers as a table; and what of a report can be drawn at all."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .charts import Line
from .report import Ratio
from .show import number_of

COLUMN, FULL, PHONE = 520, 860, 328  # pixels: half a desk's page, the whole, a phone's
TINY = 1e-6  # the least ratio that is drawn


@dataclass(frozen=True)
class Plot:
    """A plot for a desk (over the whole page where `full`) and a phone, and its numbers as a table, whose first column
    titles the rows."""

    title: str
    wide: str
    narrow: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    full: bool = False
    legend: Sequence[tuple[str, str]] = ()  # (class, name) of colours that are not named in the plot


def made(
    title: str, draw: Callable[[float], str], head: Sequence[str], rows: Sequence[Sequence[str]], **more: Any
) -> Plot:
    wide, narrow = draw(FULL if more.get("full") else COLUMN), draw(PHONE)
    return Plot(title, wide, narrow, head, rows, **more)


def sound(value: float | None, *, least: float = 0.0) -> bool:
    """Whether a value can be drawn: a number, finite, and not below `least`. A broken model has others."""
    return value is not None and math.isfinite(value) and value >= least


def drawn(ratios: Mapping[str, Ratio], key: str) -> Ratio | None:
    """The ratio if it can be drawn, without an interval that cannot."""
    ratio = ratios.get(key)
    if ratio is None or not sound(ratio.value, least=TINY):
        return None
    whole = sound(ratio.low) and sound(ratio.high, least=TINY)
    return ratio if whole else dataclasses.replace(ratio, low=None, high=None)


def in_words(line: Line) -> str:
    (x, y), (last_x, last_y) = line.points[0], line.points[-1]
    return f"{line.name} from {number_of(y)} at {x:g} to {number_of(last_y)} at {last_x:g}"
