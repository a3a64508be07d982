"""Twelve clients ask the served artifact all kinds of things, for a minute (`-m slow`: ten): no error, no growth.

The measure of growth: what the server's processes hold of memory that no file is behind (RssAnon and RssShmem: their
own, whatever others do; a share of the libraries changes with every other process that loads them), and their open
files, read every two seconds. The first third is for warming up: caches of what was asked fill once, as the questions
repeat. Of the rest the median of the last quarter may be no more than 32 MiB and 8 files above that of the first.
"""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import io
import itertools
import logging
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from mmq.recipes.pebble.tasks import samples
from mmq.recipes.samples import Sample, as_openai
from mmq.serve.client import connect_async
from mmq.serve.footprint import group_members
from mmq.serve.metrics import metrics
from mmq.serve.running import Server

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
CLIENTS = 12
EVERY = 2.0  # seconds between two looks at the memory
GROWTH, FILES = 32 << 20, 8
TOKENS = 24
log = logging.getLogger("soak")  # its figures: pytest --log-cli-level=INFO


def video_question(sample: Sample) -> list[dict[str, Any]]:
    """A sample's video as the frames that vLLM takes in one data URL, and its question."""
    frames = []
    for frame in sample.videos[0]:
        buffer = io.BytesIO()
        frame.save(buffer, "JPEG")
        frames.append(base64.b64encode(buffer.getvalue()).decode())
    text = next(part["text"] for m in sample.messages for part in m["content"] if part["type"] == "text")
    video = {"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{','.join(frames)}"}}
    return [{"role": "user", "content": [video, {"type": "text", "text": text}]}]


Ask = Callable[[openai.AsyncOpenAI, str, list[dict[str, Any]]], Awaitable[None]]


async def whole(client: openai.AsyncOpenAI, model: str, messages: Any) -> None:
    reply = await client.chat.completions.create(model=model, messages=messages, max_tokens=TOKENS, temperature=0)
    assert reply.choices[0].message.content
    assert reply.usage is not None
    assert reply.usage.completion_tokens >= 1


async def streamed(client: openai.AsyncOpenAI, model: str, messages: Any) -> None:
    chunks = await client.chat.completions.create(model=model, messages=messages, max_tokens=TOKENS, stream=True)
    reasons = [chunk.choices[0].finish_reason async for chunk in chunks if chunk.choices]
    assert reasons[-1] in ("stop", "length")


async def left(client: openai.AsyncOpenAI, model: str, messages: Any) -> None:
    """A client that goes away in the middle of an answer."""
    more = {"ignore_eos": True}
    chunks = await client.chat.completions.create(
        model=model, messages=messages, max_tokens=500, stream=True, extra_body=more
    )
    async with chunks:
        for _ in range(3):
            await anext(aiter(chunks))


async def with_logprobs(client: openai.AsyncOpenAI, model: str, messages: Any) -> None:
    reply = await client.chat.completions.create(
        model=model, messages=messages, max_tokens=TOKENS, logprobs=True, top_logprobs=3
    )
    found = reply.choices[0].logprobs
    assert found is not None
    assert found.content
    assert all(entry.logprob <= 0 and len(entry.top_logprobs) == 3 for entry in found.content)


async def refused(client: openai.AsyncOpenAI, model: str, messages: Any) -> None:
    with pytest.raises(openai.BadRequestError):
        await client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/"}}]}],
        )


def kinds() -> dict[str, tuple[Ask, list[list[dict[str, Any]]]]]:
    """What is asked: how, and the messages in turn. Few of each, so that what is kept of them is soon all there."""
    drawn = list(samples("test", 80))
    text = [as_openai(s.question) for s in drawn if not s.images and not s.videos][:4]
    one = [as_openai(s.question) for s in drawn if len(s.images) == 1][:6]
    several = [as_openai(s.question) for s in drawn if len(s.images) > 1][:4]
    video = [video_question(s) for s in drawn if s.videos][:3]
    assert text
    assert one
    assert several
    assert video
    return {
        "text": (whole, text),
        "one picture": (whole, one),
        "several pictures": (whole, several),
        "video": (whole, video),
        "streamed": (streamed, one),
        "logprobs": (with_logprobs, text + one),
        "left in the middle": (left, one),
        "refused": (refused, text),
    }


def own_memory(pid: int) -> int:
    """Bytes of a process that no file is behind."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


async def soak(server: Server, seconds: float) -> tuple[Counter[str], list[tuple[int, int]]]:
    """Requests by kind, and (bytes, open files) of the server's processes at each look. Raises the first error."""
    todo = kinds()
    done: Counter[str] = Counter()
    looks: list[tuple[int, int]] = []
    until = time.monotonic() + seconds

    async def client_of(number: int, client: openai.AsyncOpenAI) -> None:
        names = itertools.islice(itertools.cycle(todo), number, None)  # each begins with another kind
        for turn, name in enumerate(names):
            if time.monotonic() > until:
                return
            ask, questions = todo[name]
            await ask(client, server.name, questions[(number + turn) % len(questions)])
            done[name] += 1

    async def look() -> None:
        while time.monotonic() < until:
            await asyncio.sleep(EVERY)
            pids = group_members(server.pid)
            files = sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in pids)
            looks.append((sum(map(own_memory, pids)), files))

    async with connect_async(server.url, retries=0) as client, asyncio.TaskGroup() as group:
        group.create_task(look())
        for number in range(CLIENTS):
            group.create_task(client_of(number, client))
    return done, looks


def check(server: Server, seconds: float) -> None:
    done, looks = asyncio.run(soak(server, seconds))
    settled = looks[len(looks) // 3 :]
    quarter = max(len(settled) // 4, 1)
    early, late = settled[:quarter], settled[-quarter:]
    grown, files = (statistics.median(b[at] for b in late) - statistics.median(a[at] for a in early) for at in (0, 1))
    rate = sum(done.values()) / seconds
    log.info("%d requests in %.0f s (%.1f a second): %s", sum(done.values()), seconds, rate, dict(done))
    log.info("memory %.0f MiB, grown by %.1f MiB; files %+d", late[-1][0] / 2**20, grown / 2**20, files)
    assert set(done) == set(kinds()), done  # each kind was asked, and more than once in all
    assert sum(done.values()) > 2 * CLIENTS
    assert grown <= GROWTH, " ".join(f"{size / 2**20:.0f}" for size, _ in looks)
    assert files <= FILES, [count for _, count in looks]
    until = time.monotonic() + 30  # those that were left are taken off too
    while (running := metrics(server.url)["vllm:num_requests_running"][0][1]) and time.monotonic() < until:
        time.sleep(0.5)
    assert running == 0


def test_a_minute(served: Server) -> None:
    check(served, 60)


@pytest.mark.slow
def test_ten_minutes(served: Server) -> None:
    check(served, 600)
