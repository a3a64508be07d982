"""The largest batch and the longest sequence of a running server, run and not only counted.

The engine tells how many tokens its cache holds; then so many sequences are really there at once, and one is really so
long, while /metrics is watched: none may be put off for want of cache (a preemption), none may fail. Where one is, a
little less is tried. Sequences are of token ids, so that they have their length exactly. Knows vLLM's names of metrics.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from openai import OpenAIError

from ..recipes.progress import Step, Tell, silent
from ..serve.client import connect, connect_async
from ..serve.crowd import waited
from ..serve.metrics import cache_tokens, metrics

TEXT = "red circle left of two blue squares above a green word below three small yellow dots and one line "
TRIES = 4
LESS = 0.05  # of the sequences, after a run with preemptions
LAST = 8  # tokens out of the longest sequence
SPARE = 64  # steps that sequences live on after the last has come in: long enough to be seen together
EVERY = 0.05  # seconds between two looks at the metrics
Metrics = Mapping[str, list[tuple[dict[str, str], float]]]


@dataclass(frozen=True)
class Trial:
    """One run at a point: `sequences` of `tokens` each (prompt and answer). `together` is the most that were seen at
    once and `cache` the largest share of the cache in use, by the server's metrics; `problem` "" where all is well."""

    sequences: int
    tokens: int
    together: int
    cache: float
    preemptions: int
    seconds: float
    problem: str = ""

    @property
    def fine(self) -> bool:
        """All were there at once, and none was put off. One that was answered was there, seen or not."""
        return not self.problem and not self.preemptions and max(self.together, 1) >= self.sequences

    @property
    def words(self) -> str:
        """What happened, for a reader."""
        of = f"{self.sequences} x {self.tokens} tokens"
        if self.problem:
            return f"{of} failed ({self.problem})"
        if self.preemptions:
            return f"{of} met {self.preemptions} preemptions"
        return f"{of} were there together, without a preemption" if self.fine else f"of {of} {self.together} were seen"


def max_batch(
    url: str, *, model: str, context: int, most: int | None = None, step: int = 2048, tell: Tell = silent
) -> list[Trial]:
    """Sequences of `context` tokens at once, as many as the cache holds and the engine lets run (`most`); the last of
    the trials is the answer where it is fine. `step` is how many tokens the engine takes in one step at most.

    ValueError for a server that does not tell its cache; OSError where it is gone.
    """
    found = metrics(url)
    tokens, block = cache_tokens(found), block_of(found)
    if tokens is None:
        raise ValueError(f"the server at {url} does not tell its cache; its largest batch cannot be looked for")
    wanted = (tokens - block) // (math.ceil(context / block) * block)  # vLLM keeps one block for itself
    wanted = min(wanted, most) if most else wanted
    trials: list[Trial] = []
    while wanted >= 1 and len(trials) < TRIES:
        tell(Step("largest batch", len(trials), TRIES, f"{wanted} x {context} tokens"))
        # the first must still be there when the last has come in: each step adds a token to all that are in, and what
        # is left of it takes a part of a prompt
        out = min(context // 2, math.ceil(wanted * context / max(step - wanted, 1)) + SPARE)
        trials.append(run(url, model=model, sequences=wanted, prompt=context - out, out=out))
        if trials[-1].fine or trials[-1].problem:
            break
        wanted -= max(1, int(LESS * wanted))
    return trials


def max_context(url: str, *, model: str, tell: Tell = silent) -> list[Trial]:
    """One sequence as long as the server takes, which is what fits into its cache where it chose for itself."""
    tell(Step("longest context", 0, 1))
    longest = longest_of(url)
    return [run(url, model=model, sequences=1, prompt=longest - LAST, out=LAST)]


def longest_of(url: str) -> int:
    """Tokens of the longest sequence that the server takes. ValueError for a server that does not tell."""
    with connect(url) as client:
        found: Any = client.models.list().data[0]
    told = getattr(found, "max_model_len", None)
    if not isinstance(told, int):
        raise ValueError(f"the server at {url} does not tell its longest sequence")
    return told


def block_of(found: Metrics) -> int:
    """Tokens of one block of the server's cache, 1 where it does not tell."""
    sizes = [labels.get("block_size", "") for labels, _ in found.get("vllm:cache_config_info", [])]
    return next((int(size) for size in sizes if size.isdigit()), 1)


def run(url: str, *, model: str, sequences: int, prompt: int, out: int) -> Trial:
    """So many sequences of `prompt` tokens in and `out` out, all asked at once; what was seen of them."""
    with connect(url) as client:
        told: Any = client.post(f"{url}/tokenize", cast_to=object, body={"model": model, "prompt": TEXT})
    words = told["tokens"]
    before = _sum(metrics(url), "vllm:num_preemptions")
    begun, end = time.perf_counter(), _watch(url)
    try:
        problem = waited(_asked(url, model, words, sequences, prompt, out))
    finally:
        together, cache = end()
    after = _sum(metrics(url), "vllm:num_preemptions") if not problem else before
    seconds = time.perf_counter() - begun
    return Trial(sequences, prompt + out, int(together), cache, int(after - before), round(seconds, 2), problem)


async def _asked(url: str, model: str, words: list[int], sequences: int, prompt: int, out: int) -> str:
    """Ask them all; "" or what was wrong with one."""
    async with connect_async(url, retries=0) as client:

        async def one(number: int) -> str:
            ids = [words[(number + at) % len(words)] for at in range(number % 7, number % 7 + prompt)]
            more = {"ignore_eos": True, "min_tokens": out}
            answer = await client.completions.create(
                model=model, prompt=ids, max_tokens=out, temperature=0, extra_body=more
            )
            got = answer.usage.completion_tokens if answer.usage else 0
            return "" if got == out else f"an answer had {got} tokens, {out} were asked for"

        try:
            problems = await asyncio.gather(*(one(number) for number in range(sequences)))
        except OpenAIError as e:
            return str(e)
    return next((problem for problem in problems if problem), "")


def _watch(url: str) -> Callable[[], tuple[float, float]]:
    """Look at the server's metrics from now on; what it returns ends that and tells the most sequences seen at once,
    and the largest share of the cache."""
    most, over = [(0.0, 0.0)], threading.Event()

    def look() -> None:
        while not over.wait(EVERY):
            try:
                found = metrics(url)
            except OSError:
                continue  # busy, or gone: the requests tell
            together, cache = most[0]
            now = (_sum(found, "vllm:num_requests_running"), _sum(found, "vllm:kv_cache_usage_perc"))
            most[0] = (max(together, now[0]), max(cache, now[1]))

    watch = threading.Thread(target=look, daemon=True)
    watch.start()

    def end() -> tuple[float, float]:
        over.set()
        watch.join()
        return most[0]

    return end


def _sum(found: Metrics, name: str) -> float:
    """The sum over a metric's labels; counters have `_total` at their end."""
    return sum(value for key in (name, f"{name}_total") for _, value in found.get(key, []))
