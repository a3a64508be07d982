"""A report as one HTML page that needs nothing else: no network, no script, its pictures inside it.

The page itself is page/report.html, a Jinja template that escapes every value: labels, paths and answers are other
people's words. Its style is allowed by its hash alone, so that no markup of theirs could bring another. What stands in
which section is here; the plots are plots.py's, the table field.py's, the answers beside.py's.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from .. import __version__
from .beside import answer
from .colours import series, shipped, variables
from .field import field, reading
from .headline import moment, shown, tiles, title
from .load_plots import load_plots
from .plot import Plot
from .plots import layer_plot, memory_plot, pareto_plot, ratio_plot, stage_plot
from .proof import rows as proof_rows
from .proof import task_rows
from .proof import unchecked as unchecked_lines
from .report import Report
from .show import amount, number_of, pictures
from .table import MODES, budget_line, load_line, tails, warnings

PAGE = "report.html"
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
    "load": "No latency against load: one level was run; `mmq bench --compare ... --sweep auto` goes up to saturation.",
    "memory": "No memory by part; `mmq plan ARTIFACT` computes it.",
    "quality": "No quality: nothing was checked; `mmq check ARTIFACT`, then `mmq bench` again, brings it in here.",
    "stages": "No stages: they were not timed; `mmq bench --compare ... --stages` times them.",
    "answers": "No answers: no question was asked; `mmq bench --compare ... --answers 8` asks some held-out samples.",
}


def page(report: Report, folder: Path) -> str:
    """The page. `folder` is where the report's pictures are; one that is missing there is told of in its place.

    ValueError for a report that cannot be shown.
    """
    shown(report)
    plots = [p for p in (layer_plot(report), pareto_plot(report)) if p is not None]
    style = variables() + shipped("chart.css") + shipped("report.css")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    labels, quality = list(report.numbers), {k: dict(v) for k, v in report.quality.items()}
    unchecked = unchecked_lines(quality)
    memory, stages, ratios = memory_plot(report), stage_plot(report), ratio_plot(report)
    load, answers = load_plots(report), [answer(one, folder, labels) for one in report.answers]
    there = {"load": load, "memory": memory, "quality": report.quality, "stages": stages, "answers": answers}
    missing = [line for section, line in MISSING.items() if not there[section]]
    return _template().render(
        title=title(report),
        style=Markup(style),
        style_hash=f"sha256-{digest}",
        sections=[(name, heading) for name, heading in SECTIONS if there.get(name, True)],
        machine=report.machine.get("words", "a machine that was not told"),
        engine=f"{report.engine} {report.versions.get(report.engine, '')}".strip(),
        created=moment(report.created),
        verdicts=report.verdicts,
        warnings=[line for line in warnings(report) if line not in unchecked],
        tiles=tiles(report),
        load=load_line(report),
        labels=[{"name": label, "class": series(i)} for i, label in enumerate(labels)],
        field=field(report),
        reading=reading(report),
        ratio_plot=ratios and _drawn(ratios),
        load_plots=[_drawn(p) for p in load],
        tails=tails(report, sweep=True),
        memory_plot=memory and _drawn(memory),
        budget=_memory_line(report),
        unchecked=unchecked,
        past=[
            f"{v} is past its recipe's limits: {'; '.join(q['failures'])}"
            for v, q in quality.items()
            if q.get("failures")
        ],
        quality_head=["", *labels],
        quality_rows=proof_rows(labels, quality),
        quality_plots=[_drawn(p) for p in plots],
        task_rows=task_rows(labels, quality),
        stage_plot=stages and _drawn(stages),
        stage_sizes=_stage_sizes(report),
        answers=answers,
        carries=_carries(report),
        facts=_facts(report),
        subjects=_subjects(report),
        again=report.settings.get("command"),
        missing=missing,
        mmq=report.versions.get("mmq", __version__),
    )


def write_page(report: Report, folder: Path, *, out: Path | None = None) -> Path:
    """Write report.html into `out`, or into `folder`, where the report and its pictures are; returns its path."""
    path = (out or folder) / PAGE
    text = page(report, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def coded(text: str) -> Markup:
    """A sentence whose `commands` are set as code; all else in it is escaped."""
    parts = text.split("`")
    if len(parts) % 2 == 0:  # a backtick too many is just that
        return escape(text)
    return Markup("").join(Markup("<code>{}</code>").format(p) if i % 2 else escape(p) for i, p in enumerate(parts))


@cache
def _template() -> Any:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["code"] = coded
    return environment.from_string(shipped("report.html"))


def _drawn(plot: Plot) -> dict[str, Any]:
    """The plot for the template: its drawings are markup, which svg.py made and escaped."""
    return {**vars(plot), "wide": Markup(plot.wide), "narrow": Markup(plot.narrow)}


# quality, stages, answers


def _stage_sizes(report: Report) -> str:
    sizes = report.settings.get("stages")
    if not isinstance(sizes, Mapping):
        return "One request alone on the server; under load the stages of several overlap."
    asked = pictures(sizes.get("pictures", 0), sizes.get("picture", (0, 0)))
    return (
        f"One request alone on the server, {asked}, {sizes.get('prompt_tokens', '?')} tokens in with them and "
        f"{sizes.get('output_tokens', '?')} out; the median of {sizes.get('rounds', '?')} rounds by "
        f"{sizes.get('clock', 'some')} clock. Under load the stages of several overlap."
    )


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
        ("Memory", _memory_line(report)),
    ]
    if len(report.numbers) > 1 and "interleave" in settings:
        found.append(("In turns", MODES[settings["interleave"]["mode"]]))
    return [*found, ("Taken", moment(report.created))]


def _memory_line(report: Report) -> str:
    """What the figures of memory are for, under a heading that says so already."""
    return budget_line(report).removeprefix("Memory: ")


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
