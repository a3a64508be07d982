"""How an answer is to be drawn and where it ends, as a request to the PyTorch engine says it: each value is checked
before anything is generated, where it can still be the client's fault.

Knows neither torch nor a model; that a token is one of the model's is pytorch_answer.py's to say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# key -> least, most, and whether a whole number is wanted; OpenAI's bounds, and vLLM's for what OpenAI has not
NUMBERS: Mapping[str, tuple[float, float, bool]] = {
    "max_tokens": (1, math.inf, True),
    "temperature": (0, 2, False),
    "top_p": (0, 1, False),
    "top_k": (-1, math.inf, True),
    "min_p": (0, 1, False),
    "repetition_penalty": (0.01, 100, False),
    "frequency_penalty": (-2, 2, False),
    "presence_penalty": (-2, 2, False),
    "seed": (-(2**63), 2**63 - 1, True),
    "n": (1, 128, True),
}
BIAS = 100  # the most that OpenAI's logit_bias may say, either way
COLD = 1e-5  # a temperature below which logits would overflow, and the likeliest token is taken, as vLLM has it
COMPLETION_TOKENS = 16  # OpenAI's max_tokens of a completion that says none; of a chat it is what the context leaves
TAKEN = frozenset({*NUMBERS, "max_completion_tokens", "stop", "logit_bias", "ignore_eos"})


@dataclass(frozen=True)
class Sampling:
    """How one answer is drawn. None: as the checkpoint's generation config has it, or for `max_tokens` what the context
    leaves. `endless`: no end token before `max_tokens`, which is for measuring. `bias` is added to tokens' logits."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    bias: Mapping[int, float] = field(default_factory=dict)
    endless: bool = False
    n: int = 1


def sampling(body: Mapping[str, Any], *, chat: bool) -> Sampling:
    """What the request says of it. ValueError for a value that is none."""
    given = {key: body[key] for key in NUMBERS if body.get(key) is not None}
    if body.get("max_completion_tokens") is not None:
        given["max_tokens"] = body["max_completion_tokens"]
    for key, value in given.items():
        least, most, whole = NUMBERS[key]
        if not _within(value, least, most, whole=whole):
            bound = f"at least {least}" if most == math.inf else f"from {least} to {most}"
            raise ValueError(f"{key} is {value!r:.60}; it must be a {'whole ' * whole}number {bound}")
    if given.get("temperature", 1) < COLD:
        given["temperature"] = 0
    if not chat:
        given.setdefault("max_tokens", COMPLETION_TOKENS)
    if given.get("n", 1) > 1 and given.get("temperature") == 0:
        raise ValueError(f"n is {given['n']} and temperature 0, which gives one answer: ask for n 1, or a temperature")
    return Sampling(**given, stop=_stops(body), bias=_bias(body), endless=bool(body.get("ignore_eos")))


def _within(value: Any, least: float, most: float, *, whole: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        return False
    return least <= value <= most and (isinstance(value, int) or math.isfinite(value))


def _bias(body: Mapping[str, Any]) -> dict[int, float]:
    """Of `logit_bias`: token -> what is added to its logit."""
    given = body.get("logit_bias") or {}
    if not isinstance(given, dict):
        raise ValueError(f"logit_bias is {given!r:.60}; it must be an object of token ids and numbers")
    for token, bias in given.items():
        if not (token.isascii() and token.isdigit()) or not _within(bias, -BIAS, BIAS, whole=False):
            raise ValueError(f"logit_bias has {token!r:.60}: {bias!r:.60}; it takes token ids and -{BIAS} to {BIAS}")
    return {int(token): float(bias) for token, bias in given.items()}


def _stops(body: Mapping[str, Any]) -> tuple[str, ...]:
    given = body.get("stop")
    texts = given if isinstance(given, list) else [] if given is None else [given]
    if not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"stop is {given!r:.60}; it must be a text or a list of texts, none of them empty")
    return tuple(texts)


def cut(text: str, stops: Sequence[str]) -> tuple[str, str, bool]:
    """(what of `text` may be told, what is held back as a stop may begin in it, whether a whole stop is there, which
    neither has)."""
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    if found:
        return text[: min(found)], "", True
    begun = max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
    return text[: len(text) - begun], text[len(text) - begun :], False
