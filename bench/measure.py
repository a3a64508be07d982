"""What int4 loses, token by token: pure functions of logits. Knows no model and no file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SOFT = 4.0  # the temperature at which distributions are compared once more


@dataclass(frozen=True)
class Tokens:
    """Two models on the same tokens. All float32 or bool, [tokens]; KL in nats, `nll` of the token that follows.

    `soft` is the KL at temperature SOFT, times SOFT squared: in the limit half the variance of the logits' difference.
    The mean KL of a model that is sure of its answers is made by a handful of tokens; this one's every token feeds.
    `behind`: how many more tokens stand after these in their sequence.
    """

    kl: Tensor
    soft: Tensor
    agree: Tensor
    nll_before: Tensor
    nll_after: Tensor
    finite: bool
    behind: int = 0


def compare_logits(before: Tensor, after: Tensor, following: Tensor, *, behind: int = 0) -> Tokens:
    """KL(before || after) over the whole vocabulary, top-1 agreement and surprise, for logits [tokens, vocabulary].

    following: int64 [tokens], the token that in fact comes next.
    """
    p, q = before.float().log_softmax(-1), after.float().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).clamp_min(0).cpu()
    soft = divergence(before.float() / SOFT, after.float() / SOFT) * SOFT**2
    agree = before.argmax(-1) == after.argmax(-1)
    at = following[:, None]
    finite = bool(torch.isfinite(after).all())
    was, now = (-x.gather(1, at)[:, 0].cpu() for x in (p, q))
    return Tokens(kl, soft, agree.cpu(), was, now, finite, behind)


def divergence(before: Tensor, after: Tensor) -> Tensor:
    """KL(before || after) in nats, [tokens], from logits [tokens, vocabulary]."""
    p, q = before.float().log_softmax(-1), after.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).clamp_min(0).cpu()


def summary(parts: Sequence[Tokens]) -> dict[str, float]:
    """mean_kl, p99_kl, soft_kl, top1, perplexity_fp16, perplexity_int4 and their ratio, over the tokens of `parts`."""
    kl = torch.cat([p.kl for p in parts])
    before, after = (torch.cat([getattr(p, n) for p in parts]).mean().exp() for n in ("nll_before", "nll_after"))
    return {
        "tokens": kl.numel(),
        "mean_kl": float(kl.mean()),
        "p99_kl": float(kl.quantile(0.99)),
        "soft_kl": float(torch.cat([p.soft for p in parts]).mean()),
        "top1": float(torch.cat([p.agree for p in parts]).float().mean()),
        "perplexity_fp16": float(before),
        "perplexity_int4": float(after),
        "perplexity_ratio": float(after / before),
    }


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two answers share from the start."""
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count


def repeats(tokens: Sequence[int], *, times: int = 4, longest: int = 16) -> bool:
    """True when the answer ends in a loop: a run of at most `longest` tokens, said `times` times or more in a row."""
    for width in range(1, longest + 1):
        tail = list(tokens[-width * times :])
        if len(tail) == width * times and all(tail[i] == tail[i % width] for i in range(len(tail))):
            return True
    return False
