"""What a run's results look like to readers: rows for the terminal, a Markdown page for a CI job's summary.

What recipes and errors say is anybody's text: on the page it is words, never markup.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..export.inert import inert
from ..recipes.terminal import human
from .done import Done, StepDone
from .report import markdown_table, read_report
from .table import table, warnings
from .verdict import SHOWN

HEAD = ("artifact", "state", "mean KL", "top-1", "weights", "time")
SIGNS = {"done": "✅", "past a limit": "❌", "not begun": "⬜", "interrupted": "⏸️"}
FAILED = "💥"
BOUNDS = {"<=": "≤", ">=": "≥"}
ADDRESSES = {"hf": "https://huggingface.co/{}", "modelscope": "https://modelscope.cn/models/{}"}


def rows(results: Sequence[Done]) -> list[list[str]]:
    """[artifact, state, mean KL to FP16, top-1 agreement, bytes of weights, seconds] a line."""
    return [
        [
            result.name,
            state(result),
            *(_measure(result.measures, name) for name in ("mean_kl", "top1")),
            human(result.bytes["artifact"]) if result.bytes else "",
            f"{sum(step.seconds for step in result.steps):.0f} s" if result.steps else "",
        ]
        for result in results
    ]


def state(result: Done) -> str:
    """The state in words, with the step that ended it, and whether anything was made at all."""
    if result.code and result.steps and result.steps[-1].code:
        return f"{result.state} ({result.steps[-1].name})"
    if result.state == "done" and not result.rebuilt:
        return "done before"
    return result.state


def _measure(measures: Mapping[str, float], name: str) -> str:
    return f"{measures[name]:.4g}" if name in measures else ""


def markdown(results: Sequence[Done]) -> str:
    """The page: one table of all, then what went wrong, then each artifact's figures, folded."""
    good = sum(result.state == "done" for result in results)
    lines = [f"# {good} of {len(results)} artifacts as they should be", ""]
    lines += [_row(HEAD), _row(["---"] * 2 + ["---:"] * (len(HEAD) - 2))]
    for result, row in zip(results, rows(results), strict=True):
        sign = SIGNS.get(result.state, FAILED)
        lines.append(_row([_code(row[0]), f"{sign} {inert(row[1])}", *map(inert, row[2:])]))
    if wrong := [result for result in results if result.why]:
        lines += ["", "## What went wrong", ""]
        for result in wrong:
            lines += [f"- {_code(result.name)}: {inert(result.why[0])}", *(f"  - {inert(w)}" for w in result.why[1:])]
    for result in results:
        lines += ["", *_about(result)] if result.steps else []
    return "\n".join(lines) + "\n"


def _about(result: Done) -> list[str]:
    lines = [f"<details><summary>{inert(result.name)}</summary>", ""]
    lines += [_row(["step", "", "time"]), _row(["---", "---", "---:"])]
    lines += [_row([step.name, _step(step), "" if step.kept else f"{step.seconds:.1f} s"]) for step in result.steps]
    if result.measures:
        lines += ["", _row(["measure", "value", "limit"]), _row(["---", "---:", "---:"])]
        for name, title, sign in SHOWN:
            if name in result.measures:
                limit = result.limits.get(name) if sign else None
                told = "" if limit is None else f"{BOUNDS[sign]} {limit:g}"
                lines.append(_row([title, _measure(result.measures, name), told]))
    if result.bench:
        lines += ["", *_speeds(Path(result.bench))]
    if result.bytes:
        lines += ["", f"- weights: {human(result.bytes['base'])} → {human(result.bytes['artifact'])}"]
    told = {"digest": result.digest, "key": result.key, "recipe": result.recipe}
    lines += [f"- {name}: {_code(value)}" for name, value in told.items() if value]
    lines += [f"- published: {_link(address)}" for address in result.published]
    return [*lines, "", "</details>"]


def _step(step: StepDone) -> str:
    return "kept" if step.kept else "done" if step.code == 0 else f"exit code {step.code}"


def _speeds(file: Path) -> list[str]:
    """The bench's table and what must be known before it is believed; nothing where its report cannot be read."""
    try:
        report = read_report(file)
    except (OSError, ValueError):
        return []
    found = [markdown_table(*table(report))] if report.numbers else []
    return [*found, *(f"- {inert(line)}" for line in warnings(report))]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _code(text: str) -> str:
    return f"`{' '.join(text.split()).replace('`', '').replace('|', '')}`"


def _link(address: str) -> str:
    hub, _, name = address.partition(":")
    if hub in ADDRESSES and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return f"<{ADDRESSES[hub].format(name)}>"
    return _code(address)
