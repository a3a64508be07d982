"""The gate before publishing: has this very artifact been checked, and is it within its recipe's limits?

Reads what `mmq check` left beside the artifact, and holds the numbers to the limits of the manifest's recipe anew: a
report of another artifact, of other limits or of numbers that are none does not open it. Measures nothing.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..export.artifact import Artifact
from ..export.card import Check, Row
from ..recipes.plain import read_json, shown
from ..recipes.recipe import Limits
from .verdict import SHOWN, limits_of

CHECK = "check.json"
KINDS = {"measures": dict, "limits": dict, "failures": list}
TABLE = (  # the card's, in its order; each with image.* and text.* beside it where they were taken
    *("mean_kl", "p99_kl", "soft_kl", "top1", "perplexity_ratio", "same_answer", "image_effect"),
    *("accuracy_fp16", "accuracy_int4", "served_to_int4", "served_to_fp16"),
)


@dataclass(frozen=True)
class Gate:
    """`reports`: file name -> the check's JSON without its samples, of this artifact alone. `failures`: one line for
    each limit passed. `missing`: why there is no check to judge by, "" where there is one."""

    reports: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    failures: tuple[str, ...] = ()
    missing: str = ""

    @property
    def open(self) -> bool:
        """Whether the artifact may be published."""
        return not self.failures and not self.missing


def gate(artifact: Artifact) -> Gate:
    """What the reports beside the artifact say of it. OSError where a report cannot be read."""
    limits = limits_of(artifact)
    found = {path.name: _read(path) for path in sorted(artifact.path.glob("check*.json"))}
    mine = {name: r for name, r in found.items() if r.get("kind") == "check" and r.get("digest") == artifact.digest}
    failures = [f"{name}: {line}" for name, report in mine.items() for line in judge(report, limits)]
    missing = ""
    if CHECK not in mine:
        why = "is of another artifact" if CHECK in found else "is not there"
        run = shlex.join(["mmq", "check", str(artifact.path)])
        missing = f"{artifact.path / CHECK} {why}: run `{run}` first, or publish with --no-gate"
    return Gate(mine, tuple(failures), missing)


def _read(path: Path) -> dict[str, Any]:
    try:
        data = read_json(path)
    except ValueError:
        data = None
    if not isinstance(data, dict) or any(type(data.get(key, kind())) is not kind for key, kind in KINDS.items()):
        raise OSError(f"{path} is damaged; run the check again, or take the file away")
    return {k: v for k, v in data.items() if k != "samples"}  # answers to what may be the user's own questions


def judge(report: Mapping[str, Any], limits: Limits) -> list[str]:
    """Why a check does not pass `limits`, a line each: its own failures, measures past a limit, measures not taken."""
    measures: Mapping[str, Any] = report.get("measures") or {}
    failures: list[str] = [str(line) for line in report.get("failures") or ()]
    named = " ".join(failures)
    numbers = {key: value for key, value in measures.items() if _is_number(value)}
    for key in sorted(measures.keys() - numbers.keys()):
        failures.append(f"{key} is {shown(str(measures[key]))[:40]}, which is no number")
    for key, _, sign in SHOWN:
        bound = getattr(limits, key) if sign else None
        value = numbers.get(key)
        if bound is None or value is None or key in named:
            continue
        if not (value <= bound if sign == "<=" else value >= bound):
            failures.append(f"{key} is {value:.4g}, the limit is {sign} {bound:g}")
    if not report.get("engine") and "mean_kl" not in measures:
        failures.append("mean_kl was not measured")
    if not report.get("passed") and not failures:
        failures.append("the report says that it did not pass, and not why")
    drop = numbers.get("accuracy_fp16", 0.0) - numbers.get("accuracy_int4", 0.0)
    if drop > limits.accuracy_drop and "accuracy" not in named:
        failures.append(f"accuracy drops by {drop:.4g}, the limit is <= {limits.accuracy_drop:g}")
    then = report.get("limits") or {}
    if any(getattr(limits, key, bound) != bound for key, bound in then.items()):
        failures.append("it was checked against other limits than the recipe's: run `mmq check` again")
    return failures


def _is_number(value: Any) -> bool:
    """Whether a measure is one; a whole number past what a float holds is none."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def quality_rows(found: Gate, limits: Limits) -> list[Row]:
    """The card's quality table: each measure over all samples, over those with pictures, and over text alone."""
    measures: dict[str, float] = {}
    for report in found.reports.values():
        measures = {**{k: v for k, v in report.get("measures", {}).items() if _is_number(v)}, **measures}
    signs = {key: sign for key, _, sign in SHOWN}
    rows = []
    for key in TABLE:
        if key in measures:
            bound = getattr(limits, key, None) if signs.get(key) else None
            limit = "" if bound is None else f"{signs[key]} {bound:g}".replace("<=", "≤").replace(">=", "≥")
            all_, image, text = (_shown(measures.get(name)) for name in (key, f"image.{key}", f"text.{key}"))
            rows.append(Row(key, all_, image, text, limit))
    return rows


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def checks_of(found: Gate) -> list[Check]:
    """What the quality table stands on, the files' own check first."""
    return [Check(r.get("engine"), _tokens(r), str(r.get("date"))[:10]) for r in found.reports.values()]


def _tokens(report: Mapping[str, Any]) -> int:
    said = report.get("measures", {}).get("tokens")
    return int(said) if _is_number(said) else 0
