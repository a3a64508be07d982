"""Tiny random-weight checkpoints of real model classes, around the embedded model's tokenizer.

Random weights serve names, shapes and plumbing; nothing about quality.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 256, 4, 2, 64


def vlm(kind: str, out: Path, *, intermediate: int = 512, tied: bool = False) -> Path:
    """Write a checkpoint of model type `kind` (qwen2_vl, qwen2_5_vl, qwen3_vl) into `out`."""
    import transformers as t

    from mmq.recipes.pebble import model_folder

    words = t.AutoTokenizer.from_pretrained(model_folder())
    number = words.convert_tokens_to_ids
    patch = 16 if kind == "qwen3_vl" else 14
    section = [8, 12, 12]
    text: dict[str, Any] = {
        "vocab_size": len(words),
        "hidden_size": HIDDEN,
        "intermediate_size": intermediate,
        "num_hidden_layers": 3,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section},
        "initializer_range": 0.06,
        "bos_token_id": number("<|endoftext|>"),
        "eos_token_id": number("<|im_end|>"),
        "pad_token_id": number("<|endoftext|>"),
        "tie_word_embeddings": tied,
    }
    vision: dict[str, Any] = {
        "depth": 2,
        "num_heads": 2,
        "patch_size": patch,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "initializer_range": 0.06,
    }
    if kind == "qwen3_vl":  # as released configs say; transformers knows it anyway, engines read it
        text["rope_parameters"]["mrope_interleaved"] = True
    if kind == "qwen2_vl":
        vision |= {"embed_dim": 128, "hidden_size": HIDDEN, "mlp_ratio": 2}
        config_class, model_class, processor_class = (
            t.Qwen2VLConfig,
            t.Qwen2VLForConditionalGeneration,
            t.Qwen2VLProcessor,
        )
    elif kind == "qwen2_5_vl":
        vision |= {"hidden_size": 128, "out_hidden_size": HIDDEN, "intermediate_size": 256, "window_size": 112}
        vision |= {"fullatt_block_indexes": [1]}
        config_class, model_class, processor_class = (
            t.Qwen2_5_VLConfig,
            t.Qwen2_5_VLForConditionalGeneration,
            t.Qwen2_5_VLProcessor,
        )
    elif kind == "qwen3_vl":
        vision |= {"hidden_size": 128, "out_hidden_size": HIDDEN, "intermediate_size": 256}
        vision |= {"num_position_embeddings": 256, "deepstack_visual_indexes": [0]}
        config_class, model_class, processor_class = (
            t.Qwen3VLConfig,
            t.Qwen3VLForConditionalGeneration,
            t.Qwen3VLProcessor,
        )
    else:
        raise ValueError(f"no tiny model of {kind}")
    config = config_class(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=tied,
        image_token_id=number("<|image_pad|>"),
        video_token_id=number("<|video_pad|>"),
        vision_start_token_id=number("<|vision_start|>"),
        vision_end_token_id=number("<|vision_end|>"),
    )
    torch.manual_seed(0)
    model = model_class(config).bfloat16()
    with torch.no_grad():
        for name, p in model.named_parameters():  # so that a lost bias or norm shows
            if name.endswith("bias"):
                p.normal_(0, 0.06)
            elif p.ndim == 1:
                p.add_(torch.randn_like(p) * 0.05)
    model.generation_config = t.GenerationConfig(
        eos_token_id=[number("<|im_end|>"), number("<|endoftext|>")], pad_token_id=number("<|endoftext|>")
    )
    model.save_pretrained(out)
    size = {"shortest_edge": (4 * patch) ** 2, "longest_edge": (16 * patch) ** 2}
    shape: dict[str, Any] = {"patch_size": patch, "merge_size": 2, "temporal_patch_size": 2}
    videos = t.Qwen3VLVideoProcessor if kind == "qwen3_vl" else t.Qwen2VLVideoProcessor
    processor_class(
        image_processor=t.Qwen2VLImageProcessor(size=dict(size), **shape),
        tokenizer=words,
        video_processor=videos(size=dict(size), **shape),
        chat_template=words.chat_template or (model_folder() / "chat_template.jinja").read_text(encoding="utf-8"),
    ).save_pretrained(out)
    return out
