"""Kinds of plots as SVG: lines and dots. Knows no report and no measure; bars are stack.py's, ratios spans.py's.

Lines and dots are named where they are, not in a legend; what several plots share is in the functions at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .colours import series
from .svg import (
    BOLD,
    SIZE,
    Scale,
    element,
    fitted,
    fitted_apart,
    hint,
    log_ticks,
    number,
    picture,
    spread,
    text_width,
    ticks,
    words,
)

FAR = 3  # times beyond the farthest point: where an interval is cut off
MANY = 20  # times the lowest value: from there a scale is logarithmic
LEAD = 15  # pixels between two names, one over the other
NAMED = 0.4  # of a plot's width, that a name in it may take
CROWD = 16  # points of a line: of more, only the last has a mark


@dataclass(frozen=True)
class Line:
    """Points (x, y) in the order of x, drawn as the subject `index`; a `dashed` line goes with another, unnamed.
    `spans` are (x, low, high) of points whose interval is known."""

    name: str
    index: int
    points: Sequence[tuple[float, float]]
    dashed: bool = False
    spans: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True)
class Dot:
    """One point of a plot; `low` and `high` are its interval on the x axis."""

    name: str
    index: int
    x: float
    y: float
    low: float | None = None
    high: float | None = None


def line_chart(
    lines: Sequence[Line],
    *,
    label: str,
    x_title: str,
    y_title: str,
    width: float = 520,
    height: float = 250,
    log_x: bool = False,
    x_ticks: Sequence[float] | None = None,
    mark_at: float | None = None,
    log_y: bool = False,
) -> str:
    """Lines over a common x. The y axis starts at 0, or is logarithmic: where asked, or values differ twentyfold.

    `mark_at` is a value with a line of its own across. Intervals are cut off `FAR` beyond the points, and those of
    several lines stand beside one another. ValueError without any point.
    """
    xs = [x for one in lines for x, _ in one.points]
    ys = [y for one in lines for _, y in one.points]
    if not xs:
        raise ValueError("a plot of lines needs a point at least")
    named = [one for one in lines if not one.dashed]
    names = max((text_width(one.name, BOLD) for one in named), default=0.0)
    right = min(names, width / 3.5)
    shown = fitted_apart([one.name for one in named], right, BOLD)
    ys += in_sight(ys, [end for one in lines for _, *ends in one.spans for end in ends])
    ys += [] if mark_at is None else [mark_at]
    log_y = min(ys) > 0 and (log_y or max(ys) > MANY * min(ys))
    y_title = ", ".join(filter(None, (y_title, "log scale" if log_y else "")))
    y, marks = _y_scale(ys, top=34.0, bottom=height - 40, log=log_y)
    left = max(text_width(number(m)) for m in marks) + 10
    low, high = (min(xs), max(xs)) if min(xs) < max(xs) else (min(xs) * 0.5, min(xs) * 2 or 1.0)
    x = Scale(low, high, left + 8, width - right - 16, log=log_x)
    drawn = [*_across(y, marks, left, width - right - 8), words(0, 14, fitted(y_title, width), class_="axis")]
    drawn += _below(x, x_ticks or ticks(low, high), height - 40)
    drawn.append(words(x.end, height - 6, x_title, class_="axis", anchor="end"))
    if mark_at is not None:
        drawn.append(element("line", x1=left, x2=width - right - 8, y1=y.at(mark_at), y2=y.at(mark_at), class_="limit"))
    ends = spread([y.at(one.points[-1][1]) for one in named], LEAD, y.end - 4, y.start + 4)
    for place, one in enumerate(lines):
        aside = (place - (len(lines) - 1) / 2) * 6 if any(line.spans for line in lines) else 0.0
        drawn.append(_line(one, x, y, aside))
    for one, said, end in zip(named, shown, ends, strict=True):
        name = words(x.end + 12, end + 4, said, class_="own")
        lead = _leader(x.end + 5, y.at(one.points[-1][1]), x.end + 10, end)
        drawn.append(element("g", lead, name, class_=series(one.index)))
    return picture(drawn, width=width, height=height, label=label)


def _line(one: Line, x: Scale, y: Scale, aside: float) -> str:
    """A line with its marks and intervals, all moved `aside` by so many pixels."""
    places = [(x.at(a) + aside, y.at(b)) for a, b in one.points]
    path = element("polyline", points=" ".join(f"{a:.1f},{b:.1f}" for a, b in places), class_="path")
    shown = range(len(places)) if len(places) <= CROWD else [len(places) - 1]
    dots = [
        mark(*places[i], one.index, hint(f"{one.name}: {number(one.points[i][1])} at {number(one.points[i][0])}"))
        for i in shown
        if not one.dashed
    ]
    whiskers = [
        element("line", x1=x.at(at) + aside, x2=x.at(at) + aside, y1=y.at(low), y2=y.at(high), class_="whisker")
        for at, low, high in one.spans
    ]
    return element("g", path, *whiskers, *dots, class_=series(one.index) + (" dashed" if one.dashed else ""))


def in_sight(values: Sequence[float], ends: Sequence[float]) -> list[float]:
    """The ends of intervals, none farther than `FAR` times from all of the values that they are of."""
    low, high = min(values) / FAR, max(values) * FAR
    return [min(max(end, low), high) for end in ends]


def _leader(x1: float, y1: float, x2: float, y2: float) -> str:
    """A thin line from a point to its name, where the name had to move away; else nothing."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_="leader") if abs(y2 - y1) > LEAD / 2 else ""


def dot_chart(
    dots: Sequence[Dot], *, label: str, x_title: str, y_title: str, front: bool = True, width: float = 520,
    height: float = 250,
) -> str:  # fmt: skip
    """Named dots, both axes from 0 and less being better; `front` joins those that no other beats in both.

    ValueError without a dot.
    """
    if not dots:
        raise ValueError("a plot of dots needs one at least")
    y, marks = _y_scale([d.y for d in dots], top=34.0, bottom=height - 40, log=False)
    left = max(text_width(number(m)) for m in marks) + 10
    farthest = max(d.x for d in dots) or 1.0
    x = Scale(0, farthest * 1.04, left, width - 12)
    drawn = [*_across(y, marks, left, width), words(0, 14, fitted(y_title, width), class_="axis")]
    drawn += _below(x, ticks(0, farthest), height - 40)
    drawn.append(words(width, height - 6, x_title, class_="axis", anchor="end"))
    drawn.append(words(left + 4, height - 46, "↙ better", class_="tick"))
    best = [d for d in dots if not any(o.x <= d.x and o.y <= d.y and (o.x, o.y) != (d.x, d.y) for o in dots)]
    if front and len(best) > 1:
        corners = " ".join(f"{x.at(d.x):.1f},{y.at(d.y):.1f}" for d in sorted(best, key=lambda d: d.x))
        drawn.append(element("polyline", points=corners, class_="front"))
    heights = spread([y.at(d.y) for d in dots], LEAD, y.end, y.start - 8)
    names = fitted_apart([d.name for d in dots], width * NAMED, BOLD)
    for dot, shown, at in zip(dots, names, heights, strict=True):
        before = x.at(dot.x) + 12 + text_width(shown, BOLD) > width
        name = words(x.at(dot.x) + (-11 if before else 11), at + 4, shown, class_="own",
                     anchor="end" if before else "start")  # fmt: skip
        said = hint(f"{dot.name}: {number(dot.x)}, {number(dot.y)}")
        lead = _leader(x.at(dot.x), y.at(dot.y), x.at(dot.x) + (-9 if before else 9), at)
        drawn.append(
            element("g", lead, mark(x.at(dot.x), y.at(dot.y), dot.index, said), name, class_=series(dot.index))
        )
    return picture(drawn, width=width, height=height, label=label)


def mark(x: float, y: float, index: int, *inside: str, hollow: bool = False) -> str:
    """A subject's own mark: a circle, square, triangle or diamond, so that colour is never alone."""
    class_ = "dot hollow" if hollow else "dot"
    if index % 4 == 0:
        return element("circle", *inside, cx=float(x), cy=float(y), r=4.5, class_=class_)
    corners = {
        1: [(-4, -4), (4, -4), (4, 4), (-4, 4)],
        2: [(0, -5.5), (5, 4), (-5, 4)],
        3: [(0, -5.5), (5.5, 0), (0, 5.5), (-5.5, 0)],
    }[index % 4]
    points = " ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in corners)
    return element("polygon", *inside, points=points, class_=class_)


def _y_scale(values: Sequence[float], *, top: float, bottom: float, log: bool) -> tuple[Scale, list[float]]:
    """An upward scale that ends on a round value or just over the largest, and its ticks."""
    if log:
        low, high = min(values) / 1.15, max(values) * 1.15
        return Scale(low, high, bottom, top, log=True), log_ticks(low, high)
    high = max(values) if max(values) > 0 else 1.0
    tried = [_covering(high, count) for count in (4, 5, 6)]
    marks = min(tried, key=lambda found: (found[-1], len(found)))
    return Scale(min(0.0, *values), marks[-1], bottom, top), marks


def _covering(high: float, count: int) -> list[float]:
    """Ticks from 0 to the first one that is not below `high`."""
    marks = ticks(0, high, count)
    step = marks[1] - marks[0]
    return marks if marks[-1] > high - step * 1e-6 else [*marks, marks[-1] + step]


def _across(y: Scale, marks: Sequence[float], left: float, right: float) -> list[str]:
    drawn = []
    for value in marks:
        at = y.at(value)
        drawn.append(element("line", x1=left, x2=right, y1=at, y2=at, class_="base" if value == 0 else "grid"))
        drawn.append(words(left - 6, at + 4, number(value), anchor="end"))
    return drawn


def _below(x: Scale, marks: Sequence[float], bottom: float) -> list[str]:
    """The ticks of the x axis, without those whose words would touch the word before."""
    drawn, free = [], float("-inf")
    for value in marks:
        said, at = number(value), x.at(value)
        if at - text_width(said) / 2 < free:
            continue
        free = at + text_width(said) / 2 + SIZE / 2
        drawn.append(words(at, bottom + 17, said, anchor="middle"))
    return drawn
