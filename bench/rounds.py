"""One request at a time in four forms, for stages.py: words alone, new pictures, the same pictures again, and whole.

Random words and pictures of a load's sizes, by its seed. What vLLM counts of each request is read from /metrics
around it. Knows a server by its URL.
"""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy
from openai import OpenAI
from PIL import Image

from ..serve.client import ask
from ..serve.metrics import metrics
from .speed import Load

PREFILL, DECODE = "vllm:request_prefill_time_seconds", "vllm:request_decode_time_seconds"
HITS = "vllm:mm_cache_hits_total"
COUNTED_WITHIN = 5.0  # seconds after an answer until the server's counters have it
WORDS = ("red", "blue", "circle", "square", "left", "right", "two", "three", "above", "below", "dot", "line")


@dataclass(frozen=True)
class Asked:
    """One request as it was seen. Seconds: `wall` by the client, `prefill` and `decode` by the server's own clock, zero
    where it has none. Tokens: `prompt` with template and pictures, `out` those of the answer."""

    wall: float
    prompt: int
    out: int
    prefill: float = 0.0
    decode: float = 0.0

    @property
    def outside(self) -> float:
        """Seconds in which the engine did not compute for it."""
        return self.wall - self.prefill - self.decode


@dataclass(frozen=True)
class Round:
    """One request in each form. Without pictures `fresh` and `seen` are `words`; where the server counts nothing,
    `seen` is `fresh`."""

    words: Asked
    fresh: Asked
    seen: Asked
    whole: Asked


@dataclass(frozen=True)
class Asker:
    """Where the requests go and what they are drawn from."""

    client: OpenAI
    url: str
    model: str
    load: Load
    words: Random = field(init=False)
    pixels: numpy.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "words", Random(self.load.seed))
        object.__setattr__(self, "pixels", numpy.random.default_rng(self.load.seed))


def one_round(asker: Asker, *, word: float, counted: bool) -> Round:
    """One round; `word` is the tokens of a word, `counted` whether the server has counters.

    Without counters `words` is as long as a prompt with its pictures, so that it is the decoder's work on one.
    """
    load = asker.load
    count = round(load.input_tokens / word)
    if not load.pictures:
        words = send(asker, count)
        return Round(words, words, words, send(asker, count, out=load.output_tokens))
    pictures = _pictures(asker)
    fresh = send(asker, count, pictures)
    seen = send(asker, count, pictures) if counted else fresh
    words = send(asker, count)
    if not counted:
        words = send(asker, count + round((fresh.prompt - words.prompt) / word))
    return Round(words, fresh, seen, send(asker, count, _pictures(asker), out=load.output_tokens))


def word_tokens(asker: Asker) -> float:
    """Tokens of one more word, by the server's own count of two prompts. ValueError where it tells no usage."""
    few, more = (send(asker, count).prompt for count in (16, 48))
    if more <= few:
        raise ValueError(f"the server at {asker.url} does not tell how many tokens a prompt has")
    return (more - few) / 32


def send(asker: Asker, words: int, pictures: Sequence[str] = (), *, out: int = 1) -> Asked:
    """Ask so many new words, with these pictures (data URLs), for `out` tokens. Errors as `client.ask`'s."""
    text = " ".join(asker.words.choice(WORDS) for _ in range(max(1, words)))
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}]  # before the pictures: no prefix is then in a cache
    parts += [{"type": "image_url", "image_url": {"url": picture}} for picture in pictures]
    before = counters(asker.url)
    message = {"role": "user", "content": parts if pictures else text}
    body = {"ignore_eos": True} if out > 1 else {}
    answer = ask(asker.client, [message], model=asker.model, max_tokens=out, extra_body=body)
    spent = (0.0, 0.0) if before is None else _spent(asker.url, before)
    return Asked(answer.seconds, answer.prompt_tokens, answer.tokens, *spent)


def _pictures(asker: Asker) -> list[str]:
    return [random_picture(asker.pixels, asker.load.picture) for _ in range(asker.load.pictures)]


def random_picture(pixels: numpy.random.Generator, size: tuple[int, int]) -> str:
    """A data URL of a JPEG of noise, (height, width) pixels, as the field's load generator makes them."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.integers(0, 256, (*size, 3), dtype=numpy.uint8)).save(buffer, format="JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def counters(url: str) -> tuple[float, float, float] | None:
    """(requests finished, their seconds of prefill, of decode) since the server started; None where it counts none."""
    try:
        found = metrics(url)
    except OSError:
        return None
    if f"{PREFILL}_count" not in found:
        return None
    names = (f"{PREFILL}_count", f"{PREFILL}_sum", f"{DECODE}_sum")
    count, prefill, decode = (sum(value for _, value in found.get(name, [])) for name in names)
    return count, prefill, decode


def cache_hits(url: str) -> float:
    """How often vLLM found a picture in its cache since it started; 0 where it does not say."""
    try:
        return sum(value for _, value in metrics(url).get(HITS, []))
    except OSError:
        return 0.0


def _spent(url: str, before: tuple[float, float, float]) -> tuple[float, float]:
    """Seconds of prefill and of decode of the one request since `before`. Counters follow the answer by a moment."""
    until = time.monotonic() + COUNTED_WITHIN
    while (now := counters(url)) is None or now[0] <= before[0]:
        if time.monotonic() > until:
            raise ValueError(f"the server at {url} answered a request and did not count it within {COUNTED_WITHIN} s")
        time.sleep(0.005)
    if now[0] > before[0] + 1:
        raise ValueError(f"the server at {url} answers others too; stages can be told on an idle one only")
    return now[1] - before[1], now[2] - before[2]
