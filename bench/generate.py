"""Greedy answers of a streamed model: every sample's `generate` runs in lockstep, layer by layer.

Knows no file format: a packed artifact and its FP16 base are both a Skeleton with a Source.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..quantize.inputs import end_tokens
from ..quantize.lockstep import Lockstep
from ..quantize.skeleton import Skeleton, load_layer, load_outside, release_layer
from ..recipes.progress import Step, Tell, silent

SHARE = 0.7  # of the free memory, for the decoder layers; the rest is for the key-value cache and activations


def answers(
    skeleton: Skeleton,
    prompts: Sequence[Mapping[str, Tensor]],
    *,
    max_new_tokens: int = 64,
    resident: bool = True,
    name: str = "answer",
    tell: Tell = silent,
) -> list[list[int]]:
    """Greedy token ids for each encoded prompt, end token left out.

    `resident` keeps each decoder layer once loaded: much faster, for a model that fits the device. Otherwise one layer
    is in memory at a time, and every new token reads the whole model again.
    """
    module = skeleton.module
    ends = end_tokens(skeleton)

    def call(prompt: Mapping[str, Tensor]) -> list[int]:
        out = module.generate(**prompt, max_new_tokens=max_new_tokens, do_sample=False, use_cache=True)
        new = out[0, prompt["input_ids"].shape[1] :].tolist()
        return new[:-1] if new and new[-1] in ends else new

    loaded: set[int] = set()
    rounds = 0
    with torch.no_grad():
        load_outside(skeleton)
        with Lockstep(skeleton.layers, [lambda p=p: call(p) for p in prompts]) as steps:
            for stop in steps:
                if stop.index not in loaded:
                    load_layer(skeleton, stop.index)
                    loaded.add(stop.index)
                stop.advance()
                if not resident:
                    release_layer(skeleton, stop.index)
                    loaded.discard(stop.index)
                if stop.index + 1 == len(skeleton.layers):
                    rounds += 1
                    tell(Step(name, min(rounds, max_new_tokens), max_new_tokens))
    for index in loaded:
        release_layer(skeleton, index)
    tell(Step(name, max_new_tokens, max_new_tokens))
    return steps.results


def fits(skeleton: Skeleton) -> bool:
    """Whether the decoder layers, in the compute dtype, take less than SHARE of what the device has free."""
    count = sum(p.numel() for layer in skeleton.layers for p in layer.parameters())
    size = count * torch.finfo(skeleton.dtype).bits // 8
    if skeleton.device.type == "cuda":
        # what torch holds and does not use is free too, though the driver counts it as taken
        idle = torch.cuda.memory_reserved(skeleton.device) - torch.cuda.memory_allocated(skeleton.device)
        return size < (torch.cuda.mem_get_info(skeleton.device)[0] + idle) * SHARE
    import psutil

    return size < psutil.virtual_memory().available * SHARE
