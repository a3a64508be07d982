"""What a model costs to serve, read from its folder: bytes of weights, bytes of key-value cache per token.

Reads config.json and the weight files' sizes with the standard library. Knows no engine and no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..export.subject import text_config
from ..recipes.folder import read_config, shard_names

# layers of other kinds (Mamba, gated delta net) keep a state of fixed size, not a cache that grows with each token
CACHED_LAYERS = ("full_attention", "sliding_attention", "chunked_attention")
BLOCK = 16  # tokens; vLLM's cache is handed out in blocks of so many on a GPU
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Shape:
    """`weights` in bytes on disk, `kv_token` in bytes per token of context over all layers, `context` in tokens."""

    weights: int
    kv_token: int
    context: int
    quantized: str | None  # quantization_config's quant_method, None for 16 bit
    vision: bool
    dtype: str
    heads: int = 1  # attention heads of the decoder, which tensor parallelism deals out


def kv_token_bytes(config: Mapping[str, Any], *, itemsize: int = 2, tp: int = 1) -> int:
    """Bytes of key-value cache that one token takes over all layers, at `itemsize` bytes an element.

    On each of `tp` GPUs: heads are dealt out, and copied where there are fewer. Multi-head latent attention
    (`kv_lora_rank`) keeps one compressed vector instead of keys and values, whole on each GPU. Sliding layers count
    in full: an upper bound. ValueError where the config does not tell.
    """
    text = text_config(config)
    try:
        layers = int(text["num_hidden_layers"])
        kinds = text.get("layer_types")
        if kinds:
            layers = sum(kind in CACHED_LAYERS for kind in kinds[:layers])
        if text.get("kv_lora_rank"):
            return layers * (int(text["kv_lora_rank"]) + int(text["qk_rope_head_dim"])) * itemsize
        heads = int(text["num_attention_heads"])
        kv_heads = int(text.get("num_key_value_heads") or heads)
        head_dim = int(text.get("head_dim") or int(text["hidden_size"]) // heads)
    except (KeyError, TypeError, ZeroDivisionError) as e:
        raise ValueError(f"config.json does not tell the cache's size: {e} is missing or not a number") from None
    return layers * 2 * math.ceil(kv_heads / tp) * head_dim * itemsize


def is_mixture(config: Mapping[str, Any]) -> bool:
    """Whether each token reads only some of the decoder's weights."""
    text = text_config(config)
    return any(text.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts"))


def context_length(config: Mapping[str, Any]) -> int:
    """The longest context the model was made for, in tokens; 2048 where the config does not say."""
    return int(text_config(config).get("max_position_embeddings") or 2048)


def tokens_in(room: int, kv_token: int) -> int:
    """Tokens of cache that `room` bytes hold, in whole blocks of `BLOCK`; a model without a cache counts as a byte."""
    return max(0, room) // (max(kv_token, 1) * BLOCK) * BLOCK


def weight_bytes(folder: Path) -> int:
    """Bytes of the safetensors files that make the model. Errors as `shard_names`."""
    return sum((folder / name).stat().st_size for name in shard_names(folder))


def read_shape(folder: Path) -> Shape:
    """Read the folder's config and sizes. OSError or ValueError as the functions above."""
    config = read_config(folder)
    text = text_config(config)
    quantization = config.get("quantization_config") or text.get("quantization_config") or {}
    method = quantization.get("quant_method") or ("bitsandbytes" if quantization.get("load_in_4bit") else None)
    dtype = str(config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or "bfloat16")
    return Shape(
        weights=weight_bytes(folder),
        kv_token=kv_token_bytes(config, itemsize=min(DTYPE_BYTES.get(dtype, 2), 2)),
        context=context_length(config),
        quantized=method,
        vision="vision_config" in config or "visual" in config or "vision_tower" in config,
        dtype=dtype,
        heads=int(text.get("num_attention_heads") or 1),
    )
