"""What mmq itself reads out of a checkpoint: the logprobs of given answers, to hold an engine's against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mmq.quantize.inputs import conversation, suited
from mmq.quantize.skeleton import Skeleton, load
from mmq.recipes.calibration import drawn


def prompts(skeleton: Skeleton, folder: Path, *, count: int = 6) -> list[dict[str, str]]:
    """Of the first `count` drawn samples those with at most one picture, as a vLLM request has them: the prompt with
    the model's own placeholder, the answer, and the picture's file in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for number, sample in enumerate(suited(skeleton, drawn(count))):
        if len(sample.images) > 1 or sample.answer is None:
            continue
        asked = sample.question.messages
        request = {"prompt": conversation(skeleton.processor, asked, opened=True, parts=skeleton.sees)}
        request["answer"] = sample.answer
        if sample.images:
            request["image"] = str(folder / f"{number}.png")
            sample.images[0].save(request["image"])
        found.append(request)
    return found


def read(skeleton: Skeleton, requests: list[dict[str, str]]) -> list[list[float]]:
    """For each request the logprobs of its answer's tokens, the whole model in memory."""
    load(skeleton, list(skeleton.names))
    skeleton.module.tie_weights()
    found = []
    for request in requests:
        media: dict[str, Any] = {"images": [Image.open(request["image"])]} if "image" in request else {}
        encoded = skeleton.processor(text=[request["prompt"] + request["answer"]], return_tensors="pt", **media)
        inputs = {k: v.to(skeleton.device) for k, v in encoded.items() if isinstance(v, torch.Tensor)}
        count = len(skeleton.words.encode(request["answer"], add_special_tokens=False))
        with torch.no_grad():
            hidden = skeleton.module.base_model(**inputs, use_cache=False).last_hidden_state[0, -count - 1 : -1]
            said = logits(skeleton, hidden).log_softmax(-1)
        found.append(said.gather(1, inputs["input_ids"][0, -count:, None])[:, 0].tolist())
    return found


def logits(skeleton: Skeleton, hidden: torch.Tensor) -> torch.Tensor:
    """The head's, float32 [tokens, words]."""
    out = skeleton.module.get_output_embeddings()(hidden).float()
    cap = getattr(skeleton.module.config.get_text_config(), "final_logit_softcapping", None)
    return out if cap is None else torch.tanh(out / cap) * cap


def apart(one: list[list[float]], two: list[list[float]]) -> float:
    """The largest difference between any two logprobs."""
    assert [len(x) for x in one] == [len(y) for y in two]
    return max(abs(a - b) for x, y in zip(one, two, strict=True) for a, b in zip(x, y, strict=True))
