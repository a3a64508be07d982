"""What vLLM takes of a GPU beside weights and cache: the passes it profiles with, CUDA graphs, libraries. An estimate.

Each number names where it comes from: vLLM's sources (v1/worker/gpu_model_runner.py, `profile_run` and
`profile_cudagraph_memory`), and starts of vLLM 0.26 on a GPU, which docs/planner.md has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..export.subject import text_config
from .machine import GIB
from .pictures import Vision

ESTIMATE = "estimate; docs/planner.md has how near it comes to vLLM on a GPU"
ITEM = 2  # bytes of an activation
CUDA_CONTEXT = 5 * 2**27  # what driver and libraries hold beside tensors; as in the quantizer's estimate
MARGIN = 0.005  # of the card: what the driver keeps of the nominal size, an allocator's rounding, our own error
LIBRARIES = 23 * GIB // 100  # cuBLAS and attention workspaces, "non-torch" in vLLM's log: 0.22 GiB, MiniCPM-V 0.36
BESIDE = 1 << 26  # what a pass has beside the tensors counted here: 0.055 GiB, alike in five starts
TURNED = 0.026  # of packed weights: what Marlin's order takes more of the GPU than the file's; 7B's shape, two families
NCCL = GIB // 2  # buffers of a group of GPUs; vLLM's utils/mem_utils.py gives 0.5 GiB as its example, assumed here
GRAPHS = GIB // 4  # the pool that all CUDA graphs share, and
GRAPH = 2 << 20  # each graph's own; in vLLM 0.26's logs 35 graphs have 0.19 to 0.25 GiB, 84 have 0.30 to 0.36
GRAPH_SIZE = 512  # tokens of the largest graph, 1024 on Blackwell's B cards
SAMPLED = (
    24  # bytes a logit while sampling: 2 as put out, 4 as float32, 4 + 8 sorted and indexed, 4 probabilities, masks
)
UNKNOWN_TOWER = GIB  # for a vision tower of a family that is not in pictures.KINDS; assumed


def batched_tokens(card_memory: int, name: str = "") -> int:
    """vLLM's own `--max-num-batched-tokens` for a server, by the card (engine/arg_utils.py, get_batch_defaults)."""
    return 16384 if card_memory >= 160 * GIB else 8192 if _large(card_memory, name) else 2048


def default_sequences(card_memory: int, name: str = "") -> int:
    """vLLM's own `--max-num-seqs` for a server, by the card (the same function)."""
    return 1024 if _large(card_memory, name) else 256


def _large(card_memory: int, name: str) -> bool:
    return card_memory >= 160 * GIB or (card_memory >= 70 * GIB and "a100" not in name.lower())


def widths(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """The decoder's width, its MLP's at work on one token, and its vocabulary. ValueError where one is missing."""
    text = text_config(config)
    try:
        inner = int(text.get("intermediate_size") or 0)
        experts = int(text.get("num_experts_per_tok") or 0) * int(text.get("moe_intermediate_size") or 0)
        return int(text["hidden_size"]), max(inner, experts), int(text["vocab_size"])
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError(f"config.json does not tell the decoder's size: {e} is missing or not a number") from None


def rotary_bytes(config: Mapping[str, Any]) -> int:
    """Bytes of the decoder's table of sines and cosines: a row for each position; four times as many where positions
    have three parts (MRotaryEmbedding in vLLM's rotary_embedding/mrope.py). 0 where the config does not tell."""
    text = text_config(config)
    heads = int(text.get("num_attention_heads") or 0)
    rope: Any = text.get("rope_parameters") or text.get("rope_scaling") or {}
    width = int(text.get("head_dim") or int(text.get("hidden_size") or 0) // max(heads, 1))
    parts = 4 if isinstance(rope, Mapping) and rope.get("mrope_section") else 1
    return parts * int(text.get("max_position_embeddings") or 0) * width * ITEM


def profiled_tokens(vision: Vision, *, batched: int, sequences: int, images: int, video: bool, context: int) -> int:
    """Tokens of vision features in the profiling pass: as many of the largest items as the encoder's budget holds.

    The budget is `max(batched, one item)` (v1/core/encoder_cache_manager.py, compute_mm_encoder_budget), the number
    of items `_get_max_items` in multimodal/encoder_budget.py; the item is a video where one is longer than a picture.
    """
    item, most = vision.tokens, images
    if video and vision.video_tokens(context) >= item:
        item, most = vision.video_tokens(context), 999  # vLLM's limit where none is set
    if most < 1:
        return 0
    a_prompt = max(1, min(most, context // item))
    return item * max(1, min(max(batched, item) // item, sequences * a_prompt))


def tower_bytes(vision: Vision, tokens: int, *, tp: int = 1, native: bool = False) -> int:
    """Bytes that the tower's widest moment takes for `tokens` tokens of features.

    A block holds what it was given, the residual and its norm (3 widths a patch), and either q, k, v, then q and k
    before and after the rotation and the output (8 more), or what the MLP opens to and its activation (3 inner widths
    where gated, else 2); read off VisionBlock and VisionAttention in vLLM's qwen2_5_vl.py. `native`: activations by
    plain torch, with one more inner width, as vLLM has them where it compiles the decoder (CustomOp.forward_native).
    The pixels are there meanwhile. A resampler (`Resampler2_5` in minicpmv.py) has 5 decoder widths a patch (positions,
    x, their sum, keys, values), one for a copy in torch's order, and one for the scores, beside the tower's output.
    """
    share = tp if vision.heads % tp == 0 else 1
    opened = ((3 if vision.gated else 2) + (native and vision.own_act)) * vision.inner / share
    block = vision.patch + 3 * vision.hidden + max(8 * vision.hidden / share, opened)
    resampler = vision.hidden + 7 * vision.resampled if vision.resampled else 0
    return int(tokens * vision.per_token * max(block, resampler) * ITEM) + BESIDE


def decoder_bytes(config: Mapping[str, Any], batched: int, *, tp: int = 1) -> int:
    """Bytes of one decoder layer's pass over `batched` tokens: 3 widths (residual, norm, output), 3 of the MLP's."""
    hidden, inner, _ = widths(config)
    return batched * ITEM * (3 * hidden + 3 * inner // tp)


def sampler_bytes(config: Mapping[str, Any], sequences: int) -> int:
    """Bytes of sampling for `sequences` sequences at once (`_dummy_sampler_run`: top-k and top-p over all logits)."""
    return sequences * widths(config)[2] * SAMPLED


def graph_count(sequences: int, batched: int, *, mode: str = "FULL_AND_PIECEWISE") -> int:
    """CUDA graphs captured: pieces up to twice the sequences, whole decode steps up to the sequences, or one of the two
    by vLLM's cudagraph_mode.

    The sizes are 1, 2, 4, then every 8th up to 256, then every 16th (config/vllm.py, _set_cudagraph_sizes).
    """
    most = min(2 * sequences, GRAPH_SIZE, batched)
    sizes = [*(n for n in (1, 2, 4)), *range(8, 256, 8), *range(256, GRAPH_SIZE + 1, 16)]
    pieces, whole = sum(n <= most for n in sizes), sum(n <= sequences for n in sizes)
    return ("PIECEWISE" in mode) * pieces + ("FULL" in mode) * whole
