"""Ratios with their intervals as SVG, in rows, around a line at 1. Knows no report and no measure."""

from __future__ import annotations

from collections.abc import Sequence

from .charts import NAMED, Dot, in_sight, mark
from .colours import series
from .show import times
from .svg import BOLD, Scale, element, fitted, fitted_apart, hint, log_ticks, number, picture, text_width, words


def ratio_chart(rows: Sequence[tuple[str, Sequence[Dot]]], *, label: str, one: str, width: float = 520) -> str:
    """For each row (a measure) dots at ratios with their intervals, on a logarithmic scale around 1, `one`'s own value.

    A dot is filled where its interval leaves out 1, or where it has none to doubt it. ValueError without a dot.
    """
    dots = [dot for _, found in rows for dot in found]
    if not dots or min(min(d.x, d.low or d.x) for d in dots) <= 0:
        raise ValueError("a plot of ratios needs a dot at least, and ratios above 0")
    reach = [1.0, *(d.x for d in dots)]
    reach += in_sight(reach, [end for d in dots for end in (d.low, d.high) if end is not None])
    low, high = min(reach) / 1.08, max(reach) * 1.08
    narrow = width < 420
    left = 0.0 if narrow else max(text_width(name, BOLD) for name, _ in rows) + 12
    values = max(text_width(f" {times(d.x)}", BOLD) for d in dots)
    longest = max(text_width(d.name, BOLD) for d in dots)
    right = min(longest, width * NAMED - values) + values + 12
    names = [d.name for d in dots]
    shown = dict(zip(names, fitted_apart(names, right - values - 12, BOLD), strict=True))
    x = Scale(low, high, left + 8, width - right, log=True)
    heads = 18 if narrow else 0
    drawn, top = [], 24.0
    body = []
    for name, found in rows:
        body.append(words(0, top + (13 if narrow else 15), fitted(name, width, BOLD), class_="name"))
        top += heads
        for dot in found:
            middle = top + 11
            a, b = (x.at(v) for v in (dot.low or dot.x, dot.high or dot.x))
            doubtful = dot.low is not None and dot.high is not None and dot.low <= 1 <= dot.high
            said = f"{dot.name}, {name}: {times(dot.x)}"
            said += f", {dot.low:.3g} to {dot.high:.3g}" if dot.low is not None and dot.high is not None else ""
            body.append(
                element(
                    "g",
                    element("line", x1=a, x2=b, y1=middle, y2=middle, class_="whisker"),
                    mark(x.at(dot.x), middle, dot.index, hint(said), hollow=doubtful),
                    words(width - right + 10, middle + 4, f"{shown[dot.name]} {times(dot.x)}", class_="own"),
                    class_=series(dot.index),
                )
            )
            top += 20
        top += 8
    free = [x.at(1)]  # where words stand
    for value in [1.0, *log_ticks(low, high)]:
        at = x.at(value)
        if drawn and min(abs(at - taken) for taken in free) < 34:
            continue
        free.append(at)
        drawn.append(element("line", x1=at, x2=at, y1=20, y2=top, class_="limit" if value == 1 else "grid"))
        drawn.append(words(at, 13, f"{number(value)}×", anchor="middle"))
    room = 2 * min(x.at(1), width - x.at(1))
    drawn.append(words(x.at(1), top + 14, fitted(f"as {one}", room), anchor="middle"))
    return picture([*drawn, *body], width=width, height=top + 20, label=label)
