"""What fits: weights and cache in a budget of memory, computed from the files, or measured where an engine said so.

Knows arithmetic and safetensors headers, no engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..export.subject import read_subject
from ..serve.footprint import Footprint
from ..serve.shape import context_length, kv_token_bytes, read_config, tokens_in
from ..serve.weights import read_weights
from .report import Figure

RESERVE = 0.10  # of the budget: activations, CUDA graphs and the driver


@dataclass(frozen=True)
class Fit:
    """What a model takes and what a budget then holds. Bytes and tokens; `cache` is what is left for the cache."""

    weights: int
    kv_token: int
    cache: int
    max_length: int  # tokens of one sequence, at most the model's own context
    max_batch: int  # sequences of `context` tokens
    context: int


def weight_bytes(folder: Path) -> int:
    """Bytes of all tensors as an engine keeps them, by the files' headers. Errors as `read_subject`'s."""
    return read_weights(read_subject(folder)).total


def fit(folder: Path, *, budget: int, context: int, cache_tokens: int | None = None, weights: int | None = None) -> Fit:
    """What the checkpoint in `folder` does with `budget` bytes, `context` tokens a sequence.

    `cache_tokens` is an engine's own count for this budget, taken instead of the arithmetic (budget less weights
    less a reserve of 10%, divided by the bytes of a token); `weights` its bytes of them, where those differ from the
    files'.
    """
    if context < 1:
        raise ValueError(f"the context is {context}; it must be at least 1 token")
    config = read_config(folder)
    weights, kv_token = weights or weight_bytes(folder), kv_token_bytes(config)
    cache = max(0, int(budget * (1 - RESERVE)) - weights)
    tokens = cache_tokens if cache_tokens is not None else tokens_in(cache, kv_token)
    if cache_tokens is not None:
        cache = cache_tokens * kv_token
    return Fit(weights, kv_token, cache, min(tokens, context_length(config)), tokens // context, context)


def figures(
    folder: Path,
    *,
    budget: int,
    context: int,
    measured: Footprint | None = None,
    same_budget: bool = False,
    weights: int | None = None,
) -> dict[str, Figure]:
    """Model memory, cache bytes a token, max length and max batch, and the server's memory where it was measured.

    `same_budget` says that the engine ran with just this budget, so that its cache's size is the measured answer;
    `weights` as in `fit`.
    """
    tokens = measured.cache_tokens if measured and same_budget else None
    found = fit(folder, budget=budget, context=context, cache_tokens=tokens, weights=weights)
    how = "measured" if tokens is not None else "computed"
    loaded = measured.weights if measured else None
    result = {
        "weights": Figure(loaded or found.weights, "bytes", "measured" if loaded else "computed"),
        "kv_token": Figure(found.kv_token, "bytes", "computed"),
        "max_length": Figure(found.max_length, "tokens", how),
        "max_batch": Figure(found.max_batch, "sequences", how),
    }
    if measured and measured.resident is not None:
        result["server_memory"] = Figure(measured.resident, "bytes", "measured")
    if measured and measured.card is not None:
        result["card_memory"] = Figure(measured.card, "bytes", "measured")
    return result
