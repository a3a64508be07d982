"""Serving and asking from Python: `launch` a server or name one with `Client`, `infer` a list of requests, sync or
async, `stream` one answer.

Talks HTTP by the openai client, so a server of anybody's answers too; its URL is enough. Knows no engine's flags.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ..recipes.progress import Step, Tell, silent
from ..recipes.terminal import bars, listener
from .client import Answer, connect, models, served_name
from .client import stream as stream_messages
from .crowd import crowd, waited
from .infer import serving
from .request import DEFAULT, InferRequest, RequestConfig
from .results import summary
from .target import servable

__all__ = ["Answer", "Client", "InferRequest", "Inferred", "RequestConfig", "launch"]


@dataclass(frozen=True)
class Inferred:
    """Answers in the order of the requests, the error (ValueError, RuntimeError) in the place of one that the server
    refused; and `figures`: num_prompt_tokens, num_generated_tokens, num_samples, runtime (seconds), samples/s,
    tokens/s, failed.
    """

    answers: tuple[Answer | Exception, ...]
    figures: dict[str, float]

    @property
    def texts(self) -> list[str]:
        """The answers' texts. The first error, where a request failed, is raised."""
        for answer in self.answers:
            if isinstance(answer, Exception):
                raise answer
        return [answer.text for answer in self.answers if isinstance(answer, Answer)]


@dataclass(frozen=True)
class Client:
    """A running server. `model` is the one of its names that is asked, by default its first; the key comes from
    MMQ_API_KEY or VLLM_API_KEY where none is given."""

    url: str
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)

    @property
    def models(self) -> list[str]:
        """The names that the server answers to. OSError when nobody answers."""
        with connect(self.url, api_key=self.api_key) as client:
            return models(client, url=self.url)

    def infer(self, requests: Sequence[InferRequest], config: RequestConfig = DEFAULT, **options: Any) -> Inferred:
        """As `infer_async`, waited for. ValueError within a running event loop (a notebook): await the other there."""
        return waited(self.infer_async(requests, config, **options))

    async def infer_async(
        self,
        requests: Sequence[InferRequest],
        config: RequestConfig = DEFAULT,
        *,
        concurrency: int = 64,
        on_piece: Callable[[int, str], None] | None = None,
        bar: bool = False,
        tell: Tell = silent,
    ) -> Inferred:
        """Answers to all requests, `concurrency` at once. With `config.stream` each piece of an answer goes to
        `on_piece` with the number of its request, as it comes. `bar` shows how far it is, on stderr.

        ValueError for a request that cannot be sent (before any is), OSError when the server is gone.
        """
        if concurrency < 1:
            raise ValueError(f"concurrency is {concurrency}; it must be at least 1")
        if config.stream != (on_piece is not None):
            raise ValueError("RequestConfig(stream=True) and on_piece=... go together; one answer comes by `stream`")
        bodies = [request.as_openai() for request in requests]
        answers: dict[int, Answer | Exception] = {}
        begun = time.perf_counter()
        name = await asyncio.to_thread(self._name)

        def keep(number: int, found: Answer | Exception) -> None:
            answers[number] = found
            tell(Step("infer", len(answers), len(bodies)))

        wide: dict[str, Any] = {"concurrency": min(concurrency, len(bodies)), "on_piece": on_piece}
        with bars() if bar else nullcontext() as shown:
            tell = listener(shown) if shown else tell
            todo = ((number, partial(list, body)) for number, body in enumerate(bodies))
            await crowd(self.url, todo, keep, api_key=self.api_key, model=name, **wide, **config.options())
        found = tuple(answers[number] for number in range(len(bodies)))
        records = [
            {"error": str(a)} if isinstance(a, Exception) else {"prompt_tokens": a.prompt_tokens, "tokens": a.tokens}
            for a in found
        ]
        return Inferred(found, summary(records, time.perf_counter() - begun))

    def stream(self, request: InferRequest, config: RequestConfig = DEFAULT) -> Iterator[str]:
        """One answer as it comes, piece by piece. Errors as `infer_async`'s, and ValueError when it is refused."""
        messages = request.as_openai()
        with connect(self.url, api_key=self.api_key) as client:
            name = served_name(client, self.model, url=self.url)
            yield from stream_messages(client, messages, model=name, **config.options())

    def _name(self) -> str:
        with connect(self.url, api_key=self.api_key) as client:
            return served_name(client, self.model, url=self.url)


@contextmanager
def launch(
    target: str | Path,
    *,
    engine: str = "vllm",
    hub: str = "hf",
    revision: str | None = None,
    tell: Tell = silent,
    **options: Any,
) -> Iterator[Client]:
    """Serve an artifact or a model for the length of a `with`; yields its client. A URL's server is taken as it is.

    Options as `mmq serve`'s (max_model_len, served_model_name, ...). Errors as `running`'s and `servable`'s.
    """
    if "://" not in str(target):
        folder, name = servable(str(target), hub=hub, revision=revision, tell=tell)
        target, options = folder, {"served_model_name": name} | options
    with serving(str(target), engine=engine, tell=tell, **options) as url:
        yield Client(url)
