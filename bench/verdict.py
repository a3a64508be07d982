"""A check's result for readers: rows for the terminal, Markdown, and the JSON kept beside the artifact."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..export.artifact import MANIFEST, Artifact, write_json
from ..export.inert import inert
from ..recipes.recipe import Limits, limits_from
from .report import markdown_table, now, versions

if TYPE_CHECKING:
    from .check import Checked

SHOWN = (
    ("mean_kl", "mean KL to FP16 (nats a token)", "<="),
    ("p99_kl", "p99 KL", "<="),
    ("soft_kl", "mean KL at temperature 4, times 16", "<="),
    ("top1", "top-1 agreement", ">="),
    ("perplexity_ratio", "perplexity, int4 / FP16", "<="),
    ("image.mean_kl", "mean KL, image samples", ""),
    ("text.mean_kl", "mean KL, text samples", ""),
    ("image.soft_kl", "at temperature 4, image samples", ""),
    ("text.soft_kl", "at temperature 4, text samples", ""),
    ("image_effect", "effect of the picture, int4 / FP16", ">="),
    ("prefix", "identical greedy prefix (share of the answer)", ""),
    ("same_answer", "same greedy answer", ""),
    ("accuracy_fp16", "right answers, FP16", ""),
    ("accuracy_int4", "right answers, int4", ""),
    ("served_to_int4", "served logprobs, distance to the int4 weights", "<="),
    ("served_to_fp16", "served logprobs, distance to FP16", ""),
    ("served_image_effect", "effect of the picture, served / int4 weights", ""),
    ("coverage", "intended linears that are int4", ""),
)


def rows(result: Checked, limits: Limits) -> list[list[str]]:
    """[measure, value, limit] for each measure that was taken."""
    found = []
    for key, title, sign in SHOWN:
        if key in result.measures:
            bound = getattr(limits, key) if sign else None
            limit = "" if bound is None else f"{sign} {bound:g}"
            found.append([title, f"{result.measures[key]:.4g}", limit])
    return found


def facts(result: Checked) -> dict[str, Any]:
    """A check for programs."""
    return {"measures": dict(result.measures), "failures": list(result.failures)}


def in_short(result: Checked, where: Path) -> str:
    """One line; the report in the folder `where` has the rest."""
    kl, soft, same = (result.measures[name] for name in ("mean_kl", "soft_kl", "top1"))
    told = f"mean KL to FP16 {kl:.3g}, at temperature 4 {soft:.3g}, top-1 agreement {same:.4g}"
    return f"{told}; more in {where}/check.md"


def limits_of(artifact: Artifact) -> Limits:
    """What the artifact's recipe lets it lose."""
    return limits_from(artifact.manifest["recipe"].get("limits"), where=f"{artifact.path / MANIFEST}: limits")


def markdown(artifact: Artifact, result: Checked, limits: Limits) -> str:
    """The report as Markdown."""
    lines = [f"# Check of {inert(artifact.manifest['name'])}", ""]
    lines += [
        markdown_table(["measure", "value", "limit"], rows(result, limits)),
        "Passed." if not result.failures else "Failed:",
        *(f"- {inert(f)}" for f in result.failures),
        "",
    ]
    tasks = sorted(k.partition(".")[2] for k in result.measures if k.startswith("accuracy_fp16."))
    if tasks:
        pairs = [[f"{result.measures[f'accuracy_{w}.{task}']:.3f}" for w in ("fp16", "int4")] for task in tasks]
        named = [[task, *pair] for task, pair in zip(tasks, pairs, strict=True)]
        lines.append(markdown_table(["task", "FP16", "int4"], named))
    if result.layers:
        lines += ["Relative error of the hidden states after each decoder layer:", ""]
        lines += [f"- layer {i}: {e:.3e}" for i, e in enumerate(result.layers)]
    return "\n".join(lines) + "\n"


def write(artifact: Artifact, result: Checked, *, engine: str | None = None, asked: int | None = None) -> Path:
    """Write check.json and check.md (or check-ENGINE) into the artifact's folder; returns the JSON's path. `asked` is
    how many samples were wanted; an engine is asked fewer where some are videos. OSError where the folder takes no
    file."""
    path = artifact.path / (f"check-{engine}.json" if engine else "check.json")
    limits = limits_of(artifact)
    told = {
        "kind": "check",
        "artifact": artifact.manifest["name"],
        "digest": artifact.digest,
        "engine": engine,
        "date": now(),
        "passed": not result.failures,
        "failures": list(result.failures),
        "measures": dict(result.measures),
        "limits": dataclasses.asdict(limits),
        "layers": list(result.layers),
        "asked": asked,
        "samples": [dict(s) for s in result.samples],
        "versions": versions(),
    }
    try:
        write_json(path, told)
        path.with_suffix(".md").write_text(markdown(artifact, result, limits), encoding="utf-8")
    except OSError as e:
        why = f"the report cannot be written to {path} ({e.strerror})"
        raise OSError(f"{why}, and `mmq publish` wants it: check the artifact in a folder that takes files") from None
    return path
