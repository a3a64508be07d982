"""Samples become model inputs, through the model's own processor. Knows nothing of weights or methods."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..recipes.samples import Sample
from .skeleton import Skeleton


def encode(skeleton: Skeleton, sample: Sample, *, prompt_only: bool = False) -> dict[str, Any]:
    """The processor's tensors for one sample, batch of one, on the skeleton's device.

    `prompt_only` leaves the assistant's last answer out and opens its turn instead. ValueError names what the
    processor refuses.
    """
    processor = skeleton.processor
    messages = sample.question.messages if prompt_only else sample.messages
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt_only)
    media: dict[str, Any] = {}
    if sample.images:
        media["images"] = list(sample.images)
    if sample.videos:
        media["videos"] = list(sample.videos)
    try:
        inputs = processor(text=[text], return_tensors="pt", **media)
    except (ValueError, TypeError, IndexError) as e:
        raise ValueError(f"the model's processor refuses a sample: {str(e).splitlines()[0]}") from None
    return {k: v.to(skeleton.device) for k, v in inputs.items() if isinstance(v, Tensor)}


def media_mask(skeleton: Skeleton, input_ids: Tensor) -> Tensor:
    """bool [1, tokens]: True where a token stands for a piece of a picture or a video."""
    config = skeleton.module.config
    mask = torch.zeros_like(input_ids, dtype=torch.bool)
    for key in ("image_token_id", "image_token_index", "video_token_id"):
        token = getattr(config, key, None)
        if token is not None:
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
