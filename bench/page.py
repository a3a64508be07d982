"""A report as one HTML page that needs nothing else: no network, no script, its pictures inside it.

The page itself is page/report.html, a Jinja template that escapes every value: labels, paths and answers are other
people's words. Its style is allowed by its hash alone, so that no markup of theirs could bring another. What stands in
which section is here; the plots are plots.py's, the rows of the field compare.py's.
"""

from __future__ import annotations

import base64
import datetime
import difflib
import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image

from .. import __version__
from .colours import series, variables
from .compare import ROWS, load_line, warnings
from .plots import Plot, layer_plot, load_plots, memory_plot, pareto_plot, ratio_plot, stage_plot
from .proof import rows as proof_rows
from .report import Figure, Ratio, Report
from .show import amount, better, change, interval, number_of, show, times

PAGE = "report.html"
SHIPPED = Path(__file__).parent / "page"
PICTURE = 320  # pixels of a picture's longer side on the page
TILES = (
    ("weights", "Model memory"),
    ("output_rate", "Output tok/s"),
    ("tpot", "Time per output token"),
    ("max_batch", "Max batch"),
)
BESIDES = {"startup": "start of the server (s)", "kv_token": "cache of one token"}
SECTIONS = (
    ("table", "Side by side"),
    ("load", "Latency against load"),
    ("memory", "Memory"),
    ("quality", "Quality"),
    ("stages", "Where the time goes"),
    ("answers", "Answers"),
    ("carries", "What carries over"),
    ("conditions", "How it was measured"),
)
MISSING = {  # section -> what is not there, and what would fill it
    "load": "One level of load was run; `mmq bench --compare ... --sweep` goes up to saturation.",
    "memory": "No engine told its memory by part.",
    "quality": "Nothing was checked; `mmq check ARTIFACT`, then `mmq bench` again, brings quality in here.",
    "stages": "Stages were not timed; `mmq bench --compare ... --stages` times them.",
    "answers": "No questions were asked; `mmq bench --compare ... --answers 8` asks some of the held-out samples.",
}


def page(report: Report, folder: Path) -> str:
    """The page. `folder` is where the report's pictures are; one that is missing there is told of in its place."""
    plots = [p for p in (layer_plot(report), pareto_plot(report)) if p is not None]
    style = variables() + _shipped("chart.css") + _shipped("report.css")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    labels = list(report.numbers)
    task_head, task_rows = _tasks(report)
    memory, stages, ratios = memory_plot(report), stage_plot(report), ratio_plot(report)
    return _template().render(
        title=title(report),
        style=Markup(style),
        style_hash=f"sha256-{digest}",
        sections=SECTIONS,
        machine=report.machine.get("words", "a machine that was not told"),
        engine=f"{report.engine} {report.versions.get(report.engine, '')}".strip(),
        created=moment(report.created),
        verdicts=report.verdicts,
        warnings=warnings(report),
        tiles=_tiles(report),
        load=load_line(report),
        labels=[{"name": label, "class": series(i)} for i, label in enumerate(labels)],
        field=_field(report),
        reading=_reading(report),
        ratio_plot=ratios and _drawn(ratios),
        load_plots=[_drawn(p) for p in load_plots(report)],
        memory_plot=memory and _drawn(memory),
        unchecked=[f"{label}: {q['unchecked']}" for label, q in report.quality.items() if q.get("unchecked")],
        quality_head=["", *labels],
        quality_rows=proof_rows(labels, {k: dict(v) for k, v in report.quality.items()}),
        quality_plots=[_drawn(p) for p in plots],
        task_head=task_head,
        task_rows=task_rows,
        stage_plot=stages and _drawn(stages),
        stage_sizes=_stage_sizes(report),
        answers=[_answer(one, folder, labels) for one in report.answers],
        carries=_carries(report),
        facts=_facts(report),
        subjects=_subjects(report),
        again=report.settings.get("command"),
        missing=MISSING,
        mmq=report.versions.get("mmq", __version__),
    )


def write_page(report: Report, folder: Path) -> Path:
    """Write report.html into `folder`, beside report.json; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / PAGE
    path.write_text(page(report, folder), encoding="utf-8")
    return path


def title(report: Report) -> str:
    """What is compared, of which model where one is common to all."""
    models = {str(s["base"]["model"]) for s in report.subjects.values() if isinstance(s.get("base"), Mapping)}
    what = " against ".join([next(iter(report.numbers)), ", ".join(list(report.numbers)[1:])]).removesuffix(" against ")
    return f"{models.pop()}: {what}" if len(models) == 1 else what


def moment(created: str) -> str:
    """2026-11-21 15:02 UTC, of a time in ISO 8601; other words stay as they are."""
    try:
        return datetime.datetime.fromisoformat(created).astimezone(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    except ValueError:
        return created


@cache
def _template() -> Any:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_shipped("report.html"))


def _shipped(name: str) -> str:
    return (SHIPPED / name).read_text(encoding="utf-8")


def _drawn(plot: Plot) -> dict[str, Any]:
    """The plot for the template: its drawings are markup, which svg.py made and escaped."""
    return {**vars(plot), "wide": Markup(plot.wide), "narrow": Markup(plot.narrow)}


# the table of the field


def _field(report: Report) -> list[tuple[str, list[dict[str, Any]]]]:
    """(group, its rows): every measure that any label has, in the order of the field, then what is besides."""
    words = {"vram": amount(report.settings["vram"]), "context": report.settings["context"]}
    titles = {key: text.format(**words) for key, text in ROWS}
    present = dict.fromkeys(key for found in report.numbers.values() for key in found)
    known = [key for key in titles if key in present]
    groups: dict[str, list[dict[str, Any]]] = {"Speed": [], "Memory": [], "Besides": []}
    for key in [*known, *(key for key in present if key not in titles)]:
        unit = next(found[key].unit for found in report.numbers.values() if key in found)
        group = "Memory" if unit in ("bytes", "tokens", "sequences") else "Speed"
        name = titles.get(key) or BESIDES.get(key) or f"{key.replace('_', ' ')} ({unit})"
        groups[group if key in titles else "Besides"].append(_row(report, key, name))
    return [(group, rows) for group, rows in groups.items() if rows]


def _row(report: Report, key: str, name: str) -> dict[str, Any]:
    first, *others = report.numbers
    found = {label: numbers.get(key) for label, numbers in report.numbers.items()}
    hows = {f.how for f in found.values() if f is not None}
    how = hows.pop() if len(hows) == 1 else ""
    base = found[first]
    return {
        "title": name,
        "how": "" if how == "measured" else how,
        "cells": [_cell(f, told=bool(how)) for f in found.values()],
        "ratios": [_ratio(key, found[o], base, report.ratios.get(o, {}).get(key)) for o in others],
    }


def _cell(figure: Figure | None, *, told: bool) -> dict[str, str]:
    """A figure, with how it came about where its row has not told that, and the range of its runs."""
    if figure is None:
        return {"value": "-", "detail": ""}
    details = [] if told else [figure.how]
    if figure.low is not None and figure.high is not None and figure.high > figure.low:
        low, high = (show(Figure(v, figure.unit, figure.how)) for v in (figure.low, figure.high))
        details.append(f"{low} to {high}")
    return {"value": show(figure), "detail": ", ".join(details)}


def _ratio(key: str, figure: Figure | None, base: Figure | None, known: Ratio | None) -> dict[str, str]:
    """A ratio, coloured where it is beyond its interval; amounts of memory and room have none to be beyond of."""
    if known is None and (figure is None or base is None or not base.value):
        return {"value": "-", "detail": "", "class": ""}
    if known is None:
        assert figure is not None
        assert base is not None
        known = Ratio(figure.value / base.value, None, None)
        sure = figure.unit in ("bytes", "tokens", "sequences") and abs(known.value - 1) >= 0.005
    else:
        sure = known.low is not None and known.high is not None and not known.low <= 1 <= known.high
    way = better(key) * (known.value > 1 or -1)
    return {"value": times(known.value), "detail": interval(known), "class": {1: "good", -1: "bad"}.get(way * sure, "")}


def _reading(report: Report) -> str:
    """How the table is to be read."""
    said = "Under a figure: the lowest and highest of its runs."
    known = [r for found in report.ratios.values() for r in found.values() if r.low is not None]
    if known:
        pairs = max(r.pairs for r in known)
        said += f" Under a ratio: its {known[0].level:.0%} interval, from {pairs} interleaved pairs of runs;"
        said += " coloured where that leaves out 1."
    else:
        said += " Ratios of speeds have no interval here: too few pairs of runs were interleaved."
    return said


def _tiles(report: Report) -> list[dict[str, Any]]:
    """The headline: a few measures as ratios to the first label, or alone where there is only one."""
    first, *others = report.numbers
    tiles = []
    for key, name in TILES:
        lines = []
        for label in others or [first]:
            figure, base = report.numbers[label].get(key), report.numbers[first].get(key)
            if figure is None or base is None or (others and not base.value):
                continue
            if others:
                cell = _ratio(key, figure, base, report.ratios.get(label, {}).get(key))
                lines.append({"value": cell["value"], "class": cell.get("class", ""), "label": label,
                              "detail": change(base, figure)})  # fmt: skip
            else:
                lines.append({"value": show(figure), "class": "", "label": figure.how, "detail": ""})
        if lines:
            tiles.append({"title": name, "lines": lines})
    return tiles


# quality, stages, answers


def _tasks(report: Report) -> tuple[list[str], list[list[str]]]:
    """Rows "task, metric" with each label's value, and its standard error where the task tells one."""
    found = {label: q.get("tasks") or {} for label, q in report.quality.items()}
    names = list(
        dict.fromkeys((t, m) for tasks in found.values() for t, ms in tasks.items() for m in ms if m != "stderr")
    )
    rows = []
    for task, metric in names:
        cells = []
        for label in report.numbers:
            values = found.get(label, {}).get(task, {})
            error = values.get("stderr")
            value = values.get(metric)
            text = "-" if value is None else f"{value:.4g}" if isinstance(value, int | float) else str(value)
            cells.append(text + (f" ± {error:.2g}" if isinstance(error, int | float) and value is not None else ""))
        rows.append([f"{task}, {metric}", *cells])
    return ["", *report.numbers], rows


def _stage_sizes(report: Report) -> str:
    sizes = report.settings.get("stages")
    if not isinstance(sizes, Mapping):
        return "One request alone on the server; under load the stages of several overlap."
    height, width = sizes.get("picture", (0, 0))
    pictures = f"{sizes['pictures']} picture(s) of {height} x {width}" if sizes.get("pictures") else "no picture"
    return (
        f"One request alone on the server, {pictures}, {sizes.get('prompt_tokens', '?')} tokens in with them and "
        f"{sizes.get('output_tokens', '?')} out; the median of {sizes.get('rounds', '?')} rounds by "
        f"{sizes.get('clock', 'some')} clock. Under load the stages of several overlap."
    )


def _answer(one: Mapping[str, Any], folder: Path, labels: Sequence[str]) -> dict[str, Any]:
    said: Mapping[str, str] = one.get("answers", {})
    own = said.get(labels[0]) if labels else None
    alike: dict[str, list[str]] = {}
    for label, text in {**({"reference": one["reference"]} if one.get("reference") else {}), **said}.items():
        alike.setdefault(str(text), []).append(label)
    shown, problem = inlined(folder, str(one.get("picture", "")))
    return {
        "picture": shown and shown[0],
        "width": shown and shown[1],
        "height": shown and shown[2],
        "alt": problem or str(one.get("task") or one.get("question", "")),
        "question": one.get("question", ""),
        "answers": [{"labels": " · ".join(who), "pieces": compared(text, own or text)} for text, who in alike.items()],
    }


def compared(text: str, other: str) -> list[tuple[bool, str]]:
    """The text in pieces (differs, words): what `other` has not at this place, by words or Chinese characters."""
    mine, theirs = (re.findall(r"\s+|[\u3400-\u9fff]|\w+|[^\w\s]", t) for t in (text, other))
    pieces = []
    for kind, a, b, _, _ in difflib.SequenceMatcher(None, mine, theirs, autojunk=False).get_opcodes():
        if b > a:
            pieces.append((kind != "equal", "".join(mine[a:b])))
    return pieces or [(bool(other), "(no answer)")]


def inlined(folder: Path, name: str) -> tuple[tuple[str, int, int] | None, str]:
    """((data URL, width, height), "") of a picture in `folder`, made small; or (None, why there is none).

    Only a plain name is looked up: a report may come from anybody, and a page must not take in other files.
    """
    if not name or Path(name).name != name or name in (".", ".."):
        return None, f"the report names no picture of its own folder: {name or 'none'}"
    try:
        with Image.open(folder / name) as opened:
            opened.draft("RGB", (PICTURE, PICTURE))
            small = opened.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as e:
        return None, f"{name} is not here, or no picture ({type(e).__name__})"
    small.thumbnail((PICTURE, PICTURE))
    kinds = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 85})):
        held = io.BytesIO()
        small.save(held, kind, **options)
        kinds.append((len(held.getvalue()), kind, held.getvalue()))
    _, kind, data = min(kinds)
    return (f"data:image/{kind};base64,{base64.b64encode(data).decode()}", *small.size), ""


# what it stands on


def _carries(report: Report) -> list[str]:
    """What holds elsewhere: the report's own sentences, or what is true of any; then the figures that are projected."""
    told = report.settings.get("carries_over")
    where = report.machine.get("words", "this machine")
    rooms = {n[k].how for n in report.numbers.values() for k in ("max_batch", "max_length") if k in n}
    lines = list(told) if told else [
        "Memory of the model and of the cache's tokens carries over to any card.",
        f"Max batch and max length for {amount(report.settings['vram'])}: {' and '.join(sorted(rooms)) or 'not told'}.",
        f"Speeds, latencies and stages do not carry over; they are those of {where}.",
    ]  # fmt: skip
    for label, found in report.numbers.items():
        for key, figure in found.items():
            if figure.how == "projected":
                lines.append(f"{label}: {key.replace('_', ' ')} {number_of(figure.value)} {figure.unit}, projected.")
    return lines


def _facts(report: Report) -> list[tuple[str, str]]:
    settings = report.settings
    found = [
        ("Machine", f"{report.machine.get('words', '?')}, {report.machine.get('system', '?')}"),
        ("Engine", report.engine),
        ("Versions", ", ".join(f"{name} {number}" for name, number in report.versions.items())),
        ("Load", load_line(report)),
        ("Memory asked for", f"{amount(settings['vram'])}, {settings['context']:,} tokens a sequence"),
    ]
    if "budget_given_to_engine" in settings:
        found.append(("The engine was held to it", "yes" if settings["budget_given_to_engine"] else "no"))
    return [*found, ("Taken", moment(report.created))]


def _subjects(report: Report) -> list[dict[str, str]]:
    shown = []
    for label, subject in report.subjects.items():
        parts = [str(subject.get("path", ""))]
        parts += [str(subject[k]) for k in ("method", "format") if subject.get(k)]
        if subject.get("group_size"):
            parts.append(f"groups of {subject['group_size']}")
        digest = str(subject.get("digest", "?"))
        what, command = " · ".join(parts), str(subject.get("command", ""))
        shown.append({"label": label, "what": what, "digest": digest, "command": command})
    return shown
