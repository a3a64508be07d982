"""What no model's config has: sizes that would have whoever builds the model work or allocate for ever, and values of
other kinds than every reader of them takes for granted.

The bounds are an order of magnitude above the largest models of 2026. Knows keys, no architecture.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from types import NoneType
from typing import Any

LAYERS = 4_096
WIDTH = 1 << 20
SIZES = {  # key -> the largest value; all are whole numbers
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head", "num_heads"), 1 << 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 1 << 16),
    **dict.fromkeys(("hidden_size", "head_dim", "embed_dim", "d_model", "n_embd"), WIDTH),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "ffn_dim"), 1 << 24),
    **dict.fromkeys(("max_position_embeddings", "vocab_size"), 1 << 28),
    **dict.fromkeys(("patch_size", "image_size", "spatial_merge_size", "temporal_patch_size"), 1 << 14),
    **dict.fromkeys(("max_pixels", "min_pixels", "longest_edge", "shortest_edge"), 1 << 34),
}
# Of a key's meanings 0 is one ("none"; "as many as the others"), or the model may lack the part.
NONE = (
    *("num_key_value_heads", "num_experts", "num_local_experts", "n_routed_experts"),
    *("moe_intermediate_size", "intermediate_size", "min_pixels", "shortest_edge", "head_dim"),
)
DEEPEST = 16  # objects within objects


def check_sizes(config: Mapping[str, Any], *, where: str) -> None:
    """ValueError for a size that is no whole number from 1 (0 where that means none) to its bound, at any depth; and
    for parts of a model that are no objects."""
    if not isinstance(config.get("model_type"), str | NoneType):
        raise ValueError(f"{where}: model_type is {_short(config['model_type'])}; it must be a name")
    for part in ("text_config", "llm_config", "language_config", "vision_config", "quantization_config", "auto_map"):
        if part in config and not isinstance(config[part], Mapping | NoneType):
            raise ValueError(f"{where}: {part} is {_short(config[part])}; it must be an object")
    if "architectures" in config and not _names(config["architectures"]):
        raise ValueError(f"{where}: architectures is {_short(config['architectures'])}; it must be a list of names")
    for part in (config, *(config.get(key) or {} for key in ("text_config", "llm_config", "language_config"))):
        said = part.get("quantization_config") or {}
        if not isinstance(said, Mapping):
            raise ValueError(f"{where}: quantization_config is {_short(said)}; it must be an object")
        check_quantization(said, where=f"{where}: quantization_config")
    for key, value in _numbers(config, DEEPEST):
        for one in value if isinstance(value, list) else [value]:  # a size of pictures may be [height, width]
            if one is None:
                continue
            least = 0 if key in NONE else 1
            whole = type(one) is int or (type(one) is float and one.is_integer())
            if not whole or not least <= one <= SIZES[key]:
                raise ValueError(
                    f"{where}: {key} is {_short(value)}; it must be a whole number from {least} to {SIZES[key]}"
                )


def count_of(value: Any) -> int:
    """A checked size as one number; of a list, which has one for each layer, the largest that divides them all, so that
    what divides it divides each. 0 where nothing is told."""
    each = value if isinstance(value, list) else [value]
    return math.gcd(*(int(one) for one in each if isinstance(one, int | float)))


def check_quantization(said: Mapping[str, Any], *, where: str) -> None:
    """ValueError for a `quantization_config` whose lists of names, groups or numbers are of another kind."""
    for key in ("modules_to_not_convert", "ignore", "llm_int8_skip_modules"):
        if not _names(said.get(key)):
            raise ValueError(f"{where}: {key} is {_short(said[key])}; it must be a list of names")
    for key in ("bits", "w_bit", "num_bits", "group_size", "q_group_size"):
        if type(said.get(key)) not in (int, NoneType):
            raise ValueError(f"{where}: {key} is {_short(said[key])}; it must be a whole number")
    for key in ("quant_method", "format", "version", "checkpoint_format", "packing_format", "quant_type"):
        if not isinstance(said.get(key), str | NoneType):
            raise ValueError(f"{where}: {key} is {_short(said[key])}; it must be a name")
    groups = said.get("config_groups") or {}
    for group in groups.values() if isinstance(groups, Mapping) else [groups]:
        weights = group.get("weights") if isinstance(group, Mapping) else group
        if group is None or not isinstance(weights, Mapping | NoneType) or not _names(group.get("targets")):
            raise ValueError(
                f"{where}: config_groups holds {_short(group)}; it must be objects, targets a list of names"
            )
        check_quantization({k: v for k, v in (weights or {}).items() if k != "config_groups"}, where=where)
        if not isinstance(group.get("format"), str | NoneType):
            raise ValueError(f"{where}: format is {_short(group['format'])}; it must be a name")


def _names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _numbers(config: Mapping[str, Any], left: int) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            if left:
                yield from _numbers(value, left - 1)
        elif key in SIZES:
            yield key, value


def _short(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 1 << 100 else "a huge number"
    return text if len(text) <= 40 else f"{text[:37]}..."
