"""The PyTorch engine's face: a request as other engines take it, as `transformers serve` takes it; errors as OpenAI's.

What transformers would leave out without a word is refused here, by name. Knows neither torch nor a model.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .pytorch_sampling import sampling

MAX_LOGPROBS = 20  # as OpenAI and vLLM have it
# transformers serve ignores these; what they are worth when they ask for nothing
ASKS_NOTHING: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "echo": (False,),
    "suffix": ("",),
    "audio": (),
    "functions": ((), []),
    "function_call": ("none", "auto"),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
TEXTS = ("text", "input_text", "output_text")
MEDIA = {  # a part's type as people write it -> as transformers has it
    **dict.fromkeys(("image_url", "image", "input_image"), "image_url"),
    **dict.fromkeys(("video_url", "video"), "video_url"),
}
# ours and other servers' that only say how the answer is sent, and whose
LEFT_OUT = frozenset(
    {
        "stream_options",
        "user",
        "store",
        "metadata",
        "service_tier",
        "parallel_tool_calls",
        "prediction",
        "safety_identifier",
        "prompt_cache_key",
    }
)


@dataclass(frozen=True)
class Asked:
    """A request as transformers takes it; `logprobs`: None, or how many of the likeliest tokens go with each;
    `ignore_eos`: the answer is as long as it may be, which is for measuring. `prompt_logprobs`: those of the prompt's
    tokens are all that is wanted, the assistant's turn `opened` behind it or not."""

    body: dict[str, Any]
    logprobs: int | None = None
    ignore_eos: bool = False
    prompt_logprobs: bool = False
    opened: bool = True


def asked(body: Mapping[str, Any], *, name: str) -> Asked:
    """The request as transformers takes it. LookupError for another model; ValueError for what this engine has not,
    and for a medium that is no data URL (the guard before this has made every other one)."""
    if body.get("model") not in (None, name):
        raise LookupError(f"the model {body['model']!r} does not exist; this server has {name!r}")
    for key, nothing in ASKS_NOTHING.items():
        if body.get(key) is not None and body[key] not in nothing:
            raise ValueError(f"the pytorch engine has no {key}; serve with --engine vllm, or leave it out")
    kept = {k: v for k, v in body.items() if k not in ASKS_NOTHING and k not in LEFT_OUT and v is not None}
    kept["model"] = name
    if "max_completion_tokens" in kept:
        kept["max_tokens"] = kept.pop("max_completion_tokens")
    chat = "messages" in kept
    if not chat and "prompt" not in kept:
        raise ValueError("the request has neither messages (chat) nor a prompt (completions)")
    kept = sampling(kept, chat=chat)
    top = kept.pop("top_logprobs", 0)
    wanted = kept.pop("logprobs", None)
    if wanted in (None, False):
        count = None
    elif not chat:
        raise ValueError("the pytorch engine gives logprobs of chat completions alone; ask /v1/chat/completions")
    elif kept.get("stream"):
        raise ValueError("the pytorch engine gives logprobs of whole answers, not in a stream; leave out one of both")
    elif isinstance(top, bool) or not isinstance(top, int) or not 0 <= top <= MAX_LOGPROBS:
        raise ValueError(f"top_logprobs is {top!r}; it must be 0 to {MAX_LOGPROBS}")
    else:
        count = top
    endless = bool(kept.pop("ignore_eos", False))
    prompt = kept.pop("prompt_logprobs", None)
    opened = kept.pop("add_generation_prompt", True) is not False
    if prompt is not None and (prompt != 0 or isinstance(prompt, bool) or not chat or kept.get("stream")):
        raise ValueError("the pytorch engine gives prompt_logprobs: 0 of whole chat requests, and no other")
    if not opened and prompt is None:
        raise ValueError("add_generation_prompt: false goes with prompt_logprobs: 0 alone")
    loaded = (kept.pop("media_io_kwargs", None) or {}).get("video") or {}
    frames = {key: loaded[key] for key in ("fps", "num_frames") if loaded.get(key) is not None}
    if frames:  # vLLM's words; transformers takes one of the two
        first = "fps" if "fps" in frames else "num_frames"
        kept["chat_template_kwargs"] = {**(kept.get("chat_template_kwargs") or {}), first: frames[first]}
    if chat:
        kept["messages"] = [plain_message(message) for message in kept["messages"]]
    return Asked(kept, count, endless, prompt is not None, opened)


def plain_message(message: Any) -> dict[str, Any]:
    """A message whose parts are text, image_url and video_url; those of other spellings ({"type": "image", "image":
    URL}) turned into them. ValueError where it is no message, or a medium is named in another way than by a data URL:
    transformers would read any file of this machine, and follow any redirect."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError("a message must have a role and a content")
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": [plain_part(part) for part in content]}


def plain_part(part: Any) -> dict[str, Any]:
    """One part of a message, as `plain_message` wants it."""
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        raise ValueError("a part of a message must have a type, as text or image_url")
    if kind in TEXTS:
        if not isinstance(part.get("text"), str):
            raise ValueError(f"a part of type {kind} must have a text")
        return {"type": "text", "text": part["text"]}
    if kind not in MEDIA:
        raise ValueError(f"the pytorch engine takes parts of type text, image_url and video_url, not {kind!r}")
    name = MEDIA[kind]
    held = next((part[key] for key in (kind, name, name.removesuffix("_url"), "url") if key in part), None)
    url = held.get("url") if isinstance(held, dict) else held
    if not isinstance(url, str) or not url.startswith("data:"):
        raise ValueError(f"a part of type {name} must have a url of this medium, {{'{name}': {{'url': ...}}}}")
    return {"type": name, name: {"url": url}}


def failure(why: str, status: int) -> dict[str, Any]:
    """OpenAI's form of an error."""
    kind = {404: "NotFoundError"}.get(status, "BadRequestError" if status < 500 else "InternalServerError")
    return {"error": {"message": why, "type": kind, "param": None, "code": status}}


def unsaid(name: str, request_id: str, prompt_logprobs: list[Any]) -> dict[str, Any]:
    """A chat completion in which nothing was generated, with vLLM's key beside OpenAI's."""
    choice = {"index": 0, "finish_reason": "length", "message": {"role": "assistant", "content": ""}}
    usage = {"prompt_tokens": len(prompt_logprobs), "completion_tokens": 0, "total_tokens": len(prompt_logprobs)}
    said = {"id": request_id, "object": "chat.completion", "created": int(time.time()), "model": name}
    return {**said, "choices": [choice], "usage": usage, "prompt_logprobs": prompt_logprobs}


def token_entry(token: str, logprob: float, others: list[tuple[str, float]]) -> dict[str, Any]:
    """OpenAI's record of one token, with others that were likely in its place."""

    def one(text: str, value: float) -> dict[str, Any]:
        return {"token": text, "logprob": value, "bytes": list(text.encode())}

    return {**one(token, logprob), "top_logprobs": [one(text, value) for text, value in others]}
