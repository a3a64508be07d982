"""LMDeploy's memory: the share of what the weights leave free that its cache may have, and the tokens that it holds.

LMDeploy loads the weights, asks CUDA what is free, and takes a share of that for its cache before anything ran; what
the passes need must fit into the rest. TurboMind's cache is `free x share` (src/turbomind/turbomind.cc, CreateEngine);
the PyTorch engine first sets memory aside for logits, `(free - reserve) x share` (pytorch/engine/executor/base.py,
update_configs). Read in 0.16 and later, held against 0.18 on an H200 (docs/serving.md). Arithmetic, knows no flags.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..export.subject import text_config
from . import overhead
from .bill import Ask, Model, parts_of
from .machine import GIB, Gpu
from .shape import kv_token_bytes

SHARE = 0.8  # LMDeploy's own default, and the most that is given here
STEP = 8192  # tokens of a prefill at most, --max-prefill-token-num
BATCH = 128  # sequences; LMDeploy's own number for cards that it does not know by name
BLOCK = 64  # tokens; the cache is handed out in blocks of so many
LEAST = 16  # blocks that the PyTorch engine wants; it halves its prefill, and so the reserve, until there are so many
LOGIT = 2  # bytes of a logit in the reserve
BITS = {  # --quant-policy -> bits of an element of the cache
    **dict.fromkeys(("8", "int8", "16", "fp8", "fp8_e4m3", "17", "fp8_e5m2"), 8),
    **dict.fromkeys(("4", "int4"), 4),
}
GRID = ("8", "int8", "4", "int4")  # those that keep a scale and a zero for each token and head
PARAMETERS = 4  # bytes of the two
NATIVE = (
    6 * GIB // 10
)  # what TurboMind's library holds beside weights: 0.57 GiB (Qwen2-VL-2B, TurboMind), 0.87 (PyTorch)
HOPPER = 9.0  # the cards on which the PyTorch engine multiplies by TurboMind's kernels (backends/cuda/awq_modules.py)


@dataclass(frozen=True)
class Cache:
    """Bytes on each card, but for `share` and `tokens`. `beside`: what loading keeps beside the weights; `free`: when
    they are there; `reserved`: of it, before the share is taken; `work`: what the passes need beside the cache."""

    weights: int
    beside: int
    free: int
    reserved: int
    work: int
    share: float
    kv_token: int
    tokens: int


def cache_of(model: Model, card: Gpu, *, backend: str, tp: int = 1, policy: str | None = None) -> Cache:
    """What the cache may have under `backend`, turbomind or pytorch. No tokens where nothing is left for them."""
    weights = weights_of(model, card, backend=backend, tp=tp)
    beside = beside_of(model, card, backend=backend, tp=tp)
    free = card.free - overhead.CUDA_CONTEXT - weights - beside - (overhead.NCCL if tp > 1 else 0)
    kv_token = kv_bytes(model, backend=backend, tp=tp, policy=policy)
    step, reserved, work = STEP, 0, work_of(model, card, STEP, backend=backend, tp=tp)
    share = share_of(free, reserved, work)
    if backend == "pytorch":
        while step:
            reserved = (step + 2 * BATCH) * overhead.widths(model.config)[2] * LOGIT
            work = work_of(model, card, step, backend=backend, tp=tp)
            share = share_of(free, reserved, work)
            if int((free - reserved) * share) // (kv_token * BLOCK) >= LEAST:
                break
            step //= 2
    tokens = int((free - reserved) * share) // (kv_token * BLOCK) * BLOCK
    return Cache(weights, beside, free, reserved, work, share, kv_token, max(0, tokens))


def share_of(free: int, reserved: int, work: int) -> float:
    """The largest share, in hundredths, that leaves `work` free; what is reserved serves the work too."""
    if free <= reserved:
        return 0.01
    left = 1 - max(0, work - reserved) / (free - reserved)
    return min(SHARE, max(0.01, math.floor(100 * left) / 100))


def weights_of(model: Model, card: Gpu, *, backend: str, tp: int) -> int:
    """Of each card. TurboMind keeps a head that is the embeddings' a second time (turbomind/models, add_lm_head)."""
    weights = sum(_weights(model, card, tp).values())
    tied = backend == "turbomind" and not model.weights.parts["head"]
    return weights + (math.ceil(model.weights.parts["embeddings"] / tp) if tied else 0)


def beside_of(model: Model, card: Gpu, *, backend: str, tp: int) -> int:
    """What loading takes beside the weights and does not give back, bytes on each card.

    TurboMind's kernels want int4 weights in an order of their own. Where the PyTorch engine uses them it keeps the
    order of the file too (backends/cuda/turbomind_awq_modules.py). TurboMind itself had 2.3 GiB more in use beside 3.2
    packed than beside 16 bit; why was not found out, and the 3.2 are counted.
    """
    if backend == "pytorch" and not (model.weights.packed and card.capability == HOPPER):
        return 0
    return NATIVE + (_weights(model, card, tp)["weights: decoder"] if model.weights.packed else 0)


def _weights(model: Model, card: Gpu, tp: int) -> dict[str, int]:
    """Part -> bytes on each card."""
    parts = parts_of(model, card, Ask(images=1, tp=tp), 1)
    return {part.name: part.size for part in parts if part.name.startswith("weights")}


def work_of(model: Model, card: Gpu, step: int, *, backend: str, tp: int) -> int:
    """What runs beside the cache: pictures, a prefill of `step` tokens, sampling, libraries.

    TurboMind has memory of its own beside PyTorch's, which looks at one picture at a time (--vision-max-batch-size 1)
    and keeps what it took: the two add up. In the PyTorch engine pictures are a part of the prefill.
    """
    decoder = max(overhead.decoder_bytes(model.config, step, tp=tp), overhead.sampler_bytes(model.config, BATCH))
    pictures = overhead.UNKNOWN_TOWER if model.shape.vision else 0
    if (vision := model.vision) is not None:
        tokens = vision.tokens if backend == "turbomind" else max(1, step // vision.tokens) * vision.tokens
        pictures = overhead.tower_bytes(vision, tokens, tp=1 if backend == "turbomind" else tp)
        decoder += tokens * vision.outputs * overhead.widths(model.config)[0] * overhead.ITEM
    beside = overhead.LIBRARIES + int(overhead.MARGIN * card.memory)
    if backend == "turbomind":
        return beside + decoder + pictures
    graphs = overhead.GRAPHS + overhead.graph_count(BATCH, step) * overhead.GRAPH
    return beside + graphs + max(decoder, pictures)


def kv_bytes(model: Model, *, backend: str, tp: int, policy: str | None = None) -> int:
    """Bytes of cache a token. A quantized cache keeps a scale and a zero for each head; TurboMind has a place for them
    in any (kernels/attention/block.h, layer_size)."""
    elements = kv_token_bytes(model.config, itemsize=1, tp=tp)
    text = text_config(model.config)
    width = int(text.get("head_dim") or int(text["hidden_size"]) // int(text["num_attention_heads"]))
    size = elements * BITS.get(policy or "", 16) // 8
    return size + (elements // width * PARAMETERS if backend == "turbomind" or policy in GRID else 0)
