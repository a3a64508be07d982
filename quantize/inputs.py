"""Samples become model inputs, through the model's own processor. Knows nothing of weights or methods."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..recipes.samples import Sample, blind
from .skeleton import Skeleton

WAITING = 4  # micro-batches' worth of encoded samples that may wait for others of their shape
AHEAD = 16  # samples encoded before they are asked for


def encode(skeleton: Skeleton, sample: Sample, *, prompt_only: bool = False) -> dict[str, Any]:
    """The processor's tensors for one sample, batch of one, on the skeleton's device.

    `prompt_only` leaves the assistant's last answer out and opens its turn instead. ValueError names what the
    processor refuses.
    """
    inputs = _encode(skeleton, sample, prompt_only=prompt_only)
    return {k: v.to(skeleton.device) for k, v in inputs.items()}


def suited(skeleton: Skeleton, samples: Sequence[Sample]) -> list[Sample]:
    """The samples as this model can read them: of a text model's the pictures are left out."""
    return list(samples) if skeleton.sees else [blind(s) for s in samples]


def _encode(skeleton: Skeleton, sample: Sample, *, prompt_only: bool = False) -> dict[str, Tensor]:
    sample, processor = suited(skeleton, [sample])[0], skeleton.processor
    messages = sample.question.messages if prompt_only else sample.messages
    text = conversation(processor, messages, opened=prompt_only, parts=skeleton.sees)
    media: dict[str, Any] = {}
    if sample.images:
        media["images"] = list(sample.images)
    if sample.videos:
        media["videos"] = list(sample.videos)
    try:
        inputs = processor(text=[text], return_tensors="pt", **media)
    except (ValueError, TypeError, LookupError, RuntimeError) as e:
        raise ValueError(f"the model's processor refuses a sample ({_begin(text)}): {_first_line(e)}") from None
    if not inputs["input_ids"].numel():
        raise ValueError("a sample has no tokens: its messages are empty, and the model's chat template adds nothing")
    return {k: v for k, v in inputs.items() if isinstance(v, Tensor)}


def _begin(text: str) -> str:
    """By what a user finds a sample again: as it was put to the model."""
    return repr(text if len(text) <= 120 else f"{text[:80]}...{text[-37:]}")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def conversation(processor: Any, messages: Sequence[Mapping[str, Any]], *, opened: bool, parts: bool) -> str:
    """The prompt for `messages`, with the assistant's turn opened where asked, by the model's own chat template.

    A text model's template, or that of a tokenizer, takes words and not `parts`: there the processor's placeholder
    (or what its `picture` says, where a row's code made it) stands for a picture. A template that knows no system
    message gets it in front of the first question; without a template, roles and words stand line by line. ValueError
    where the template refuses.
    """
    from jinja2 import TemplateError

    owner, place = processor, ""
    if not processor.chat_template and hasattr(processor, "tokenizer"):
        place = getattr(processor, "picture", None) or getattr(processor, "image_token", "")
        owner, parts = processor.tokenizer, False
    said = [m if parts else {**m, "content": _words(m["content"], place)} for m in messages]
    if not owner.chat_template:
        lines = [f"{m['role'].capitalize()}: {m['content']}" for m in said]
        return "\n".join([*lines, "Assistant:"] if opened else lines)
    try:
        return owner.apply_chat_template(said, tokenize=False, add_generation_prompt=opened)
    except TemplateError as e:
        if messages[0]["role"] != "system" or len(messages) < 2:
            raise ValueError(f"the model's chat template refuses a sample: {_first_line(e)}") from None
        system, asked = ([p] if isinstance(p, str) else p for p in (m["content"] for m in messages[:2]))
        both = [p if not isinstance(p, str) else {"type": "text", "text": p} for p in (*system, "\n\n", *asked)]
        merged = [{**messages[1], "content": both}, *messages[2:]]
        return conversation(processor, merged, opened=opened, parts=parts)


def _words(content: str | Sequence[Mapping[str, Any]], place: str) -> str:
    return (
        content if isinstance(content, str) else "".join(p["text"] if p["type"] == "text" else place for p in content)
    )


def micro_batches(skeleton: Skeleton, samples: Sequence[Sample], *, tokens: int) -> Iterator[dict[str, Tensor]]:
    """The samples encoded, those whose tensors have equal shapes put together up to about `tokens` tokens, on the
    skeleton's device. Nothing is padded, so no token is there that the samples do not have.

    Samples are encoded ahead in a thread of their own and held on the host until they are handed out: a few
    micro-batches at most.
    """
    waiting: dict[Any, list[dict[str, Tensor]]] = {}  # in the order in which a shape was first met
    held = 0
    for inputs in _ahead(skeleton, samples):
        shape = tuple((k, tuple(v.shape), v.dtype) for k, v in inputs.items())
        size = inputs["input_ids"].numel()
        waiting.setdefault(shape, []).append(inputs)
        held += size
        full = shape if (len(waiting[shape]) + 1) * size > tokens else None
        if full is None and held > WAITING * tokens:
            full = next(iter(waiting))
        if full is not None:
            batch = waiting.pop(full)
            held -= sum(i["input_ids"].numel() for i in batch)
            yield _joined(skeleton, batch)
    for batch in waiting.values():
        yield _joined(skeleton, batch)


def _joined(skeleton: Skeleton, batch: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One call's inputs: whatever a processor makes for several samples, it puts behind one another."""
    return {k: torch.cat([inputs[k] for inputs in batch]).to(skeleton.device) for k in batch[0]}


def _ahead(skeleton: Skeleton, samples: Sequence[Sample]) -> Iterator[dict[str, Tensor]]:
    with ThreadPoolExecutor(1) as thread:  # one: a processor is not made for several
        rest: Iterable[Sample] = iter(samples)
        coming: list[Future[dict[str, Tensor]]] = [thread.submit(_encode, skeleton, s) for s in islice(rest, AHEAD)]
        while coming:
            yield coming.pop(0).result()
            coming += [thread.submit(_encode, skeleton, s) for s in islice(rest, 1)]


def media_mask(skeleton: Skeleton, input_ids: Tensor) -> Tensor:
    """bool, as `input_ids`: True where a token stands for a piece of a picture or a video."""
    config = skeleton.module.config
    mask = torch.zeros_like(input_ids, dtype=torch.bool)
    for part in (config, getattr(config, "vision_config", None)):
        for key in ("image_token_id", "image_token_index", "video_token_id", "video_token_index"):
            token = getattr(part, key, None)
            if isinstance(token, int):
                mask |= input_ids == token
    return mask


def answer_mask(skeleton: Skeleton, sample: Sample, input_ids: Tensor) -> Tensor:
    """bool [tokens]: True where the *next* token is part of the assistant's last answer, its end token included.

    This is where a model speaks, so this is where its distribution is compared. What a chat template writes behind
    the end token (a newline, as a rule) no model ever says, so it is left out.
    """
    prompt = encode(skeleton, sample, prompt_only=True)["input_ids"].shape[1]
    ends = torch.tensor(sorted(end_tokens(skeleton)), device=input_ids.device)
    ended = torch.isin(input_ids[0, prompt:], ends).nonzero()
    last = prompt + int(ended[0]) if len(ended) else input_ids.shape[1] - 1  # the answer's last token
    mask = torch.zeros(input_ids.shape[1], dtype=torch.bool, device=input_ids.device)
    mask[prompt - 1 : last] = True
    return mask


def end_tokens(skeleton: Skeleton) -> set[int]:
    """The token ids that end an answer, by the model's generation config."""
    ends = skeleton.module.generation_config.eos_token_id
    return set() if ends is None else set(ends) if isinstance(ends, list) else {ends}
