"""The table of the field for a page: every measure that was taken, in groups, with ranges and ratios.

The rows that the terminal shows are table.py's, and so are their titles; nothing measured is left out here.
"""

from __future__ import annotations

from typing import Any

from .headline import ratio_cell
from .report import Figure, Report
from .show import amount, show
from .table import ROWS, tails

BESIDES = {
    "startup": "start of the server (s)",
    "kv_token": "cache of one token",
}


def field(report: Report) -> list[tuple[str, list[dict[str, Any]]]]:
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
        "ratios": [ratio_cell(key, found[o], base, report.ratios.get(o, {}).get(key)) for o in others],
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


def reading(report: Report) -> str:
    """How the table is to be read."""
    said = " ".join(filter(None, ["Under a figure: the lowest and highest of its runs.", tails(report)]))
    if len(report.numbers) == 1:
        return said
    known = [r for found in report.ratios.values() for r in found.values() if r.low is not None]
    if known:
        pairs = max(r.pairs for r in known)
        said += f" Under a ratio: its {known[0].level:.0%} interval, from {pairs} pairs taken in turns;"
        said += " coloured where that leaves out 1. Of twenty such intervals one misses the truth."
        said += " A ratio is of the pairs, one by one, so that it need not be the quotient of the two medians."
    else:
        said += " Ratios of speeds have no interval here: too few runs were taken in turns."
    return said
