"""How good a pebble is: exact answers by task through transformers' own pass, and what plain int4 rounding costs."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..samples import Sample
from .network import logits
from .tasks import exact


@torch.inference_mode()
def answers(model: Any, processor: Any, asked: list[Sample], *, rows: int = 32, most: int = 128) -> list[str]:
    """Greedy answers to samples (their last answer is left out), `rows` at a time, at most `most` tokens each."""
    processor.tokenizer.padding_side = "left"
    order = sorted(range(len(asked)), key=lambda i: (bool(asked[i].videos), len(asked[i].answer or "")))
    out = [""] * len(asked)
    for start in range(0, len(order), rows):
        chosen = order[start : start + rows]
        some = [asked[i].question for i in chosen]
        texts = [processor.apply_chat_template(s.messages, tokenize=False, add_generation_prompt=True) for s in some]
        images = [image for s in some for image in s.images]
        videos = [list(video) for s in some for video in s.videos]
        inputs = processor(
            text=texts, images=images or None, videos=videos or None, padding=True, return_tensors="pt"
        ).to(model.device)
        made = model.generate(**inputs, max_new_tokens=most, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        for i, text in zip(chosen, processor.batch_decode(made, skip_special_tokens=True), strict=True):
            out[i] = text
    return out


def scores(asked: list[Sample], given: list[str]) -> dict[str, dict[str, tuple[int, int]]]:
    """Right answers and questions for each task, in English ("en") and Chinese ("zh")."""
    table: dict[str, dict[str, tuple[int, int]]] = {}
    for sample, text in zip(asked, given, strict=True):
        language = "zh" if any("一" <= letter <= "鿿" for letter in sample.answer or "") else "en"
        row = table.setdefault(sample.task or "", {"en": (0, 0), "zh": (0, 0)})
        right, total = row[language]
        row[language] = (right + exact(sample, text), total + 1)
    return table


def rounded(weight: Tensor, *, group: int = 128) -> Tensor:
    """The weight [out, in] after plain rounding to 4 bits, asymmetric, `group` inputs a scale."""
    w = weight.float().view(weight.shape[0], -1, group)
    low, high = w.amin(-1, keepdim=True).clamp(max=0), w.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 15).clamp(min=1e-8)
    zero = (-low / scale).round()
    return (((w / scale).round() + zero).clamp(0, 15) - zero).mul(scale).view_as(weight).to(weight.dtype)


@torch.inference_mode()
def rounding_loss(model: Any, batches: Iterable[dict[str, Tensor]]) -> dict[str, float]:
    """What int4 rounding of the decoder's linears does on answers as they should be: mean KL in nats, top-1 agreement.

    `batches` are of `batches.batch`; the weights are taken as bfloat16, as they are saved.
    """
    plain = copy.deepcopy(model).to(torch.bfloat16).float()
    coarse = copy.deepcopy(plain)
    for name, module in coarse.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            module.weight.copy_(rounded(module.weight))
    sums, count = torch.zeros(3, dtype=torch.float64), 0
    for batch in batches:
        p, q = (
            logits(dict(m.named_parameters()), m.config, batch, dtype=torch.float32).log_softmax(-1)
            for m in (plain, coarse)
        )
        kl = (p.exp() * (p - q)).sum(-1)
        agree = (p.argmax(-1) == q.argmax(-1)).double().sum()
        right = (p.argmax(-1) == batch["labels"]).double().sum()
        sums += torch.stack((kl.double().sum(), agree, right)).cpu()
        count += len(kl)
    mean = (sums / max(count, 1)).tolist()
    return {"mean_kl": mean[0], "top1_agreement": mean[1], "token_accuracy": mean[2], "tokens": float(count)}
