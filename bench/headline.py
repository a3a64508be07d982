"""What a report says first: its title, its moment, the few measures that decide, each as a ratio to the first label.

Knows measures by their keys, and no way to show them: a page, a slide and a model card do.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any

from .intervals import unsure
from .report import Figure, Ratio, Report
from .show import better, change, interval, show, times

TILES = (
    ("weights", "Model memory"),
    ("output_rate", "Output tok/s"),
    ("tpot", "Time per output token (ms)"),
    ("max_batch", "Max batch"),
)
NEEDED = ("load", "vram", "context")  # of the settings
SURE = {"weights", "kv_token", "max_length", "max_batch"}


def shown(report: Report) -> Report:
    """The report, if it can be shown. ValueError for one of another kind, without figures or without conditions."""
    missing = [name for name in NEEDED if name not in report.settings]
    if report.kind != "bench" or not report.numbers or missing:
        what = f"without {', '.join(missing)} in its settings" if missing else "without figures"
        kind = f"of the kind {report.kind!r}" if report.kind != "bench" else what
        raise ValueError(f"a report {kind} cannot be shown; `mmq bench --compare` writes one that can")
    return report


def title(report: Report) -> str:
    """What is compared, of which model where one is common to all."""
    models = {str(s["base"]["model"]) for s in report.subjects.values() if isinstance(s.get("base"), Mapping)}
    first, *others = report.numbers
    what = f"{first} against {', '.join(others)}" if others else first
    return f"{models.pop()}: {what}" if len(models) == 1 else what


def moment(created: str) -> str:
    """2026-11-21 15:02 UTC, of a time in ISO 8601; other words stay as they are."""
    try:
        return datetime.datetime.fromisoformat(created).astimezone(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    except ValueError:
        return created


def tiles(report: Report) -> list[dict[str, Any]]:
    """The headline: a few measures as ratios to the first label, or alone where there is only one."""
    first, *others = report.numbers
    made = []
    for key, name in TILES:
        lines = []
        for label in others or [first]:
            figure, base = report.numbers[label].get(key), report.numbers[first].get(key)
            if figure is None or base is None or (others and not base.value):
                continue
            if others:
                cell = ratio_cell(key, figure, base, report.ratios.get(label, {}).get(key))
                lines.append({"value": cell["value"], "class": cell["class"], "label": label,
                              "detail": change(base, figure)})  # fmt: skip
            else:
                lines.append({"value": show(figure), "class": "", "label": figure.how, "detail": ""})
        if lines:
            made.append({"title": name, "lines": lines})
    return made


def ratio_cell(key: str, figure: Figure | None, base: Figure | None, known: Ratio | None) -> dict[str, str]:
    """A ratio, coloured where it is beyond its interval, or where no noise is in it (`SURE`)."""
    if known is None and (figure is None or base is None or not base.value):
        return {"value": "-", "detail": "", "class": ""}
    if known is None:
        assert figure is not None
        assert base is not None
        known = Ratio(figure.value / base.value, None, None)
        sure = key in SURE and abs(known.value - 1) >= 0.005
    else:
        sure = known.low is not None and known.high is not None and not known.low <= 1 <= known.high
        sure = sure and not unsure(known)
    way = better(key) * (known.value > 1 or -1)
    return {"value": times(known.value), "detail": interval(known), "class": {1: "good", -1: "bad"}.get(way * sure, "")}
