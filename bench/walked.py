"""Two models walked in lockstep over the same samples: what they think of each answer's tokens, and without pictures.

Knows no artifact and no limit: two skeletons are held against each other.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..quantize.inputs import answer_mask, encode
from ..quantize.lockstep import Lockstep
from ..quantize.skeleton import Skeleton, load_layer, load_outside, release, release_layer, vision
from ..recipes.progress import Step, Tell, silent
from ..recipes.samples import Sample, blind
from .measure import Tokens, compare_logits, divergence


@dataclass(frozen=True)
class Walked:
    """Both models on the same samples: `tokens` per sample, `blind` per sample with its pictures taken out (None where
    there are none), `effects` the mean KL that makes, (FP16, int4), and the error after each decoder layer."""

    tokens: tuple[Tokens, ...]
    blind: tuple[Tokens | None, ...]
    effects: tuple[tuple[float, float], ...]
    layers: tuple[float, ...]


def kind_of(sample: Sample) -> str:
    """image (or video) or text."""
    return "image" if sample.images or sample.videos else "text"


def walk_both(before: Skeleton, after: Skeleton, samples: Sequence[Sample], *, tell: Tell = silent) -> Walked:
    """One walk of both models over `samples` and, where there are pictures, over the same without them.

    ValueError when the two processors make different tokens of a sample.
    """
    pictured = [i for i, s in enumerate(samples) if kind_of(s) == "image"]
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
