"""Quality beside speed: what `mmq check` found of an artifact, read back from its folder for a report of speeds.

A check counts only for the bytes it was made of: its digest must be the artifact's. Measures nothing itself.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from ..export.artifact import Artifact
from .find import Subject

CHECK = "check.json"
TABLE = (  # measure of the check, title of its row
    ("mean_kl", "mean KL to FP16 (nats a token)"),
    ("soft_kl", "KL at temperature 4"),
    ("top1", "top-1 agreement with FP16"),
    ("accuracy_int4", "right answers (held-out samples)"),
)


def proof(artifact: Artifact) -> dict[str, Any]:
    """{"measures", "layers", "passed", "failures", "date"} of the check beside the artifact, for `Report.quality`; or
    {"unchecked": why, and what to type} where there is none, or one of other weights. OSError for a broken file."""
    path = artifact.path / CHECK
    type_this = shlex.join(["mmq", "check", str(artifact.path)])
    if not path.is_file():
        return {"unchecked": f"not checked; {type_this}"}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        kept = {name: found[name] for name in ("measures", "layers", "passed", "failures", "date")}
        digest = found["digest"]
    except (ValueError, KeyError, TypeError) as e:
        raise OSError(f"{path} is no report of a check ({e!r}); write it anew: {type_this}") from None
    if digest != artifact.digest:
        return {"unchecked": f"{CHECK} is of other weights than these; {type_this}"}
    return kept


def quality(subjects: Sequence[Subject]) -> dict[str, dict[str, Any]]:
    """`Report.quality` of what is compared: each artifact's proof; a 16-bit checkpoint is what they are held against,
    and has none."""
    return {s.label: proof(s.artifact) for s in subjects if s.artifact is not None}


def unchecked(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A sentence for each artifact of which no check says how good it is."""
    return [f"{label}: {of['unchecked']}" for label, of in found.items() if "unchecked" in of]


def rows(labels: Sequence[str], found: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """[title, value of each label] for the table, where any of them was checked; "" for the reference itself."""
    made = []
    for key, title in TABLE:
        values = [_value(found.get(label, {}), key, _reference(found)) for label in labels]
        if any(v is not None for v in values):
            made.append([title, *("" if v is None else f"{v:.4g}" for v in values)])
    return made


def _value(quality: Mapping[str, Any], key: str, reference: float | None) -> float | None:
    if key == "accuracy_int4" and not quality.keys() & {"measures", "unchecked"}:  # it is the 16-bit model itself
        return reference
    return quality.get("measures", {}).get(key)


def _reference(found: Mapping[str, Mapping[str, Any]]) -> float | None:
    """The 16-bit model's own right answers, which every check of pictures with known answers has; None where checks
    were made on other samples."""
    told = {of["measures"].get("accuracy_fp16") for of in found.values() if "measures" in of}
    return told.pop() if len(told) == 1 else None


def task_rows(labels: Sequence[str], found: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """[task and metric, each label's score with its standard error] of the tasks that were asked."""
    tasks = {label: found.get(label, {}).get("tasks", {}) for label in labels}
    names = dict.fromkeys((t, m) for by in tasks.values() for t, scores in by.items() for m in scores if m != "stderr")
    return [[f"{task}, {metric}", *(_score(tasks[v].get(task, {}), metric) for v in labels)] for task, metric in names]


def _score(scores: Mapping[str, float], metric: str) -> str:
    if metric not in scores:
        return ""
    first = next(name for name in scores if name != "stderr")  # whose error "stderr" is
    error = f" ± {scores['stderr']:.2g}" if metric == first and "stderr" in scores else ""
    return f"{scores[metric]:.4g}{error}"
