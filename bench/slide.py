"""A report as one picture for a slide, 16:9: its headline, a short table and two plots.

Drawn as SVG by the same functions as the page's plots and made a PNG by resvg (`pip install 'mmq-toolkit[png]'`), which
knows neither CSS variables nor the page's fonts: colours are put in here, and fonts are the machine's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .colours import ROLES, resolved, series, shipped
from .headline import moment, shown, tiles, title
from .load_plots import load_plots
from .plot import Plot
from .plots import memory_plot, pareto_plot, ratio_plot, stage_plot
from .proof import rows as proof_rows
from .report import Report
from .svg import element, fitted, fitted_apart, number, picture, text_width, words, wrapped
from .table import warnings

WIDTH, HEIGHT, MARGIN = 1600.0, 900.0, 72.0
LEFT = 800.0  # where the plots begin
COLUMNS = 4  # of the table
NAME = "report.png"
LETTER = "<text x='2' y='30'>M</text>"
FONTS = '"Noto Sans", "DejaVu Sans", "Liberation Sans", Arial, Helvetica, "Segoe UI", "Noto Sans CJK SC", "PingFang SC"'
STYLE = (
    f"text {{ font-family: {FONTS}; }}"
    + """
.title { font-size: 44px; font-weight: 600; } .sub { font-size: 20px; fill: var(--faint); }
.said { font-size: 24px; } .head { font-size: 20px; fill: var(--faint); }
.caption { font-size: 20px; font-weight: 600; }
.cell { font-size: 24px; } .big { font-size: 28px; font-weight: 600; fill: currentColor; }
.good { color: var(--good); } .bad { color: var(--bad); } .same { color: var(--ink); }
.foot { font-size: 16px; fill: var(--faint); } .foot.own { fill: currentColor; font-weight: 400; }
"""
)


def write_slide(report: Report, folder: Path, *, dark: bool = False) -> Path:
    """Write report.png into `folder`; returns its path. Errors as `png`'s."""
    data = png(slide(report, dark=dark), dark=dark)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    path.write_bytes(data)
    return path


def png(svg: str, *, dark: bool = False) -> bytes:
    """The SVG as a PNG. ValueError where resvg is not installed or the machine has no font to write with."""
    try:
        import resvg_py
    except ImportError:
        raise ValueError("a PNG is drawn by resvg: pip install 'mmq-toolkit[png]'") from None
    probe = (
        f"<svg xmlns='http://www.w3.org/2000/svg' width='40' height='40'><style>text {{ font: 30px {FONTS} }}</style>"
    )
    empty, lettered = (resvg_py.svg_to_bytes(svg_string=f"{probe}{mark}</svg>") for mark in ("", LETTER))
    if empty == lettered:
        raise ValueError(f"none of the fonts {FONTS} is on this machine; install one, as fonts-dejavu-core of Debian")
    return resvg_py.svg_to_bytes(svg_string=svg, background=ROLES["ground"][int(dark)])


def slide(report: Report, *, dark: bool = False) -> str:
    """The slide as an SVG that needs nothing else: its colours are in it. ValueError where there is nothing to show."""
    shown(report)
    style = resolved(shipped("chart.css") + STYLE, dark=dark)
    drawn = [element("style", style)]
    drawn.append(words(MARGIN, 104, fitted(title(report), WIDTH - 2 * MARGIN, 44), class_="title"))
    engine = f"{report.engine} {report.versions.get(report.engine, '')}".strip()
    where = " · ".join([report.machine.get("words", ""), engine, moment(report.created)])
    drawn.append(words(MARGIN, 142, fitted(where, WIDTH - 2 * MARGIN, 20), class_="sub"))
    drawn += _left(report, 210.0)
    for place, plot in zip((168.0, 504.0), _two_plots(report), strict=False):
        drawn += _placed(plot, place, 326.0)
    if beware := warnings(report):
        more = f" (and {len(beware) - 1} more)" if len(beware) > 1 else ""
        line = fitted(f"Beware: {beware[0]}", WIDTH - 2 * MARGIN - 160, 16) + more
        drawn.append(element("g", words(MARGIN, HEIGHT - 62, line, class_="foot own"), class_="bad"))
    told = " · ".join(f"{n} {v}" for n, v in report.versions.items())
    if more := list(report.numbers)[1 + COLUMNS :]:
        told = f"in the report besides: {', '.join(more)} · {told}"
    drawn.append(words(MARGIN, HEIGHT - 36, fitted(told, WIDTH - 2 * MARGIN, 16), class_="foot"))
    return picture(drawn, width=WIDTH, height=HEIGHT, label=title(report))


def _left(report: Report, top: float) -> list[str]:
    """The first verdicts, and under them the headline as a table, a column each label that is compared."""
    room = LEFT - MARGIN - 64
    drawn = []
    for verdict in report.verdicts[:2]:
        for line in wrapped(verdict, room, 24)[:4]:
            drawn.append(words(MARGIN, top, line, class_="said"))
            top += 34
        top += 14
    top += 24
    first, *others = report.numbers
    columns = (others or [first])[:COLUMNS]
    step = min(200.0, (room - 250) / len(columns))
    for at, (label, name) in enumerate(zip(columns, fitted_apart(columns, step - 12, 28), strict=True)):
        x = MARGIN + room - step * (len(columns) - 1 - at)
        text = words(x, top, name, class_="own big", anchor="end")
        drawn.append(element("g", text, class_=series(list(report.numbers).index(label))))
    if others:
        drawn.append(words(MARGIN, top, fitted(f"compared with {first}", 240, 20), class_="head"))
    for heading, cells in _rows(report, columns):
        drawn.append(element("line", x1=MARGIN, x2=MARGIN + room, y1=top + 16, y2=top + 16, class_="grid"))
        top += 52
        drawn.append(words(MARGIN, top, fitted(heading, 300, 24), class_="cell"))
        for at, (value, class_) in enumerate(cells):
            x = MARGIN + room - step * (len(columns) - 1 - at)
            text = words(x, top, value, class_="big", anchor="end")
            drawn.append(element("g", text, class_=class_ or "same"))
    return drawn


def _rows(report: Report, columns: Sequence[str]) -> list[tuple[str, list[tuple[str, str]]]]:
    """(heading, (value, class) by label): the headline's ratios, then what the check found."""
    rows = []
    for tile in tiles(report):
        found = {line["label"]: (line["value"], line["class"]) for line in tile["lines"]}
        cells = [found.get(label, ("-", "")) for label in columns]
        if len(report.numbers) == 1:
            cells = [(line["value"], "") for line in tile["lines"]]
        rows.append((tile["title"].partition(" (")[0], cells))
    for heading, *values in proof_rows(columns, {k: dict(v) for k, v in report.quality.items()})[:2]:
        rows.append((heading.partition(" (")[0], [(_short(v), "") for v in values]))
    return rows


def _short(value: str) -> str:
    try:
        return number(float(value))
    except ValueError:
        return value or "-"


def _two_plots(report: Report) -> list[Plot]:
    """The two plots that say most of what is there: speed against load or the ratios, quality or memory."""
    speed = [*load_plots(report)[:1], ratio_plot(report), stage_plot(report)]
    rest = [pareto_plot(report), memory_plot(report)]
    found = [next((p for p in kind if p is not None), None) for kind in (speed, rest)]
    spare = [p for kind in (speed, rest) for p in kind if p is not None and p not in found]
    return [p for p in [*found, *spare] if p is not None][:2]


def _placed(plot: Plot, top: float, room: float) -> list[str]:
    """The plot under its caption, as large as its place lets it be."""
    viewed = plot.wide.partition('viewBox="0 0 ')[2].partition('"')[0]
    width, height = map(float, viewed.split())
    scale = min((WIDTH - MARGIN - LEFT) / width, (room - 44) / height)
    body = element("g", plot.wide, transform=f"translate({LEFT:g} {top + 40:g}) scale({scale:.4f})")
    caption = words(LEFT, top + 20, plot.title, class_="caption")
    legend, at = [], LEFT
    for class_, name in plot.legend:
        below = top + 44 + height * scale + 14
        legend.append(element("rect", x=at, y=below - 10, width=11.0, height=11.0, class_=f"fill {class_}"))
        legend.append(words(at + 16, below, name))
        at += 32 + text_width(name)
    return [caption, body, *legend]
