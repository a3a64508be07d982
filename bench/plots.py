"""The plots of a report, each with its numbers as a table. Knows a Report; what a plot looks like is in charts.py.

A plot whose data is missing is None, or not in the list: the page says then which command would fill it.
"""

from __future__ import annotations

from collections.abc import Mapping

from .charts import Dot, Line, dot_chart, line_chart
from .colours import part
from .plot import Plot, drawn, in_words, made, sound
from .report import Figure, Report
from .show import amount, number_of, ratio_of, show
from .spans import ratio_chart
from .stack import Bar, bar_chart

RATIOS = (  # input tok/s and time are output tok/s again
    ("output_rate", "output tok/s"),
    ("ttft", "time to first token"),
    ("tpot", "time per output token"),
    ("e2e", "whole request"),
    ("energy", "energy a token"),
)
SCORES = (("soft_kl", "KL to FP16 at temperature 4 (nats)"), ("mean_kl", "mean KL to FP16 (nats)"))
PART_NAMES = {"weights": "weights", "cache": "KV cache", "graphs": "CUDA graphs"}


def ratio_plot(report: Report) -> Plot | None:
    """Each measure by the first label's, with its interval; None where no pairs were run."""
    first, *others = report.numbers
    rows, table = [], []
    for key, title in RATIOS:
        dots = [
            Dot(label, list(report.numbers).index(label), r.value, 0, r.low, r.high)
            for label in others
            if (r := drawn(report.ratios.get(label, {}), key))
        ]
        if dots:
            rows.append((title, dots))
            found = {d.name: report.ratios[d.name][key] for d in dots}
            table.append([title, *(ratio_of(found[o]) if o in found else "-" for o in others)])
    if not rows:
        return None
    said = f"Ratios to {first}: " + "; ".join(
        f"{title} " + ", ".join(f"{d.name} {d.x:.2f}" for d in dots) for title, dots in rows
    )

    def draw(width: float) -> str:
        return ratio_chart(rows, label=said, one=first, width=width)

    return made(f"As a multiple of {first}'s", draw, ["", *others], table, full=True)


def memory_plot(report: Report) -> Plot | None:
    """Where the memory is, a bar a label, with the card's budget across; None where it was not told by part."""
    parts = list(dict.fromkeys(name for found in report.memory.values() for name in found if name != "total"))
    if not parts:
        return None
    names = [PART_NAMES.get(p, p.replace("_", " ")) for p in parts]
    bars = [
        Bar(
            label,
            [(n, _length(found[p]), amount(found[p].value)) for p, n in zip(parts, names, strict=True) if p in found],
        )
        for label, found in report.memory.items()
    ]
    budget = report.settings.get("vram")
    largest = max(sum(value for _, value, _ in bar.parts) for bar in bars)
    if not largest:
        return None
    # a line far beyond every bar would make all of them slivers, and one that the bars stay far under says nothing
    limit = (float(budget), f"{amount(budget)} asked for") if budget and largest > budget / 8 else None
    said = "Memory by part: " + "; ".join(f"{b.name} " + ", ".join(f"{n} {w}" for n, _, w in b.parts) for b in bars)

    def draw(width: float) -> str:
        return bar_chart(bars, label=said, parts=names, show=amount, limit=limit, width=width)

    rows = [
        [label, *(_cell(found.get(p)) for p in parts), amount(sum(found[p].value for p in parts if p in found))]
        for label, found in report.memory.items()
    ]
    legend = [(part(i), name) for i, name in enumerate(names)]
    return made("Memory by part", draw, ["", *names, "sum"], rows, full=True, legend=legend)


def _length(figure: Figure) -> float:
    return figure.value if sound(figure.value) else 0.0


def _cell(figure: Figure | None) -> str:
    return "-" if figure is None else show(figure) + ("" if figure.how == "measured" else f", {figure.how}")


def stage_plot(report: Report) -> Plot | None:
    """Where one request's time goes, a bar a label; None where stages were not timed."""
    parts = list(dict.fromkeys(name for found in report.stages.values() for name in found))
    if not parts:
        return None
    names = [p.replace("_", " ") for p in parts]
    bars = [
        Bar(
            label,
            [
                (n, _length(found[p]), f"{number_of(found[p].value)} ms")
                for p, n in zip(parts, names, strict=True)
                if p in found
            ],
        )
        for label, found in report.stages.items()
    ]
    if max(sum(value for _, value, _ in bar.parts) for bar in bars) <= 0:
        return None
    said = "One request's time: " + "; ".join(f"{b.name} " + ", ".join(f"{n} {w}" for n, _, w in b.parts) for b in bars)

    def draw(width: float) -> str:
        return bar_chart(bars, label=said, parts=names, show=lambda v: f"{number_of(v)} ms", width=width)

    rows = [[label, *(_spread(found.get(p)) for p in parts)] for label, found in report.stages.items()]
    legend = [(part(i), name) for i, name in enumerate(names)]
    return made("One request alone", draw, ["ms", *names], rows, full=True, legend=legend)


def _spread(figure: Figure | None) -> str:
    if figure is None:
        return "-"
    middle = number_of(figure.value)
    if figure.low is None or figure.high is None:
        return middle
    return f"{middle} ({number_of(figure.low)} to {number_of(figure.high)})"


def layer_plot(report: Report) -> Plot | None:
    """The error of the hidden states behind each decoder layer; None where nothing was checked."""
    found = {label: q["layers"] for label, q in report.quality.items() if q.get("layers")}
    if not found:
        return None
    order = list(report.numbers)
    points = {label: [(i, float(e)) for i, e in enumerate(layers) if sound(e)] for label, layers in found.items()}
    lines = [Line(label, order.index(label), drawn) for label, drawn in points.items() if drawn]
    if not lines:
        return None
    title = "relative squared error of the hidden states"
    said = "Relative squared error of the hidden states by decoder layer: " + "; ".join(map(in_words, lines))

    def draw(width: float) -> str:
        layers = range(max(map(len, found.values())))
        step = max(1, -(-len(layers) // 8))
        return line_chart(lines, label=said, x_title="decoder layer", y_title=title, width=width,
                          x_ticks=list(layers)[::step])  # fmt: skip

    longest = max(map(len, found.values()))
    rows = [[str(i), *(f"{q[i]:.3g}" if i < len(q) else "-" for q in found.values())] for i in range(longest)]
    return made("Error by decoder layer", draw, ["decoder layer", *found], rows)


def score_of(report: Report) -> tuple[str, str] | None:
    """(key, title) of the measure of quality that every checked label has: KL at temperature 4 before the plain one."""
    checked = [q["measures"] for q in report.quality.values() if q.get("measures")]
    return next(((k, t) for k, t in SCORES if checked and all(k in m for m in checked)), None)


def pareto_plot(report: Report) -> Plot | None:
    """Quality against the memory of the weights; the first label is at 0 where it is what the others are checked
    against. None where nothing was checked."""
    score = score_of(report)
    if score is None:
        return None
    key, title = score
    dots, rows = [], []
    for index, (label, found) in enumerate(report.numbers.items()):
        measures: Mapping[str, float] = report.quality.get(label, {}).get("measures") or {}
        value = measures.get(key, 0.0 if is_base(report, label) else None)
        if value is not None and "weights" in found:
            if sound(value) and sound(found["weights"].value):
                dots.append(Dot(label, index, found["weights"].value / (1 << 30), float(value)))
            rows.append([label, show(found["weights"]), f"{value:.3g}"])
    if len(dots) < 2:
        return None
    scale, unit = (1024.0, "MiB") if max(d.x for d in dots) < 1 else (1.0, "GiB")
    dots = [Dot(d.name, d.index, d.x * scale, d.y) for d in dots]
    said = f"{title} against model memory: " + "; ".join(f"{d.name} {d.y:.3g} at {d.x:.3g} {unit}" for d in dots)

    def draw(width: float) -> str:
        return dot_chart(dots, label=said, x_title=f"model memory ({unit})", y_title=title, width=width)

    return made("Quality against memory", draw, ["", "model memory", title], rows)


def is_base(report: Report, label: str) -> bool:
    """Whether this is the 16-bit checkpoint that artifacts are of: it has no method, and an artifact is there."""
    return "method" not in report.subjects.get(label, {}) and any("method" in s for s in report.subjects.values())
