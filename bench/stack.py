"""Stacked horizontal bars as SVG: what a whole is made of, a row each. Knows no report and no measure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .colours import part
from .svg import BOLD, Scale, element, fitted, fitted_apart, hint, picture, text_width, words


@dataclass(frozen=True)
class Bar:
    """A row of a stack: (part's name, value, the value in words) from left to right."""

    name: str
    parts: Sequence[tuple[str, float, str]]


def bar_chart(
    bars: Sequence[Bar],
    *,
    label: str,
    parts: Sequence[str],
    show: Callable[[float], str],
    limit: tuple[float, str] | None = None,
    width: float = 520,
) -> str:
    """Stacked horizontal bars, a row each with its name over it; `parts` fixes the colours, `limit` is a line across.

    ValueError without anything to stack.
    """
    sums = [sum(value for _, value, _ in bar.parts) for bar in bars]
    if not sums or max(sums) <= 0:
        raise ValueError("a stack needs a part that is above 0")
    ends = max(text_width(show(s), BOLD) for s in sums) + 8
    longest = max(*sums, limit[0]) if limit else max(sums)
    x = Scale(0, longest, 0, width - (ends if longest in sums else 2))
    height = 48.0 * len(bars) + (20 if limit else 0)
    drawn = []
    names = fitted_apart([bar.name for bar in bars], width, BOLD)
    for row, (bar, total, shown) in enumerate(zip(bars, sums, names, strict=True)):
        top = 48.0 * row + (20 if limit else 0)
        drawn.append(words(0, top + 13, shown, class_="name"))
        at = 0.0
        for name, value, said in bar.parts:
            start, end = x.at(at), x.at(at + value)
            at += value
            if end - start < 0.3:
                continue
            box = element("rect", hint(f"{bar.name}, {name}: {said}"), x=start, y=top + 19,
                          width=max(end - start - 1, 0.3), height=22, class_="fill")  # fmt: skip
            inside = fitted(said, end - start - 10)
            text = [words(start + 6, top + 34, inside, class_="inside")] if inside == said else []
            drawn.append(element("g", box, *text, class_=part(parts.index(name))))
        if width - x.at(total) >= ends - 1:
            drawn.append(words(x.at(total) + 6, top + 34, show(total), class_="name"))
    if limit:
        at = x.at(limit[0])
        drawn.append(element("line", x1=at, x2=at, y1=18, y2=height, class_="limit"))
        drawn.append(words(at, 12, limit[1], anchor="end" if at > width / 2 else "start"))
    return picture(drawn, width=width, height=height, label=label)
