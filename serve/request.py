"""What is asked: a conversation with its media, and how answers to it are made. Knows no server and sends nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .client import Message
from .media import conversation, media_of

OURS = ("model", "messages", "stream", "stream_options")  # keys of a request that are not for `extra`


@dataclass(frozen=True)
class InferRequest:
    """A conversation. `<image>`, `<video>` and `<audio>` in a user's text take the next of `images`, `videos` and
    `audios` (paths, URLs, data URLs); where a single user message has no tags for them they stand before its text.
    Messages may have parts instead, OpenAI's or {"type": "image", "image": ...}. A text alone is a user's message.
    """

    messages: Sequence[Message] | str
    images: Sequence[str | Path] = ()
    videos: Sequence[str | Path] = ()
    audios: Sequence[str | Path] = ()

    def as_openai(self, *, folder: Path = Path()) -> list[dict[str, Any]]:
        """The messages as they are sent, files (relative to `folder`) read. ValueError where tags and media do not go
        together."""
        messages = [{"role": "user", "content": self.messages}] if isinstance(self.messages, str) else self.messages
        return conversation(messages, media_of(self.images, self.videos, self.audios, folder=folder), folder=folder)


@dataclass(frozen=True)
class RequestConfig:
    """How answers are made.

    `seed` makes sampling repeatable; `stop` ends an answer before any of these texts; `stream` has it come in pieces;
    `logprobs` gives those of each token, and `top_logprobs` those of so many others in its place. Of a video `fps`
    frames a second are looked at, and at most `frames`, evenly (vLLM's `media_io_kwargs`; where neither is given the
    server's own rule holds, vLLM's is 32 frames). `extra` goes into the request's body as it is.
    """

    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float | None = None
    seed: int | None = None
    stop: Sequence[str] = ()
    stream: bool = False
    logprobs: bool = False
    top_logprobs: int = 0
    fps: float | None = None
    frames: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """ValueError for a setting that no server takes."""
        if self.max_tokens < 1:
            raise ValueError(f"max tokens is {self.max_tokens}; it must be at least 1")
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (the likeliest token) or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top-p is {self.top_p}; it must be above 0 and at most 1")
        for name, value in (("frames", self.frames), ("fps", self.fps)):
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}; it must be above 0")
        if taken := sorted({*OURS} & {*self.extra}):
            raise ValueError(f"{', '.join(taken)} cannot be in extra: mmq sets {'it' if len(taken) == 1 else 'them'}")

    def options(self) -> dict[str, Any]:
        """As the openai client's `chat.completions.create` takes them, without `stream`."""
        options: dict[str, Any] = {"max_tokens": self.max_tokens, "temperature": self.temperature}
        if self.top_p is not None:
            options["top_p"] = self.top_p
        if self.seed is not None:
            options["seed"] = self.seed
        if self.stop:
            options["stop"] = [self.stop] if isinstance(self.stop, str) else list(self.stop)
        if self.logprobs or self.top_logprobs:
            options["logprobs"] = True
        if self.top_logprobs:
            options["top_logprobs"] = self.top_logprobs
        body = dict(self.extra)
        # two names of one thing: of vLLM's loaders those of Qwen-VL and the like know the second, the others the first
        asked = {"num_frames": self.frames, "max_frames": self.frames, "fps": self.fps}
        if video := {key: value for key, value in asked.items() if value is not None}:
            given = body.get("media_io_kwargs", {})
            body["media_io_kwargs"] = {**given, "video": {**given.get("video", {}), **video}}
        return options | ({"extra_body": body} if body else {})


DEFAULT = RequestConfig()


def config_of(*, extra: str | None, stream: bool | None, by_default: bool, **how: Any) -> RequestConfig:
    """A `RequestConfig` of the command line's words: `extra` is JSON, `stream` None means `by_default`. ValueError."""
    try:
        body = json.loads(extra) if extra else {}
    except ValueError as e:
        raise ValueError(f"--extra is no JSON: {e}") from None
    if not isinstance(body, dict):
        raise ValueError("--extra must be an object, as '{\"repetition_penalty\": 1.05}'")
    return RequestConfig(extra=body, stream=by_default if stream is None else stream, **how)
