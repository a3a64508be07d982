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
from torch import Tensor

from ..export.artifact import Artifact
from ..export.view import packed_linears, view
from ..quantize.inputs import answer_mask, encode, suited
from ..quantize.lockstep import Lockstep
from ..quantize.plan import linears
from ..quantize.skeleton import Skeleton, build, load_layer, load_outside, release, release_layer, vision
from ..quantize.source import open_source
from ..recipes.progress import Step, Tell, silent
from ..recipes.recipe import Limits
from ..recipes.samples import Sample, blind
from .generate import answers, fits
from .measure import Tokens, common_prefix, compare_logits, divergence, repeats, summary

Score = Callable[[Sample, str], bool]


@dataclass(frozen=True)
class Walked:
    """Both models on the same samples: `tokens` per sample, `blind` per sample with its pictures taken out (None where
    there are none), `effects` the mean KL that makes, (FP16, int4), and the error after each decoder layer."""

    tokens: tuple[Tokens, ...]
    blind: tuple[Tokens | None, ...]
    effects: tuple[tuple[float, float], ...]
    layers: tuple[float, ...]


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
            "kind": _kind(sample),
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


def _kind(sample: Sample) -> str:
    return "image" if sample.images or sample.videos else "text"


def walk_both(before: Skeleton, after: Skeleton, samples: Sequence[Sample], *, tell: Tell = silent) -> Walked:
    """One walk of both models over `samples` and, where there are pictures, over the same without them.

    ValueError when the two processors make different tokens of a sample.
    """
    pictured = [i for i, s in enumerate(samples) if _kind(s) == "image"]
    shown = [*samples, *(blind(samples[i]) for i in pictured)]
    encoded = [[encode(s, x) for x in shown] for s in (before, after)]
    for sample, a, b in zip(shown, *encoded, strict=True):
        if not torch.equal(a["input_ids"], b["input_ids"]):
            asked = next((m["content"] for m in sample.question.messages if m["role"] == "user"), "")
            raise ValueError(
                f"the artifact's processor or chat template reads a sample otherwise than its base: {asked}"
            )
    masks = [answer_mask(before, x, e["input_ids"]) for x, e in zip(shown, encoded[0], strict=True)]
    following = [e["input_ids"][0, 1:][m[:-1]] for e, m in zip(encoded[0], masks, strict=True)]
    layers: list[float] = []
    with torch.no_grad():
        load_outside(before)
        load_outside(after)
        one, two = (
            Lockstep(s.layers, [_hidden(s, e, m) for e, m in zip(inputs, masks, strict=True)])
            for s, inputs in zip((before, after), encoded, strict=True)
        )
        with one, two:
            for a, b in zip(one, two, strict=True):
                if a.index == 0:
                    release(before, vision(before))
                    release(after, vision(after))
                else:
                    layers.append(_mean_error([(x.hidden, y.hidden) for x, y in zip(a.calls, b.calls, strict=True)]))
                load_layer(before, a.index)
                load_layer(after, b.index)
                a.advance()
                b.advance()
                release_layer(before, a.index)
                release_layer(after, b.index)
                tell(Step("layer", a.index + 1, len(before.layers)))
        states = list(zip(one.results, two.results, strict=True))
        layers.append(_mean_error(states))
        heads = [_head(s) for s in (before, after)]
        behind = [m.numel() - 2 - int(m.nonzero()[-1]) for m in masks]
        tokens = [
            compare_logits(heads[0](a), heads[1](b), f, behind=n)
            for (a, b), f, n in zip(states, following, behind, strict=True)
        ]
        effects = []
        for number, index in enumerate(pictured):
            seen, unseen = states[index], states[len(samples) + number]
            fp16, int4 = (float(divergence(h(s), h(u)).mean()) for h, s, u in zip(heads, seen, unseen, strict=True))
            effects.append((fp16, int4))
    without = dict(zip(pictured, tokens[len(samples) :], strict=True))
    unseen = tuple(without.get(i) for i in range(len(samples)))
    return Walked(tuple(tokens[: len(samples)]), unseen, tuple(effects), tuple(layers))


def _head(skeleton: Skeleton) -> Callable[[Tensor], Tensor]:
    """The language model head in float32: 16-bit logits would add noise of their own to every KL."""
    head = skeleton.module.get_output_embeddings()
    weight, bias = head.weight.float(), None if head.bias is None else head.bias.float()
    return lambda hidden: torch.nn.functional.linear(hidden.float(), weight, bias)


def _hidden(skeleton: Skeleton, inputs: Mapping[str, Tensor], mask: Tensor) -> Callable[[], Tensor]:
    base = skeleton.module.base_model
    return lambda: base(**inputs, use_cache=False).last_hidden_state[0, mask]


def _mean_error(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Mean over samples of |b - a|^2 / |a|^2."""
    wide = ((a.float(), b.float()) for a, b in pairs)  # squares of large states overflow fp16
    return statistics.fmean(float((b - a).square().sum() / a.square().sum().clamp_min(1e-30)) for a, b in wide)


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
        part = [t for t, s in zip(walked.tokens, samples, strict=True) if _kind(s) == kind]
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
