"""What a model costs to serve, read from its folder: bytes of weights, bytes of key-value cache per token.

Reads config.json and the weight files' sizes with the standard library. Knows no engine and no torch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..export.subject import dtype_of, takes_pictures, text_config
from ..recipes.folder import read_config, shard_names
from ..recipes.sizes import count_of

BLOCK = 16  # tokens; vLLM's cache is handed out in blocks of so many on a GPU
# layers of other kinds keep a state of fixed size, not a cache that grows: gated delta nets' is counted, Mamba's is not
FULL = ("full_attention", "attention")
LINEAR = "linear_attention"
STATES = 2  # of a sequence that vLLM keeps in each such layer: prefix caching wants the one before too ("align")
WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
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


@dataclass(frozen=True)
class Layers:
    """So many layers alike, each with a cache of `width` bytes a token; `window`: the last tokens that they look at, 0
    for all. Or with a `state` of so many bytes, and no width."""

    count: int
    width: int
    window: int = 0
    state: int = 0

    @property
    def even(self) -> bool:
        """Whether each token takes as much as any other, however long the sequence."""
        return not self.window and not self.state


def cached(config: Mapping[str, Any], *, itemsize: int = 2, tp: int = 1) -> tuple[Layers, ...]:
    """The decoder's layers that have a cache, at `itemsize` bytes an element.

    On each of `tp` GPUs: heads are dealt out, and copied where there are fewer. Multi-head latent attention
    (`kv_lora_rank`) keeps one compressed vector instead of keys and values, whole on each GPU. The last
    `num_kv_shared_layers` look into others' cache (Gemma 3n and 4). ValueError where the config does not tell.
    """
    text = text_config(config)
    try:
        if text.get("kv_lora_rank"):
            width = (int(text["kv_lora_rank"]) + int(text["qk_rope_head_dim"])) * itemsize
            found = Counter((width, window) for _, _, window in _kinds(text))
        else:
            found = Counter(
                (2 * math.ceil(heads / tp) * width * itemsize, window) for heads, width, window in _kinds(text)
            )
        states = (text.get("layer_types") or []).count(LINEAR) if text.get("linear_num_value_heads") else 0
        linear = (Layers(states, 0, state=_state(text, tp)),) if states else ()
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as e:
        raise ValueError(f"config.json does not tell the cache's size: {e} is missing or not a number") from None
    return (*(Layers(count, width, window) for (width, window), count in found.items()), *linear)


def _state(text: Mapping[str, Any], tp: int) -> int:
    """Bytes of a gated delta net's state (`gated_delta_net_state_shape` in vLLM's mamba_utils.py)."""
    wide, deep = int(text["linear_value_head_dim"]), int(text["linear_key_head_dim"])
    heads, keys = int(text["linear_num_value_heads"]), int(text["linear_num_key_heads"])
    kept = (int(text["linear_conv_kernel_dim"]) - 1) * (2 * deep * keys + wide * heads) * 2
    return math.ceil((kept + heads * wide * deep * (4 if text.get("mamba_ssm_dtype") == "float32" else 2)) / tp)


def _kinds(text: Mapping[str, Any]) -> Iterator[tuple[int, int, int]]:
    """(key-value heads, their width, window) of each layer that has a cache of its own."""
    layers, every = int(text["num_hidden_layers"]), count_of(text.get("sliding_window_pattern"))
    kinds = text.get("layer_types")
    if not kinds:
        kinds = ["sliding_attention" if every and (n + 1) % every else FULL[0] for n in range(layers)]
    usual, widest = {}, {}
    if not text.get("kv_lora_rank"):
        heads = int(text["num_attention_heads"])
        usual = {
            "num_key_value_heads": int(text.get("num_key_value_heads") or heads),
            "head_dim": int(text.get("head_dim") or int(text["hidden_size"]) // heads),
        }
    if text.get("global_head_dim"):  # Gemma 4 as it was published; transformers writes it out for each layer since
        widest = {"head_dim": text["global_head_dim"]}
        if text.get("attention_k_eq_v") and text.get("num_global_key_value_heads"):
            widest["num_key_value_heads"] = text["num_global_key_value_heads"]
    own = {int(n): said for n, said in (text.get("per_layer_config") or {}).items()}
    for n, kind in enumerate(kinds[: layers - count_of(text.get("num_kv_shared_layers"))]):
        if kind in FULL or kind in WINDOWS:
            said = {**usual, **(widest if kind in FULL else {}), **own.get(n, {})}
            window = count_of(text.get(WINDOWS[kind])) if kind in WINDOWS else 0
            yield int(said.get("num_key_value_heads", 0)), int(said.get("head_dim", 0)), window


def token_bytes(layers: Iterable[Layers]) -> int:
    """Bytes of one token over all layers, however few of the last ones some look at."""
    return sum(kind.count * kind.width for kind in layers)


def kv_token_bytes(config: Mapping[str, Any], *, itemsize: int = 2, tp: int = 1) -> int:
    """`token_bytes` of the decoder's layers; as `cached`."""
    return token_bytes(cached(config, itemsize=itemsize, tp=tp))


def sequence_bytes(layers: Sequence[Layers], context: int, *, flying: int) -> int:
    """Bytes that one sequence of `context` tokens keeps; `flying` of them are scheduled and not done.

    As vLLM 0.32 has them (v1/core/kv_cache_utils.py): all pages are of one size, so narrow layers have more tokens on
    one, and a state takes a whole one, which is made as large; layers alike are dealt into groups of one size, of which
    the last may be short of some; a layer with a window keeps that, what is flying, and a page more.
    """
    widest, counts = max(kind.width for kind in layers), [kind.count for kind in layers]
    block = BLOCK * max(1, math.ceil(max(kind.state for kind in layers) / (BLOCK * widest)))  # tokens of a page
    group = max(counts) if max(counts) < 1.5 * min(counts) else min(counts)
    pages = 0
    for kind in layers:
        each = STATES
        if kind.width:
            tokens = min(kind.window - 1 + flying, context) if kind.window else context
            each = math.ceil(tokens / (block * max(1, widest // kind.width))) + bool(kind.window)
        pages += math.ceil(kind.count / group) * group * each
    return pages * widest * block


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


def held(room: int, layers: Sequence[Layers], context: int, *, flying: int) -> int:
    """Tokens that `room` bytes hold in sequences of `context` tokens, as vLLM tells them: of long ones with windows or
    states more than of short ones."""
    if all(kind.even for kind in layers) or not token_bytes(layers):
        return tokens_in(room, token_bytes(layers))
    return max(0, room) * context // sequence_bytes(layers, context, flying=flying)


def weight_bytes(folder: Path) -> int:
    """Bytes of the safetensors files that make the model. Errors as `shard_names`."""
    return sum((folder / name).stat().st_size for name in shard_names(folder))


def read_shape(folder: Path) -> Shape:
    """Read the folder's config and sizes. OSError or ValueError as the functions above."""
    config = read_config(folder)
    text = text_config(config)
    quantization = config.get("quantization_config") or text.get("quantization_config") or {}
    method = quantization.get("quant_method") or ("bitsandbytes" if quantization.get("load_in_4bit") else None)
    dtype = dtype_of(config) or "bfloat16"
    return Shape(
        weights=weight_bytes(folder),
        kv_token=kv_token_bytes(config, itemsize=min(DTYPE_BYTES.get(dtype, 2), 2)),
        context=context_length(config),
        quantized=method,
        vision=takes_pictures(config),
        dtype=dtype,
    )
