"""What int4 loses at every position of held-out samples: a model kept whole, its states, and the study's measures.

Pebble answers with almost no entropy (6e-4 nats), so the mean KL on its answers is made by a handful of tokens: 20 of
9,910 made 91 to 97% of it, for good methods and worse ones. Beside it stand its median and measures that every
position feeds: the KL of both models' distributions at temperature SOFT, times SOFT squared (in
the limit half the variance of the logits' difference), and the relative error of the decoder's last hidden states.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..quantize.inputs import answer_mask, encode, media_mask
from ..quantize.skeleton import Skeleton, load_layer, load_outside
from ..recipes.samples import Sample
from .measure import compare_logits

KINDS = ("answer", "text", "image")  # an answer's positions, the other text, a picture's tokens


@dataclass(frozen=True)
class Asked:
    """Held-out samples, encoded once. `kinds`: per sample, for each position but the last, an index into KINDS."""

    samples: tuple[Sample, ...]
    inputs: tuple[Mapping[str, Tensor], ...]
    kinds: tuple[Tensor, ...]


def ask(base: Skeleton, held_out: Sequence[Sample]) -> Asked:
    """Encode `held_out`, each ending in an answer, and tell each position's kind."""
    inputs = [encode(base, s) for s in held_out]
    kinds = []
    for sample, one in zip(held_out, inputs, strict=True):
        ids = one["input_ids"]
        kind = torch.full_like(ids[0], KINDS.index("text"))
        kind[media_mask(base, ids)[0]] = KINDS.index("image")
        kind[answer_mask(base, sample, ids)] = KINDS.index("answer")
        kinds.append(kind[:-1])
    return Asked(tuple(held_out), tuple(inputs), tuple(kinds))


def states(skeleton: Skeleton, asked: Asked) -> list[Tensor]:
    """What leaves the decoder, final norm included: per sample, float32 [tokens - 1, hidden]. Keeps the model whole."""
    with torch.no_grad():
        load_outside(skeleton)
        for index in range(len(skeleton.layers)):
            load_layer(skeleton, index)
        base = skeleton.module.base_model
        return [base(**i, use_cache=False).last_hidden_state[0, :-1].float() for i in asked.inputs]


def compare(
    asked: Asked, before: Sequence[Tensor], after: Sequence[Tensor], head: Tensor, head_after: Tensor | None = None
) -> dict[str, Any]:
    """Measures by kind, and the raw samples. States are [tokens - 1, hidden], heads [vocabulary, hidden]; without
    `head_after` both models have the same head.

    A sample is right when every token of its answer is the likeliest after the true ones before it: then, and only
    then, greedy decoding says exactly this answer.
    """
    other = head if head_after is None else head_after
    found: dict[str, list[Tensor]] = {k: [] for k in ("kl", "soft", "error", "agree", "entropy")}
    raw = []
    for sample, inputs, kind, a, b in zip(asked.samples, asked.inputs, asked.kinds, before, after, strict=True):
        following = inputs["input_ids"][0, 1:]
        x, y = a @ head.T, b @ other.T
        tokens = compare_logits(x, y, following)
        p = x.log_softmax(-1)
        error = (b - a).square().sum(-1) / a.square().sum(-1)
        parts = (tokens.kl, tokens.soft, error, tokens.agree.float(), -(p.exp() * p).sum(-1))
        for name, part in zip(found, parts, strict=True):
            found[name].append(part)
        answer = kind == KINDS.index("answer")
        raw.append(
            {
                "task": sample.task,
                "image": bool(sample.images or sample.videos),
                "right": bool((y.argmax(-1) == following)[answer].all()),
                "right_fp16": bool((x.argmax(-1) == following)[answer].all()),
                "kl": _digits(parts[0][answer].mean()),
                "soft": _digits(parts[1][answer].mean()),
            }
        )
    joined, kinds = {name: torch.cat(parts) for name, parts in found.items()}, torch.cat(list(asked.kinds))
    measures: dict[str, float] = {}
    for index, kind in enumerate(KINDS):
        mine = kinds == index
        if not bool(mine.any()):
            continue
        measures |= {f"{kind}.{name}": _digits(values[mine].mean()) for name, values in joined.items()}
        measures |= {f"{kind}.{name}_p99": _digits(joined[name][mine].quantile(0.99)) for name in ("kl", "soft")}
        kl = joined["kl"][mine].sort(descending=True).values
        measures[f"{kind}.kl_median"] = _digits(kl.median())
        measures[f"{kind}.kl_top20_share"] = _digits(
            kl[:20].sum() / kl.sum().clamp_min(1e-30)
        )  # is the mean 20 tokens?
        measures[f"{kind}.tokens"] = float(mine.sum())
    for name in ("right", "right_fp16"):
        measures[name] = statistics.fmean(r[name] for r in raw)
    return {"measures": measures, "samples": raw}


def _digits(value: Tensor) -> float:
    return float(f"{float(value):.6g}")
