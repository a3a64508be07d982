"""What fits on a card and the flags that follow: a plan, before anything starts. Arithmetic over headers and config.

Imports no engine. Weights and cache are counted; the rest is `overhead`'s estimate, which has not been held against
an engine on a GPU yet, and every plan says so.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

from . import overhead
from .bill import Ask, Model, Part, cached_of, flying_of, parts_of, room, sequences_of
from .flags import Flag
from .machine import GIB, Gpu
from .plan_flags import flags_of
from .shape import Layers, context_length, held, is_mixture, sequence_bytes, token_bytes
from .shares import undealt

GPU_SHARE = 0.90  # of the card's memory; the rest is for the driver and the display
MIN_CONTEXT = 512  # tokens; less does not hold one picture and its question
TEXT = 256  # tokens of a prompt that are not pictures: template, question, answer
FP8_CAPABILITY = 8.9  # below, the hardware has no float8
FEW = 8  # sequences, to be tried where vLLM's own number takes too much
FEWER_PIXELS = (1280, 512)  # tokens a picture, to be tried where the largest picture is too large


@dataclass(frozen=True)
class Plan:
    """`parts` and `cache` in bytes on each card; `tokens` is what the cache holds, `context` what the flags say.

    `kv_token` is a token's share of a sequence of `context`, where layers keep a window of it, or a state.
    `max_context` is for the concurrency asked (else one sequence), `max_batch` for `context`, of each of `ask.dp`
    replicas; `problem` is "" where what was asked fits, and `changes` are then empty.
    """

    ask: Ask
    card: Gpu
    share: float
    sequences: int
    parts: tuple[Part, ...]
    kv_token: int
    cache: int
    tokens: int
    context: int
    max_context: int
    max_batch: int
    mixture: bool
    images: int  # of the largest size that a prompt of `context` tokens holds
    image_tokens: int
    problem: str
    changes: tuple[str, ...]
    flags: tuple[Flag, ...]


def planned(model: Model, card: Gpu, ask: Ask) -> Plan:
    """The plan of serving `model` on cards of this kind. ValueError for an ask that no card could meet."""
    top = context_length(model.config)
    if why := undealt(model.config, tp=ask.tp, pp=ask.pp):
        fine = [n for n in (1, 2, 4, 8, 16) if not undealt(model.config, tp=n)]
        raise ValueError(f"{why}; {fine} can be used" if "stages" not in why else f"{why}; use a smaller --pp")
    if ask.context is not None and ask.context > top:
        raise ValueError(f"the model was made for {top} tokens of context, {ask.context} were asked for")
    found = _planned(model, card, ask)
    return found if not found.problem else replace(found, changes=_changes(model, card, ask, found.images))


def _planned(model: Model, card: Gpu, ask: Ask) -> Plan:
    """The plan without its changes."""
    if ask.pixels is not None and model.vision is not None:
        model = replace(model, vision=model.vision.at_pixels(ask.pixels))
    share, share_why = _share(card) if ask.share is None else (ask.share, "you asked for it")
    layers, flying = cached_of(model, ask), flying_of(card, ask)
    longest = _longest(model, card, ask, share, layers)
    context = ask.context or longest
    length = context or min(context_length(model.config), MIN_CONTEXT)
    even = all(kind.even for kind in layers) or not token_bytes(layers)
    parts = parts_of(model, card, ask, max(context, 1))
    cache = room(parts, card, share)
    tokens = held(cache, layers, length, flying=flying)
    each = model.vision.tokens if model.vision and model.vision.tokens else 0
    images = max(0, (context - TEXT) // each) if each else 0
    problem = _problem(model, ask, share, card, parts, context, tokens, images)
    plan = Plan(
        ask=ask,
        card=card,
        share=share,
        sequences=sequences_of(card, ask),
        parts=parts,
        kv_token=token_bytes(layers) if even else math.ceil(sequence_bytes(layers, length, flying=flying) / length),
        cache=max(0, cache),
        tokens=tokens,
        context=context,
        max_context=longest,
        max_batch=tokens // context if context else 0,
        mixture=is_mixture(model.config),
        images=images,
        image_tokens=each,
        problem=problem,
        changes=(),
        flags=(),
    )
    said = flags_of(model, ask, card, context=context, share=(share, share_why), image_tokens=each)
    return replace(plan, flags=said)


def _share(card: Gpu) -> tuple[float, str]:
    """--gpu-memory-utilization: vLLM refuses to start where this much of the card is not free."""
    free = (card.free - overhead.CUDA_CONTEXT) / card.memory
    if free >= GPU_SHARE:
        return GPU_SHARE, "the rest of the card is for the driver and the display"
    used = (card.memory - card.free) / GIB
    why = f"{used:.1f} GiB of the card is in use by others" if used > 0.1 else "the driver needs the rest of the card"
    return max(0.05, math.floor(free * 100) / 100), why


def _longest(model: Model, card: Gpu, ask: Ask, share: float, layers: tuple[Layers, ...]) -> int:
    """The longest context that fits, as often as is asked, 0 where none does; whole steps of 256 below the model's.

    A longer context makes the profiled video longer and so the cache smaller: the search is over the whole sum.
    """

    def fits(context: int) -> bool:
        left = room(parts_of(model, card, ask, context), card, share)
        return held(left, layers, context, flying=flying) >= context * (ask.abreast or 1)

    top, flying = context_length(model.config), flying_of(card, ask)
    if fits(top):
        return top
    low, high = 0, top // 256 + (top % 256 > 0)  # low fits (nothing), high does not, in steps of 256
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * 256) else (low, middle)
    return low * 256


def _problem(
    model: Model, ask: Ask, share: float, card: Gpu, parts: tuple[Part, ...], context: int, tokens: int, images: int
) -> str:
    """What does not fit, "" where all does."""
    held, abreast = min(context_length(model.config), MIN_CONTEXT), ask.abreast or 1
    if tokens < held:
        weights = sum(p.size for p in parts if p.name.startswith("weights") and p.counted)
        beside = sum(p.size for p in parts if p.counted) - weights
        return (
            f"{weights / GIB:.2f} GiB of weights leave room for {tokens} tokens of context "
            f"in {share * card.memory / GIB:.1f} GiB, with {beside / GIB:.2f} GiB for what runs beside them"
        )
    if context < held and ask.context is None:
        return f"{abreast} sequences at once leave each fewer than {held} tokens of context"
    if tokens < context * abreast:
        return f"{abreast} x {context} tokens were asked for, the cache holds {tokens}"
    if ask.images and model.vision is not None and images < ask.images:
        return f"{ask.images} pictures of {model.vision.tokens} tokens and a question do not fit into {context} tokens"
    return ""


def _changes(model: Model, card: Gpu, ask: Ask, images: int) -> tuple[str, ...]:
    """The smallest changes with which it fits, each tried by planning it: one alone, else two together."""
    tried = _candidates(model, card, ask, images)
    for many in (1, 2):
        found: dict[frozenset[str], str] = {}  # by what is changed: the first, least one stays
        for chosen in itertools.combinations(tried, many):
            other, packed = ask, model
            for _, change, int4 in chosen:
                other = replace(other, **change)
                packed = replace(packed, weights=packed.weights.as_int4) if int4 else packed
            kinds = [next(iter(change), "int4") for _, change, _ in chosen]
            if len(set(kinds)) < many or frozenset(kinds) in found:
                continue
            plan = _planned(packed, card, other)
            if not plan.problem:
                words = " and ".join(name for name, _, _ in chosen)
                found[frozenset(kinds)] = f"{words}: {plan.max_batch} x {plan.context:,} tokens"
        if found:
            return tuple(found.values())
    return ("a smaller model or a larger card; none of the smaller changes is enough",)


def _candidates(model: Model, card: Gpu, ask: Ask, images: int) -> list[tuple[str, dict[str, Any], bool]]:
    """(words, change of the ask, whether to int4), the least first; `images` fit into a prompt as things are."""
    found: list[tuple[str, dict[str, Any], bool]] = []
    vision = model.vision
    if vision is not None:
        if ask.videos:
            found.append((f"no video (--images {ask.pictures})", {"images": ask.pictures, "video": None}, False))
        elif ask.images and 0 < images < ask.images:
            found.append((f"fewer pictures (--images {images})", {"images": images}, False))
        for tokens in FEWER_PIXELS:
            pixels = tokens * vision.side**2
            if vision.side and tokens < vision.tokens and (ask.pixels is None or pixels < ask.pixels):
                found.append((f"smaller pictures (--pixels {pixels})", {"pixels": pixels}, False))
    if ask.concurrency is None and ask.sequences is None:
        found.append((f"fewer sequences at once (--concurrency {FEW})", {"concurrency": FEW}, False))
    if not ask.eager:
        found.append(("no CUDA graphs (--enforce-eager)", {"eager": True}, False))
    if ask.kv_dtype == "auto" and card.capability >= FP8_CAPABILITY:
        found.append(("an FP8 cache (--kv-cache-dtype fp8)", {"kv_dtype": "fp8"}, False))
    if model.weights.loose and not model.weights.packed:
        found.append(("int4 weights (`mmq quantize`)", {}, True))
    if ask.tp == 1 and not undealt(model.config, tp=2):
        found.append(("two cards (--tp 2)", {"tp": 2}, False))
    return found
