"""Families: what the walk must know of a model's decoder layers, and the rows for models that nothing detects.

A model of the common shape needs no row: detect.py finds its layers, groups and absorbers by running one of them. A
row names code of ours for checkpoints that transformers has no class for. Knows nothing of tensors, files or methods.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Group:
    """Linears of a decoder layer that read the same input, and the module just before whose output can absorb
    a per-channel scale (a norm's weight, or the rows of a linear). Names are relative to the decoder layer.

    `offset` is what a norm adds to its weight before it multiplies (Gemma: 1). `last`: only that many rows of a linear
    absorber, the last ones, put out what the group reads (the values in a joined qkv); 0: all. `beside` are linears
    left in 16 bit that read the same input, so that a scale goes into their columns too."""

    linears: tuple[str, ...]
    absorber: str | None
    offset: float = 0.0
    last: int = 0
    beside: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """`layers` is the module path of the decoder layers, `groups` the groups of each of them. `skip` are the
    substrings by which engines know the parts that stay in 16 bit (see export.config for how each reads them)."""

    layers: str
    groups: tuple[tuple[Group, ...], ...]
    skip: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """Checkpoints of these config.json `model_type`s are opened by our own code: the module `code` of this package,
    with `build(folder, config, *, dtype)` (config.json as a dict -> the model without weights, and its processor) and,
    where the checkpoint's names or layouts are others, `rules(model)` (transformers' WeightTransforms)."""

    model_types: tuple[str, ...]
    code: str
    key: str = ""  # only configs that have this key
    note: str = ""  # for the user


WORDS_ALONE = "transformers has no class for its vision, which is copied as it is"
ROWS: tuple[Row, ...] = (
    Row(("minicpmv", "minicpmo"), "minicpmv.model"),
    Row(("internvl_chat",), "internvl_chat"),
    Row(("internlm2", "internlm3"), "internlm2"),
    Row(("phi3_v", "ovis", "multi_modality"), "text_only", note=WORDS_ALONE),
    Row(("llava", "llava_llama", "llava_mistral", "llava_qwen"), "text_only", key="mm_vision_tower", note=WORDS_ALONE),
)

# The common shape: pre-norm attention and a gated MLP, as in Llama and all that came of it.
LLAMA = (
    Group(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"),
    Group(("self_attn.o_proj",), "self_attn.v_proj"),
    Group(("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
    Group(("mlp.down_proj",), "mlp.up_proj"),
)


def row_of(config: Mapping[str, Any]) -> Row | None:
    """The row for a config.json, if it needs one."""
    kind = config.get("model_type")
    return next((r for r in ROWS if kind in r.model_types and (not r.key or r.key in config)), None)
