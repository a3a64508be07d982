"""What fits: weights and cache on a card, by the planner's bill, or measured where an engine said so.

Knows plans, safetensors headers and an engine's log; starts nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..export.subject import read_subject
from ..serve.bill import read_model
from ..serve.footprint import Footprint
from ..serve.machine import GIB, Gpu
from ..serve.plan_flags import asked_in
from ..serve.planner import Plan, planned
from ..serve.shape import context_length, kv_token_bytes, read_config, tokens_in
from ..serve.weights import read_weights
from .report import Figure

RESERVE = 0.10  # of the card, for activations and the driver, where no bill can be drawn up
PARTS = {  # a line of the bill, by how its name begins -> a part of the stack
    "weights": "weights",
    "vision tower at work": "activations",
    "decoder at work": "activations",
    "sampling": "activations",
    "picture features": "activations",
    "CUDA graphs": "graphs",
}
STACK = ("weights", "cache", "activations", "graphs", "other")
GRAPHS = re.compile(r"Graph capturing finished in .* took ([\d.]+) GiB")
PASSES = re.compile(r"torch peak memory increase: ([\d.]+)GiB")  # where vLLM logs for debugging


@dataclass(frozen=True)
class Fit:
    """What a model takes and what a card then holds. Bytes and tokens; `cache` is what is left for the cache, `plan`
    the bill that says so, None where it was the flat reserve."""

    weights: int
    kv_token: int
    cache: int
    max_length: int  # tokens of one sequence, at most the model's own context
    max_batch: int  # sequences of `context` tokens
    context: int
    plan: Plan | None = None


def weight_bytes(folder: Path) -> int:
    """Bytes of all tensors as an engine keeps them, by the files' headers. Errors as `read_subject`'s."""
    return read_weights(read_subject(folder)).total


def fit(
    folder: Path,
    *,
    card: Gpu,
    context: int,
    flags: Sequence[str] = (),
    billed: bool = True,
    cache_tokens: int | None = None,
    weights: int | None = None,
) -> Fit:
    """What the checkpoint in `folder` does on `card`, `context` tokens a sequence, under vLLM with `flags`.

    By the planner's bill; without one (another engine: `billed` False; a config that it cannot read) the card less a
    reserve of 10% less the weights. `cache_tokens` is an engine's own count on this card, which wins; `weights` its
    bytes of them, where those differ from the files'.
    """
    if context < 1:
        raise ValueError(f"the context is {context}; it must be at least 1 token")
    config = read_config(folder)
    longest = context_length(config)
    weights, kv_token = weights or weight_bytes(folder), kv_token_bytes(config)
    plan = bill(folder, card=card, context=context, flags=flags) if billed else None
    if plan is not None:
        cache, tokens, kv_token, top = plan.cache, plan.tokens, plan.kv_token, plan.max_context
    else:
        cache = max(0, int(card.memory * (1 - RESERVE)) - weights)
        tokens = tokens_in(cache, kv_token)
        top = min(tokens, longest)
    if cache_tokens is not None:
        cache, tokens, top = cache_tokens * kv_token, cache_tokens, min(cache_tokens, longest)
    return Fit(weights, kv_token, cache, top, tokens // context, context, plan)


def bill(folder: Path, *, card: Gpu, context: int, flags: Sequence[str] = ()) -> Plan | None:
    """The planner's bill of serving `folder` on `card`; None for a checkpoint that it cannot read."""
    try:
        return planned(read_model(folder), card, asked_in(_without(flags, "--max-model-len"), context=context))
    except ValueError:
        return None


def _without(flags: Sequence[str], name: str) -> list[str]:
    left = list(flags)
    while name in left:
        del left[left.index(name) : left.index(name) + 2]
    return left


def figures(found: Fit, *, measured: Footprint | None = None, peak: int | None = None) -> dict[str, Figure]:
    """Model memory, cache bytes a token, max length and max batch (computed), and what the server took where it was
    measured: of the machine, of the card by its processes, and at its `peak` by NVML."""
    loaded = measured.weights if measured else None
    result = {
        "weights": Figure(loaded or found.weights, "bytes", "measured" if loaded else "computed"),
        "kv_token": Figure(found.kv_token, "bytes", "computed"),
        "max_length": Figure(found.max_length, "tokens", "computed"),
        "max_batch": Figure(found.max_batch, "sequences", "computed"),
    }
    if measured and measured.resident is not None:
        result["server_memory"] = Figure(measured.resident, "bytes", "measured")
    if measured and measured.card is not None:
        result["card_memory"] = Figure(measured.card, "bytes", "measured")
    if peak is not None:
        result["peak_memory"] = Figure(peak, "bytes", "measured")
    return result


def stack(
    found: Fit, *, measured: Footprint | None = None, peak: int | None = None, log: str = ""
) -> Mapping[str, Figure]:
    """The card's memory by part, bytes: the bill's, and in its place what the engine's log and NVML told of an engine
    that had just this budget (`measured`); its activations are then in "other", unless its log tells them apart. Empty
    where there is neither a bill nor a measurement."""
    parts: dict[str, Figure] = {}
    if found.plan is not None:
        sizes: dict[str, int] = dict.fromkeys(STACK, 0)
        sizes["cache"] = found.plan.cache
        for part in found.plan.parts:
            if part.counted:
                sizes[next((to for start, to in PARTS.items() if part.name.startswith(start)), "other")] += part.size
        parts = {name: Figure(size, "bytes", "computed") for name, size in sizes.items()}
    if measured is None:
        return parts
    if measured.weights:
        parts["weights"] = Figure(measured.weights, "bytes", "measured")
    if measured.cache_tokens:
        parts["cache"] = Figure(measured.cache_tokens * found.kv_token, "bytes", "measured")
    for name, words in (("graphs", GRAPHS), ("activations", PASSES)):
        if told := words.findall(log):
            parts[name] = Figure(int(float(told[-1]) * GIB), "bytes", "measured")
    if peak is not None:
        if parts.get("activations", Figure(0, "bytes", "computed")).how == "computed":
            parts.pop("activations", None)  # the bill's own guess; what they really took is in the rest
        rest = peak - sum(figure.value for name, figure in parts.items() if name != "other")
        parts["other"] = Figure(max(0, rest), "bytes", "measured")
    return parts
