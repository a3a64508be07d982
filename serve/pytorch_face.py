"""The PyTorch engine's face: what a request to it may say, in the words of OpenAI and vLLM. What this engine has not is
refused by name, never left out without a word. Knows neither torch nor a model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .pytorch_sampling import TAKEN, Sampling, sampling

MAX_LOGPROBS = 20  # as OpenAI and vLLM have it
# what other engines have and this has not -> what asks for nothing
ASKS_NOTHING: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
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
# what says whose a request is, and nothing of its answer
LEFT_OUT = frozenset(
    {
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
BOTH = TAKEN | {"model", "stream", "stream_options", "logprobs"}
CHAT = BOTH | {
    "messages",
    "tools",
    "top_logprobs",
    "prompt_logprobs",
    "add_generation_prompt",
    "chat_template_kwargs",
    "media_io_kwargs",
}
COMPLETION = BOTH | {"prompt"}
# words to a template that are the engine's own to say
TEMPLATES_OWN = frozenset({"add_generation_prompt", "chat_template", "documents", "messages", "tokenize", "tools"})


@dataclass(frozen=True)
class Asked:
    """A request: a conversation, or `prompts` (texts, or tokens) to be completed. `logprobs`: None, or how many of the
    likeliest tokens go with each. `usage`: a stream tells it. `prompt_logprobs`: those of the prompt's tokens are all
    that is wanted, the assistant's turn `opened` behind it or not."""

    model: str
    how: Sampling
    messages: Sequence[Mapping[str, Any]] = ()
    prompts: Sequence[str | list[int]] = ()
    tools: list[Any] | None = None
    template: Mapping[str, Any] = field(default_factory=dict)  # words to the chat's template
    frames: Mapping[str, Any] = field(default_factory=dict)  # of videos: fps or num_frames
    logprobs: int | None = None
    stream: bool = False
    usage: bool = False
    prompt_logprobs: bool = False
    opened: bool = True

    @property
    def chat(self) -> bool:
        """Whether it is a conversation."""
        return not self.prompts


def asked(body: Mapping[str, Any], *, names: Sequence[str], chat: bool) -> Asked:
    """The request to the chat's endpoint, or to that of completions. `names`: the model's and those of its adapters.
    LookupError for another model; ValueError for what this engine has not, and for a medium that is no data URL (the
    guard before this has made every other one)."""
    said = {key: value for key, value in body.items() if value is not None and key not in LEFT_OUT}
    model = said.get("model", names[0])
    if model not in names:
        raise LookupError(f"the model {model!r:.200} does not exist; this server has {', '.join(names)}")
    for key, value in said.items():
        if value not in ASKS_NOTHING.get(key, ()) and key not in (CHAT if chat else COMPLETION):
            why = f"the pytorch engine has no {key:.60} in {'chats' if chat else 'completions'}"
            raise ValueError(f"{why}; serve with --engine vllm, or leave it out")
    how, stream = sampling(said, chat=chat), said.get("stream", False)
    if not isinstance(stream, bool):
        raise ValueError(f"stream is {stream!r:.60}; it must be true or false")
    usage = bool(_object(said, "stream_options").get("include_usage"))
    told = {"model": model, "how": how, "stream": stream, "usage": usage, "logprobs": _logprobs(said, chat=chat)}
    if not chat:
        return Asked(**told, prompts=_prompts(said.get("prompt")))
    messages = said.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError("the request must have messages, at least one")
    tools = said.get("tools") or None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError("tools must be a list of objects, as OpenAI has them")
    prompt, opened = said.get("prompt_logprobs"), said.get("add_generation_prompt", True) is not False
    if prompt is not None and (prompt != 0 or isinstance(prompt, bool) or stream):
        raise ValueError("the pytorch engine gives prompt_logprobs: 0 of whole chat requests, and no other")
    if not opened and prompt is None:
        raise ValueError("add_generation_prompt: false goes with prompt_logprobs: 0 alone")
    return Asked(
        **told,
        messages=[plain_message(message) for message in messages],
        tools=tools,
        template=_template(said),
        frames=_frames(said),
        prompt_logprobs=prompt is not None,
        opened=opened,
    )


def _object(said: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = said.get(key, {})
    if not isinstance(value, dict):
        raise ValueError(f"{key} is {value!r:.60}; it must be an object")
    return value


def _logprobs(said: Mapping[str, Any], *, chat: bool) -> int | None:
    """How many of the likeliest tokens go with each; a completion's `logprobs` is the number itself."""
    wanted = said.get("logprobs")
    count, key = (said.get("top_logprobs", 0), "top_logprobs") if chat else (wanted, "logprobs")
    if chat and not wanted:
        if count:
            raise ValueError("top_logprobs goes with logprobs: true")
        return None
    if count is None or (not chat and count is False):
        return None
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= MAX_LOGPROBS:
        raise ValueError(f"{key} is {count!r:.60}; it must be 0 to {MAX_LOGPROBS}")
    return count


def _prompts(given: Any) -> list[str | list[int]]:
    """A completion's prompts: one, or several in a list; each a text or a list of tokens."""
    several = given if isinstance(given, list) and not all(_is_token(item) for item in given) else [given]
    for prompt in several:
        tokens = isinstance(prompt, list) and all(_is_token(item) for item in prompt)
        if not prompt or not (tokens or isinstance(prompt, str)):
            raise ValueError(f"prompt is {given!r:.60}; it must be a text or tokens, or a list of such, none empty")
    return several


def _is_token(item: Any) -> bool:
    return isinstance(item, int) and not isinstance(item, bool) and item >= 0


def _template(said: Mapping[str, Any]) -> Mapping[str, Any]:
    """Words to the chat's template."""
    words = _object(said, "chat_template_kwargs")
    if own := sorted(words.keys() & TEMPLATES_OWN):
        raise ValueError(f"chat_template_kwargs has {own[0]}, which the server alone says; leave it out")
    return words


def _frames(said: Mapping[str, Any]) -> dict[str, Any]:
    """Which frames of a video: of vLLM's words the one that transformers takes."""
    loaded = _object(_object(said, "media_io_kwargs"), "video")
    found = next((key for key in ("fps", "num_frames") if loaded.get(key) is not None), None)
    if found is None:
        return {}
    value = loaded[found]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{found} of videos is {value!r:.60}; it must be a number above 0")
    return {found: value}


def plain_message(message: Any) -> dict[str, Any]:
    """A message whose parts are text, image_url and video_url; those of other spellings ({"type": "image", "image":
    URL}) turned into them. ValueError where it is no message, or a medium is named in another way than by a data URL:
    transformers would read any file of this machine, and follow any redirect."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError("a message must have a role and a content")
    content = message.get("content")
    if isinstance(content, list):
        return {**message, "content": [plain_part(part) for part in content]}
    if content is not None and not isinstance(content, str):
        raise ValueError(f"the content of a message is {content!r:.60}; it must be a text or a list of parts")
    return message


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
