"""A server for the length of a `with`, and conversations with it: what `mmq infer` does with one prompt or a chat.

Talks HTTP only; who serves and how is `plan` and `running`'s business, datasets are `dataset`'s.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..recipes.progress import Tell, silent
from .client import Answer, Message, connect, root, served_name, stream
from .client import ask as ask_one
from .engines import plan
from .machine import this_machine
from .request import DEFAULT, RequestConfig
from .running import START_TIMEOUT, free_port, running
from .target import servable


@contextmanager
def serving(
    target: str,
    *,
    engine: str = "vllm",
    timeout: float = START_TIMEOUT,
    log_path: Path | None = None,
    tell: Tell = silent,
    **options: Any,
) -> Iterator[str]:
    """The root URL of a server for `target`: the address itself, or a folder served for the length of a `with`.

    Options as `engines.vllm`. A free port of loopback is taken.
    """
    if "://" in target:
        yield root(target)
        return
    launch = plan(engine, Path(target).expanduser(), machine=this_machine(), port=free_port(), **options)
    with running(launch, timeout=timeout, log_path=log_path, tell=tell) as server:
        yield server.url


@contextmanager
def at(
    target: str,
    config: RequestConfig,
    *,
    engine: str = "vllm",
    hub: str = "hf",
    revision: str | None = None,
    extra: Sequence[str] = (),
    tell: Tell = silent,
    **options: Any,
) -> Iterator[tuple[str, RequestConfig]]:
    """(URL, how to ask there) of a running server, or of one that is started for what `target` names, as `serving`."""
    if "://" in target:
        yield root(target), config
        return
    folder, name = servable(target, hub=hub, revision=revision, tell=tell)
    config, flags = media_flags(engine, config)
    options |= {"served_model_name": name, "extra": (*flags, *extra)}
    with serving(str(folder), engine=engine, tell=tell, **options) as url:
        yield url, config


def media_flags(engine: str, config: RequestConfig) -> tuple[RequestConfig, tuple[str, ...]]:
    """(the config without what it says of frames and pixels, engine flags that say it) where mmq starts the engine.

    A server of vLLM's takes them from a request only when it was told to trust its clients with that.
    """
    body = config.options().get("extra_body", {})
    said = {key: body[key] for key in ("media_io_kwargs", "mm_processor_kwargs") if key in body}
    if engine != "vllm" or not said:
        return config, ()
    flags = [(f"--{key.replace('_', '-')}", json.dumps(value, separators=(",", ":"))) for key, value in said.items()]
    extra = {key: value for key, value in config.extra.items() if key not in said}
    return replace(config, fps=None, frames=None, extra=extra), tuple(word for flag in flags for word in flag)


@contextmanager
def asking(
    url: str, config: RequestConfig = DEFAULT, *, model: str | None = None, api_key: str | None = None
) -> Iterator[Callable[[Sequence[Message]], Answer]]:
    """A function that gives the server's whole answer to a conversation, over one connection the while.

    Errors as in `client.plain_errors`, and ValueError for a model that the server has not.
    """
    with connect(url, api_key=api_key) as client:
        name = served_name(client, model, url=url)
        yield lambda messages: ask_one(client, messages, model=name, **config.options())


@contextmanager
def answering(
    url: str, config: RequestConfig = DEFAULT, *, model: str | None = None, api_key: str | None = None
) -> Iterator[Callable[[Sequence[Message]], Iterator[str]]]:
    """As `asking`, the answer piece by piece as it comes where `config.stream`, else in one piece."""
    with connect(url, api_key=api_key) as client:
        name = served_name(client, model, url=url)

        def answer(messages: Sequence[Message]) -> Iterator[str]:
            if config.stream:
                yield from stream(client, messages, model=name, **config.options())
            else:
                yield ask_one(client, messages, model=name, **config.options()).text

        yield answer
