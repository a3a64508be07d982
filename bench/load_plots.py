"""Plots against load: where int4 helps, by requests at once, and how rate and latencies grow. Knows a Report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .charts import Line, line_chart
from .plot import Plot, drawn, in_words, made, sound
from .report import Report
from .show import number_of, ratio_of

LATENCIES = (  # measure, title, unit, its further lines
    ("output_rate", "Output rate", "tok/s", ()),
    ("ttft", "Time to first token", "ms", ("p99",)),
    ("tpot", "Time per output token", "ms", ("p99",)),
    ("e2e", "Whole request", "ms", ("p99",)),
)


def load_plots(report: Report) -> list[Plot]:
    """Rate and latencies against concurrency, a plot each; none where fewer than two levels were run."""
    levels = sorted({level.concurrency for found in report.sweep.values() for level in found})
    if len(levels) < 2:
        return []
    found = [_gain(report, levels), *(_by_load(report, levels, *row) for row in LATENCIES)]
    return [plot for plot in found if plot is not None]


def _gain(report: Report, levels: Sequence[int]) -> Plot | None:
    """Output tok/s by the first label's at each concurrency: where int4 helps, and where it stops."""
    first, *others = report.numbers
    ratios = {label: {n.concurrency: r for n in report.sweep.get(label, ()) if (r := drawn(n.ratios, "output_rate"))}
              for label in others}  # fmt: skip
    lines = [
        Line(
            label,
            index,
            [(n, r.value) for n, r in ratios[label].items()],
            spans=[(n, r.low, r.high) for n, r in ratios[label].items() if r.low is not None and r.high is not None],
        )
        for index, label in enumerate(others, start=1)
        if ratios[label]
    ]
    if not lines:
        return None
    title = f"Output rate as a multiple of {first}'s"
    said = f"{title} against requests at once: " + "; ".join(in_words(line) for line in lines)

    known = [r.level for by in ratios.values() for r in by.values() if r.low is not None]
    heading = f"with {known[0]:.0%} intervals of paired runs" if known else "without intervals"

    def draw(width: float) -> str:
        given: dict[str, Any] = {"x_title": "requests at once", "y_title": heading, "mark_at": 1.0, "log_y": True}
        return line_chart(lines, label=said, width=width, log_x=True, x_ticks=levels, **given)

    rows = [[str(n), *(ratio_of(r) if (r := ratios[label].get(n)) else "-" for label in others)] for n in levels]
    return made(title, draw, ["requests at once", *others], rows)


def _by_load(
    report: Report, levels: Sequence[int], key: str, title: str, unit: str, tails: Sequence[str]
) -> Plot | None:
    lines, columns = [], {}
    for index, label in enumerate(report.numbers):
        for tail in ("", *tails):
            measure = f"{key}_{tail}" if tail else key
            points = [
                (level.concurrency, level.numbers[measure].value)
                for level in report.sweep.get(label, ())
                if measure in level.numbers and sound(level.numbers[measure].value)
            ]
            if points:
                name = f"{label} {tail}".strip()
                lines.append(Line(name, index, points, dashed=bool(tail)))
                columns[name] = dict(points)
    if not lines:
        return None
    said = f"{title} against requests at once: " + "; ".join(in_words(line) for line in lines)

    def draw(width: float) -> str:
        return line_chart(lines, label=said, x_title="requests at once", y_title=unit, width=width, log_x=True,
                          x_ticks=levels)  # fmt: skip

    rows = [[str(n), *(number_of(c[n]) if n in c else "-" for c in columns.values())] for n in levels]
    return made(title, draw, ["requests at once", *columns], rows)
