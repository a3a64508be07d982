"""InternLM2 and 2.5 (and, of the same shape as Llama, InternLM3): transformers' Llama under InternLM's names.

InternLM2 keeps queries, keys and values in one matrix, and so does the model here (joined.py). Knows no tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .joined import join
from .words import plain_tokenizer

# of what a config.json says, what Llama's config knows
KEPT = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "rope_theta",
    "rope_scaling",
    "tie_word_embeddings",
    "head_dim",
)


def llama_config(config: Mapping[str, Any]) -> Any:
    """The LlamaConfig of an InternLM2 or 3. ValueError for biases, which no release has."""
    from transformers import LlamaConfig

    for key in ("bias", "qkv_bias"):
        if config.get(key):
            raise ValueError(f"{key} is true in config.json; InternLM with biases is not known here")
    return LlamaConfig(**{k: config[k] for k in KEPT if k in config})


def join_layers(text: Any) -> None:
    """Give the attention of every layer of a Llama its one `wqkv`."""
    config = text.config
    for layer in text.layers:
        join(layer.self_attn, blocks=config.num_key_value_heads, width=config.head_dim)


def rules(model: Any) -> list[Any]:
    """Renamings from InternLM2's names to Llama's; InternLM3 has Llama's own."""
    from transformers.core_model_loading import WeightRenaming

    pairs = (
        (r"\.tok_embeddings\.", ".embed_tokens."),
        (r"\.attention\.wqkv\.", ".self_attn.wqkv."),
        (r"\.attention\.wo\.", ".self_attn.o_proj."),
        (r"\.feed_forward\.w1\.", ".mlp.gate_proj."),
        (r"\.feed_forward\.w2\.", ".mlp.down_proj."),
        (r"\.feed_forward\.w3\.", ".mlp.up_proj."),
        (r"\.attention_norm\.", ".input_layernorm."),
        (r"\.ffn_norm\.", ".post_attention_layernorm."),
        (r"^(language_model\.)?output\.", "lm_head."),
    )
    return [WeightRenaming(a, b) for a, b in pairs]


def build(folder: Path, config: Mapping[str, Any], *, dtype: torch.dtype) -> tuple[Any, Any]:
    """Model (weights not loaded) and tokenizer of the checkpoint in `folder`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(llama_config(config), dtype=dtype)
    if config["model_type"] == "internlm2":
        join_layers(model.model)
    return model, plain_tokenizer(folder)
