"""Talk to a server: chat by the openai client. Starts nothing; what is sent with pictures is media.py's.

Works with any OpenAI-compatible server; `url` is its root, with or without /v1.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import openai

from .safety import USUAL, key_of

TIMEOUT = 600.0  # seconds for one answer
NO_KEY = "none"  # what openai's client, which must have a key, is given without one
# by name: openai has its HTTP client from httpx or httpx2, as its version will; the server was there, and is gone
BROKEN_OFF = ("RemoteProtocolError", "ReadError")

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Answer:
    """One answer. `finish` is the server's reason: stop, or length where max_tokens cut it; seconds to the last.

    `logprobs`, where they were asked for: OpenAI's {"token", "logprob", "bytes", "top_logprobs"} for each token.
    """

    text: str
    prompt_tokens: int
    tokens: int
    finish: str
    seconds: float
    logprobs: list[dict[str, Any]] | None = None

    def facts(self) -> dict[str, Any]:
        """The answer for a JSON object, under the names that a row of a dataset's answers has."""
        told = {"answer": self.text, "prompt_tokens": self.prompt_tokens, "tokens": self.tokens, "finish": self.finish}
        more = {} if self.logprobs is None else {"logprobs": {"content": self.logprobs}}
        return {**told, "seconds": round(self.seconds, 4), **more}


def root(url: str) -> str:
    """The server's root: without a trailing slash, and without /v1 or what of the API stands behind it. ValueError when
    it is no http(s) address."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, brackets of an IPv6 address that do not close
        good = False
    if not good:
        raise ValueError(f"{url!r} is no server's address; it looks like http://127.0.0.1:8000")
    return re.sub(r"(/v1(/models|/completions|/chat/completions)?)?/*$", "", url)


def _client_options(url: str, api_key: str | None, timeout: float, retries: int) -> dict[str, Any]:
    return {"base_url": f"{root(url)}/v1", "api_key": api_key or key_here(), "timeout": timeout, "max_retries": retries}


def key_here() -> str:
    """The key that the environment has for servers, `NO_KEY` where it has none. ValueError for one that no request can
    carry."""
    found = key_of(USUAL, os.environ)
    return found.value if found else NO_KEY


def connect(url: str, *, api_key: str | None = None, timeout: float = TIMEOUT, retries: int = 2) -> openai.OpenAI:
    """An openai client for the server; the key from MMQ_API_KEY or VLLM_API_KEY where none is given."""
    # trust_env: a proxy of the environment does not reach loopback
    plain = openai.DefaultHttpxClient(trust_env=False)
    return openai.OpenAI(**_client_options(url, api_key, timeout, retries), http_client=plain)


def connect_async(
    url: str, *, api_key: str | None = None, timeout: float = TIMEOUT, retries: int = 2
) -> openai.AsyncOpenAI:
    """As `connect`, for many requests at once."""
    plain = openai.DefaultAsyncHttpxClient(trust_env=False)
    return openai.AsyncOpenAI(**_client_options(url, api_key, timeout, retries), http_client=plain)


@contextmanager
def plain_errors(url: str) -> Iterator[None]:
    """The openai client's exceptions as ours: OSError for the connection, ValueError for what was asked, RuntimeError
    for a server that fails, or breaks off while it answers."""
    try:
        yield
    except openai.APITimeoutError:
        raise OSError(f"the server at {url} did not answer in time; is it busy, or the answer too long?") from None
    except openai.APIConnectionError as e:
        if type(e.__cause__).__name__ in BROKEN_OFF:
            raise RuntimeError(f"the server at {url} broke off its answer; its log tells whether it died") from None
        raise ConnectionError(f"no server answers at {url}; start one with `mmq serve ARTIFACT`") from None
    except openai.AuthenticationError as e:
        wanted = "an API key" if e.request.headers.get("Authorization") == f"Bearer {NO_KEY}" else "another API key"
        raise OSError(f"the server at {url} wants {wanted}; set MMQ_API_KEY, or give --api-key-file") from None
    except openai.APIStatusError as e:
        body: Any = e.body
        said = body.get("message") if isinstance(body, dict) else None
        text = f"the server refused the request ({e.status_code}): {said or e.message}"
        raise (ValueError(text) if e.status_code < 500 else RuntimeError(text)) from None
    except openai.APIError as e:  # an error in the middle of a stream
        raise RuntimeError(f"the server at {url} broke off its answer: {e.message}") from None


def models(client: openai.OpenAI, *, url: str = "the given address") -> list[str]:
    """The names that the server answers to, LoRA adapters' too. OSError when nobody answers, or nobody of this API."""
    with plain_errors(url):
        try:
            found: Any = client.get("/models", cast_to=object)
            return [str(model["id"]) for model in found["data"]]
        except (openai.NotFoundError, LookupError, TypeError, json.JSONDecodeError):
            why = "not as an OpenAI-compatible server: it has no /v1/models"
            raise OSError(f"{url} answers, but {why}; is the address right, as http://127.0.0.1:8000?") from None


def served_name(client: openai.OpenAI, wanted: str | None = None, *, url: str = "the given address") -> str:
    """`wanted`, where the server has a model of that name, else the name of its first. ValueError with the names there
    are when it has not, OSError when nobody answers."""
    found = models(client, url=url)
    if not found:
        raise OSError(f"the server at {url} serves no model")
    if wanted is not None and wanted not in found:
        raise ValueError(f"the server at {url} has no model {wanted!r}; it serves {', '.join(found)}")
    return wanted or found[0]


def ask(
    client: openai.OpenAI,
    messages: Sequence[Message],
    *,
    model: str,
    max_tokens: int = 512,
    temperature: float = 0.0,
    **options: Any,
) -> Answer:
    """One whole answer. Further options go to `chat.completions.create` (seed, logprobs, extra_body, ...)."""
    begun = time.perf_counter()
    with plain_errors(root(str(client.base_url))):
        reply = client.chat.completions.create(
            model=model,
            messages=list(messages),  # type: ignore[arg-type]
            max_tokens=max_tokens,
            temperature=temperature,
            **options,
        )
    return answer_of(reply, time.perf_counter() - begun)


def answer_of(reply: Any, seconds: float) -> Answer:
    """The openai package's ChatCompletion as an `Answer`."""
    usage, choice = reply.usage, reply.choices[0]
    return Answer(
        text=choice.message.content or "",
        prompt_tokens=usage.prompt_tokens if usage else 0,
        tokens=usage.completion_tokens if usage else 0,
        finish=choice.finish_reason or "",
        seconds=seconds,
        logprobs=choice.logprobs.model_dump()["content"] if choice.logprobs else None,
    )


async def ask_async(
    client: openai.AsyncOpenAI,
    messages: Sequence[Message],
    *,
    model: str,
    on_piece: Callable[[str], None] | None = None,
    **options: Any,
) -> Answer:
    """As `ask`, among others; with `on_piece` streamed, each piece handed to it as it comes. ValueError where logprobs
    are asked for and the server leaves them out."""
    begun = time.perf_counter()
    with plain_errors(root(str(client.base_url))):
        if on_piece is None:
            reply = await client.chat.completions.create(
                model=model,
                messages=list(messages),  # type: ignore[arg-type]
                **options,
            )
            return _with_logprobs(answer_of(reply, time.perf_counter() - begun), options)
        chunks = await client.chat.completions.create(
            model=model,
            messages=list(messages),  # type: ignore[arg-type]
            stream=True,
            stream_options={"include_usage": True},
            **options,
        )
        pieces: list[str] = []
        logprobs: list[dict[str, Any]] = []
        finish, usage = "", None
        async with chunks:
            async for chunk in chunks:
                usage = chunk.usage or usage
                for choice in _first(chunk):
                    finish = choice.finish_reason or finish
                    if choice.logprobs and choice.logprobs.content:
                        logprobs += [token.model_dump() for token in choice.logprobs.content]
                    if choice.delta.content:
                        pieces.append(choice.delta.content)
                        on_piece(choice.delta.content)
    counts = (usage.prompt_tokens, usage.completion_tokens) if usage else (0, 0)
    answer = Answer("".join(pieces), *counts, finish, time.perf_counter() - begun, logprobs or None)
    return _with_logprobs(answer, options)


def _with_logprobs(answer: Answer, options: Mapping[str, Any]) -> Answer:
    """ValueError where log-probabilities were asked for and the server left them out without a word."""
    if options.get("logprobs") and answer.logprobs is None and answer.text:
        raise ValueError("the server gives no log-probabilities; vLLM does (--engine vllm)")
    return answer


def _first(chunk: Any) -> list[Any]:
    """What a piece of a stream has of the first answer, where several (`n`, beams) come in one stream."""
    return [choice for choice in chunk.choices if choice.index == 0]


def stream(
    client: openai.OpenAI,
    messages: Sequence[Message],
    *,
    model: str,
    max_tokens: int = 512,
    temperature: float = 0.0,
    **options: Any,
) -> Iterator[str]:
    """One answer as it comes, piece by piece; closing the iterator ends the request."""
    with plain_errors(root(str(client.base_url))):
        chunks = client.chat.completions.create(
            model=model,
            messages=list(messages),  # type: ignore[arg-type]
            max_tokens=max_tokens,
            temperature=temperature,
            stream=True,
            **options,
        )
        with chunks:
            for chunk in chunks:
                for choice in _first(chunk):
                    if choice.delta.content:
                        yield choice.delta.content
