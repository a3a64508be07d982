"""How an answer is to be drawn and where it ends, as the PyTorch engine takes it: each value checked before generation.

transformers raises in the middle of generating for what it does not take, which a client would hear as a fault of the
server. Knows neither torch nor a model; that a token is one of the model's is pytorch_requests.py's to say.
"""

from __future__ import annotations

import math
from typing import Any

RANGES = {  # key -> least, most
    "max_tokens": (1, math.inf),
    "temperature": (0, math.inf),
    "top_p": (0, 1),
    "frequency_penalty": (-0.99, 2),  # transformers makes a repetition penalty of it, 1 + it, which must be above 0
    "seed": (-(2**63), 2**64 - 1),
}
WHOLE = ("max_tokens", "seed")
BIAS = 100  # the most that OpenAI's logit_bias may say, either way


def sampling(body: dict[str, Any], *, chat: bool) -> dict[str, Any]:
    """The request with its values as transformers takes them. ValueError for one that it would not."""
    for key, (least, most) in RANGES.items():
        value = body.get(key)
        if value is not None and not _within(value, least, most, whole=key in WHOLE):
            bound = f"at least {least}" if most == math.inf else f"from {least} to {most}"
            raise ValueError(f"{key} is {value!r}; it must be a {'whole ' * (key in WHOLE)}number {bound}")
    return _stops(_biased(body, chat=chat))


def _within(value: Any, least: float, most: float, *, whole: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        return False
    return least <= value <= most and (isinstance(value, int) or math.isfinite(value))


def _biased(body: dict[str, Any], *, chat: bool) -> dict[str, Any]:
    """`logit_bias` with float values, left out where it is empty: transformers refuses both of the other forms."""
    given = body.get("logit_bias")
    if given is None:
        return body
    if not chat:
        raise ValueError("the pytorch engine has logit_bias of chat completions alone; ask /v1/chat/completions")
    if not isinstance(given, dict):
        raise ValueError(f"logit_bias is {given!r:.60}; it must be an object of token ids and numbers")
    for token, bias in given.items():
        if not (token.isascii() and token.isdigit()) or not _within(bias, -BIAS, BIAS, whole=False):
            raise ValueError(f"logit_bias has {token!r:.60}: {bias!r:.60}; it takes token ids and -{BIAS} to {BIAS}")
    kept = {token: float(bias) for token, bias in given.items()}
    return {**body, "logit_bias": kept} if kept else {k: v for k, v in body.items() if k != "logit_bias"}


def _stops(body: dict[str, Any]) -> dict[str, Any]:
    """`stop`, left out where it is an empty list."""
    given = body.get("stop")
    if given is None:
        return body
    texts = given if isinstance(given, list) else [given]
    if not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"stop is {given!r:.60}; it must be a text or a list of texts, none of them empty")
    return body if texts else {k: v for k, v in body.items() if k != "stop"}
