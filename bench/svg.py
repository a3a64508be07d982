"""SVG by pure functions: elements, scales, ticks, and labels that keep apart. Knows no report and no kind of chart.

Why not matplotlib: a plot of it carries its colours with it, so a page in the dark would need every file rewritten or
drawn twice; it names lines by legends; and it is no dependency of mmq, while a report must be drawn wherever something
was measured. What a report draws are lines, bars and dots: these few functions, with colours by the page's own CSS.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import takewhile

SIZE = 12.0  # of all text, pixels
BOLD = SIZE * 1.14  # the size of plain letters as wide as bold ones
WIDE = {"W", "F"}  # East Asian widths that take a whole em


@dataclass(frozen=True)
class Scale:
    """Values from `low` to `high` onto pixels from `start` to `end`; logarithmic where `log`, then both are above 0."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"a scale goes from a number up to a larger one, not from {self.low} to {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"a logarithmic scale starts above 0, not at {self.low}")

    def at(self, value: float) -> float:
        """The pixel of a value; one outside the scale is drawn at its end."""
        value = min(max(value, self.low), self.high)
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def element(name: str, *inside: str, **attributes: object) -> str:
    """An element around markup. `class_` is class, `font_size` is font-size; None is left out; values are escaped."""
    said = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_value(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{said}>{''.join(inside)}</{name}>"


def words(x: float, y: float, text: str, *, class_: str = "tick", anchor: str = "start") -> str:
    """A line of text: `anchor` (start, middle, end) of it stands at x, its baseline at y."""
    return element("text", plain(text), x=x, y=y, class_=class_, text_anchor=None if anchor == "start" else anchor)


def hint(text: str) -> str:
    """What a browser shows over the element that this stands in."""
    return element("title", plain(text))


def plain(text: str) -> str:
    """Text as markup that shows just it. What XML cannot hold (control characters, half surrogates) becomes U+FFFD."""

    def shown(c: str) -> bool:
        return c in "\t\n" or unicodedata.category(c) not in ("Cc", "Cs")

    kept = "".join(c if shown(c) else "\ufffd" for c in text)
    return escape(kept, quote=True)


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return plain(str(value))


def picture(inside: Sequence[str], *, width: float, height: float, label: str) -> str:
    """The whole drawing, `label` being what a screen reader says of it. It scales with its place."""
    return element(
        "svg",
        *inside,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width:g} {height:g}",
        width=float(width),
        height=float(height),
        role="img",
        aria_label=label,
    )


def text_width(text: str, size: float = SIZE) -> float:
    """About how many pixels a text takes: an em for a Chinese character, 0.7 for a capital, 0.58 for others. No font
    is asked."""
    return size * sum(1.0 if unicodedata.east_asian_width(c) in WIDE else 0.7 if c.isupper() else 0.58 for c in text)


def fitted(text: str, width: float, size: float = SIZE) -> str:
    """The text, or as much of its beginning as `width` pixels hold, with an ellipsis."""
    if text_width(text, size) <= width:
        return text
    while text and text_width(text + "…", size) > width:
        text = text[:-1]
    return text.rstrip() + "…"


def fitted_apart(texts: Sequence[str], width: float, size: float = SIZE) -> list[str]:
    """The texts as `fitted` has each; where that makes two alike, those that are too long are told without what they
    all begin with: …AWQ-asym and …GPTQ-sym of two names of the same model."""
    short = [fitted(text, width, size) for text in texts]
    if len(set(short)) == len(set(texts)):
        return short
    cut = [text for text, kept in zip(texts, short, strict=True) if kept != text]
    shared = "".join(c[0] for c in takewhile(lambda c: len(set(c)) == 1, zip(*cut, strict=False)))
    word = re.match(r".*\W", shared)
    whole = word.end() if word and shared not in cut else len(shared)
    for begun in (whole, len(shared)):  # to the end of a word, if that is enough
        without = [
            kept if kept == text or len(text) == begun else fitted("…" + text[begun:], width, size)
            for text, kept in zip(texts, short, strict=True)
        ]
        if begun and len(set(without)) == len(set(texts)):
            return without
    return short


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round values (1, 2 or 5 times a power of ten apart) that lie from low to high."""
    if not low < high:
        return [low]
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round values for a logarithmic scale: powers of ten, with 2 and 5 between where there is room for them."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        found = [s * 10.0**p for p in powers for s in steps if low * 0.999 <= s * 10.0**p <= high * 1.001]
        if len(found) <= count:
            break
    else:
        found = found[:: math.ceil(len(found) / count)]
    return found if len(found) > 1 else ticks(low, high, count)


def number(value: float) -> str:
    """A number as short as a label needs it: 1,250, 12.5, 0.25, 3e-06."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.2g}"


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places as near to `wanted` as they can be with `gap` between neighbours, from low to high where there is room.

    Neighbours that are too near form a group around their middle, groups that touch become one (the pooling of
    isotonic regression), so the order stays as it was.
    """
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    groups: list[list[float]] = []  # [sum of wished starts, members]
    for rank, i in enumerate(order):
        groups.append([wanted[i] - rank * gap, 1])
        while len(groups) > 1 and groups[-2][0] / groups[-2][1] >= groups[-1][0] / groups[-1][1]:
            total, members = groups.pop()
            groups[-1][0] += total
            groups[-1][1] += members
    top = high - gap * (len(wanted) - 1)
    starts = [max(low, min(total / members, top)) for total, members in groups for _ in range(int(members))]
    placed = [0.0] * len(wanted)
    for rank, i in enumerate(order):
        placed[i] = starts[rank] + rank * gap
    return placed


def wrapped(text: str, width: float, size: float = SIZE) -> list[str]:
    """The text in lines of at most `width` pixels, broken at spaces and between Chinese characters."""
    lines = [""]
    for piece in re.findall(r"\s+|[\u3000-\u9fff\uff00-\uffef]|[^\s\u3000-\u9fff\uff00-\uffef]+", text):
        if text_width((lines[-1] + piece).rstrip(), size) <= width:
            lines[-1] += piece
        elif piece.strip():
            lines.append(fitted(piece, width, size))
    return [line.strip() for line in lines if line.strip()]
