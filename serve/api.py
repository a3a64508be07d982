"""Serving and asking from Python: `launch` a server, `infer` a list of requests, sync or async, `stream` one answer.

Talks HTTP by the openai client, so a server of anybody's answers too; its URL is enough. Knows no engine's flags.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..recipes.progress import Step, Tell, silent
from .client import Answer, Message, answer_of, connect, connect_async, plain_errors, served_name
from .client import stream as stream_messages
from .infer import first_error, serving, summary
from .media import Medium, compose, part
from .target import servable


@dataclass(frozen=True)
class InferRequest:
    """A conversation. `<image>` and `<video>` in a user's text take the next of `images` and `videos` (paths, URLs,
    data URLs); where a single user message has no tags for them they stand before its text. Messages may have the
    OpenAI parts instead.
    """

    messages: Sequence[Message]
    images: Sequence[str | Path] = ()
    videos: Sequence[str | Path] = ()

    def as_openai(self) -> list[Message]:
        """The messages as they are sent, files read. ValueError where tags and media do not go together."""
        media: list[Medium] = [("image", part("image", str(i))) for i in self.images]
        media += [("video", part("video", str(v))) for v in self.videos]
        if not media:
            return list(self.messages)  # a tag is text then: it is for the model's own template
        texts = [m for m in self.messages if m.get("role") == "user" and isinstance(m.get("content"), str)]
        if not texts:
            raise ValueError("images and videos go with a user message of plain text; leave them out beside parts")
        sent: list[Message] = []
        for message in self.messages:
            if message in texts:
                content, media = compose(message["content"], media, alone=len(texts) == 1)
                message = {**message, "content": content}
            sent.append(message)
        if media:
            raise ValueError(f"{len(media)} images or videos more than there are <image> and <video> tags for them")
        return sent


@dataclass(frozen=True)
class RequestConfig:
    """How answers are made. `seed` makes sampling repeatable; `logprobs` gives those of each token."""

    max_tokens: int = 512
    temperature: float = 0.0
    seed: int | None = None
    logprobs: bool = False

    def options(self) -> dict[str, Any]:
        """As the openai client's `chat.completions.create` takes them."""
        options: dict[str, Any] = {"max_tokens": self.max_tokens, "temperature": self.temperature}
        if self.seed is not None:
            options["seed"] = self.seed
        return options | ({"logprobs": True} if self.logprobs else {})


@dataclass(frozen=True)
class Inferred:
    """Answers in the order of the requests, the server's ValueError in the place of one that it refused; and
    `figures`: num_prompt_tokens, num_generated_tokens, num_samples, runtime (seconds), samples/s, tokens/s, failed.
    """

    answers: tuple[Answer | ValueError, ...]
    figures: dict[str, float]


@contextmanager
def launch(
    target: str | Path,
    *,
    engine: str = "vllm",
    hub: str = "hf",
    revision: str | None = None,
    tell: Tell = silent,
    **options: Any,
) -> Iterator[str]:
    """Serve an artifact or a model for the length of a `with`; yields the server's URL. A URL is yielded as it is.

    Options as `mmq serve`'s (max_model_len, served_model_name, ...). Errors as `running`'s and `servable`'s.
    """
    if "://" not in str(target):
        folder, name = servable(str(target), hub=hub, revision=revision, tell=tell)
        target, options = folder, {"served_model_name": name} | options
    with serving(str(target), engine=engine, tell=tell, **options) as url:
        yield url


def infer(
    url: str, requests: Sequence[InferRequest], config: RequestConfig = RequestConfig(), **options: Any
) -> Inferred:
    """As `infer_async`, waited for. ValueError within a running event loop (a notebook): await the other there."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(infer_async(url, requests, config, **options))
    raise ValueError("an event loop runs here already, as in a notebook: use `await infer_async(...)`")


async def infer_async(
    url: str,
    requests: Sequence[InferRequest],
    config: RequestConfig = RequestConfig(),
    *,
    model: str | None = None,
    api_key: str | None = None,
    concurrency: int = 64,
    tell: Tell = silent,
) -> Inferred:
    """Answers of the server at `url` to all requests, `concurrency` at once. `model`: the server's first by default.

    ValueError for a request that cannot be sent (before any is), OSError when the server is gone.
    """
    if concurrency < 1:
        raise ValueError(f"concurrency is {concurrency}; it must be at least 1")
    bodies = [request.as_openai() for request in requests]
    answers: dict[int, Answer | ValueError] = {}
    begun = time.perf_counter()
    with connect(url, api_key=api_key) as one:
        name = model or await asyncio.to_thread(served_name, one, url=url)
    async with connect_async(url, api_key=api_key) as client:
        todo = iter(enumerate(bodies))

        async def worker() -> None:
            for index, messages in todo:
                answers[index] = await _ask(client, messages, model=name, **config.options())
                tell(Step("infer", len(answers), len(bodies)))

        with first_error():
            async with asyncio.TaskGroup() as group:
                for _ in range(min(concurrency, len(bodies))):
                    group.create_task(worker())
    found = tuple(answers[index] for index in range(len(bodies)))
    records = [
        {"error": str(a)} if isinstance(a, ValueError) else {"prompt_tokens": a.prompt_tokens, "tokens": a.tokens}
        for a in found
    ]
    return Inferred(found, summary(records, time.perf_counter() - begun))


async def _ask(client: Any, messages: list[Message], **options: Any) -> Answer | ValueError:
    begun = time.perf_counter()
    try:
        with plain_errors(str(client.base_url)):
            reply = await client.chat.completions.create(messages=messages, **options)
    except ValueError as e:
        return e
    return answer_of(reply, time.perf_counter() - begun)


def stream(
    url: str,
    request: InferRequest,
    config: RequestConfig = RequestConfig(),
    *,
    model: str | None = None,
    api_key: str | None = None,
) -> Iterator[str]:
    """One answer as it comes, piece by piece. Errors as `infer_async`'s, and ValueError when it is refused."""
    messages = request.as_openai()
    with connect(url, api_key=api_key) as client:
        name = model or served_name(client, url=url)
        yield from stream_messages(client, messages, model=name, **config.options())
