"""The check: an artifact against its own FP16 base, walked in lockstep on held-out samples, and held to limits.

What it knows of the artifact it reads from the artifact's own folder: weights, vision tower, processor, chat template.
Knows no algorithm and no engine; `served.py` asks the same of a served artifact.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..export.artifact import Artifact
from ..export.view import packed_linears, view
from ..quantize.inputs import encode, suited
from ..quantize.plan import linears
from ..quantize.skeleton import Skeleton, build
from ..quantize.source import open_source
from ..recipes.progress import Tell, silent
from ..recipes.recipe import Limits
from ..recipes.samples import Sample
from .generate import answers, fits
from .measure import common_prefix, repeats, summary
from .walked import Walked, kind_of, walk_both

Score = Callable[[Sample, str], bool]


@dataclass(frozen=True)
class Checked:
    """What a check found. `measures`: flat name -> number. `failures`: one line each, naming measure, value and limit.
    `layers`: relative squared error of the hidden states that leave each decoder layer. `samples`: raw, per sample."""

    measures: Mapping[str, float]
    failures: tuple[str, ...]
    layers: tuple[float, ...]
    samples: tuple[Mapping[str, Any], ...]


def check(
    artifact: Artifact,
    base: Path,
    *,
    samples: Sequence[Sample],
    limits: Limits,
    score: Score | None = None,
    device: str = "cpu",
    max_new_tokens: int = 64,
    trust: bool = False,
    tell: Tell = silent,
) -> Checked:
    """Compare `artifact` with the checkpoint in `base` on `samples`, each ending in a reference answer.

    `score` tells a right answer (then task accuracy is measured and held to its limit too); with `trust` the
    checkpoint's own Python may run. ValueError when there is nothing to compare or the two disagree on what a sample's
    tokens are; OSError as the files give it.
    """
    samples = [s for s in samples if s.answer]
    if not samples:
        raise ValueError("no sample to check on: each must end in an assistant's answer")
    before = build(base, device=device, trust=trust)
    after = build(artifact.path, source=view(artifact.path), device=device, trust=trust)
    samples = suited(before, samples)
    coverage = _coverage(artifact, before)
    with torch.no_grad():
        walked = walk_both(before, after, samples, tell=tell)
        prompts = [[encode(s, x, prompt_only=True) for x in samples] for s in (before, after)]
        said = [
            answers(s, p, max_new_tokens=max_new_tokens, resident=fits(s), name=f"answers {n}", tell=tell)
            for s, p, n in zip((before, after), prompts, ("fp16", "int4"), strict=True)
        ]
    raw = [
        {
            "task": sample.task,
            "kind": kind_of(sample),
            "mean_kl": float(t.kl.mean()),
            "answer": sample.answer,
            "fp16": before.words.decode(a, skip_special_tokens=True),
            "int4": after.words.decode(b, skip_special_tokens=True),
            "prefix": common_prefix(a, b),
            "length": len(a),
            "repeats": repeats(b) and not repeats(a),
        }
        for sample, t, a, b in zip(samples, walked.tokens, *said, strict=True)
    ]
    measures = {**coverage, **_measures(samples, walked, raw)}
    if score is not None:
        measures |= _accuracy(samples, raw, score)
    return Checked(measures, tuple(_failures(measures, limits, walked.layers)), walked.layers, tuple(raw))


def _coverage(artifact: Artifact, before: Skeleton) -> dict[str, float]:
    """Of the linears that should be int4, how many are on disk; and how many are that should not be."""
    plan = linears(before, tuple(artifact.manifest["recipe"]["keep"]))
    intended = set()
    for index, groups in plan.items():
        names = before.layer_names(index)
        intended |= {names[f"{n}.weight"].removesuffix(".weight") for g in groups for n in g.linears}
    if artifact.manifest.get("head"):
        intended.add(artifact.manifest["head"]["name"])
    found = packed_linears(open_source(artifact.path).metas, artifact.format)
    return {"coverage": len(intended & found) / len(intended), "unintended": float(len(found - intended))}


def _measures(samples: Sequence[Sample], walked: Walked, raw: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    measures: dict[str, float] = dict(summary(walked.tokens))
    for kind in ("image", "text"):
        part = [t for t, s in zip(walked.tokens, samples, strict=True) if kind_of(s) == kind]
        if part:
            measures |= {f"{kind}.{name}": value for name, value in summary(part).items()}
    measures["finite"] = float(all(t.finite for t in walked.tokens))
    measures["prefix"] = statistics.fmean(r["prefix"] / max(r["length"], 1) for r in raw)
    measures["same_answer"] = statistics.fmean(float(r["fp16"] == r["int4"]) for r in raw)
    measures["repeating"] = statistics.fmean(float(r["repeats"]) for r in raw)
    if walked.effects:
        was, now = (statistics.fmean(e[i] for e in walked.effects) for i in (0, 1))
        measures |= {"image_effect_fp16": was, "image_effect_int4": now, "image_effect": now / max(was, 1e-9)}
    return measures


def _accuracy(samples: Sequence[Sample], raw: Sequence[Mapping[str, Any]], score: Score) -> dict[str, float]:
    """Share of right answers, overall and by task, FP16 and int4."""
    found = {}
    for which in ("fp16", "int4"):
        right = [score(s, r[which]) for s, r in zip(samples, raw, strict=True)]
        found[f"accuracy_{which}"] = statistics.fmean(right)
        for task in sorted({s.task for s in samples if s.task}):
            mine = [ok for ok, s in zip(right, samples, strict=True) if s.task == task]
            found[f"accuracy_{which}.{task}"] = statistics.fmean(mine)
    return found


def _failures(measures: Mapping[str, float], limits: Limits, layers: Sequence[float]) -> list[str]:
    """One line for each measure past its limit."""
    bounds = [
        ("coverage", ">=", 1.0),
        ("unintended", "<=", 0.0),
        ("finite", ">=", 1.0),
        ("mean_kl", "<=", limits.mean_kl),
        ("p99_kl", "<=", limits.p99_kl),
        ("top1", ">=", limits.top1),
        ("perplexity_ratio", "<=", limits.perplexity_ratio),
        ("repeating", "<=", limits.repeating),
    ]
    if limits.soft_kl is not None:
        bounds.append(("soft_kl", "<=", limits.soft_kl))
    if "image_effect" in measures:
        bounds.append(("image_effect", ">=", limits.image_effect))
    if "accuracy_int4" in measures:
        bounds.append(("accuracy_int4", ">=", measures["accuracy_fp16"] - limits.accuracy_drop))
    found = []
    for name, sign, bound in bounds:
        value = measures[name]
        good = value >= bound if sign == ">=" else value <= bound  # NaN is neither, so it fails
        if not good:
            found.append(f"{name} is {value:.4g}, the limit is {sign} {bound:.4g}")
    if found and len(layers) > 1:
        # 0.01 is about what honest int4 costs the first layer: below it, growth means nothing
        growth = [(now + 0.01) / (was + 0.01) for was, now in zip([0.0, *layers], layers, strict=False)]
        worst = max(range(len(growth)), key=growth.__getitem__)
        found.append(f"the error grows most in decoder layer {worst}: {layers[worst]:.3g} of the signal after it")
    return found
