"""Checkpoints of a released model's shape with random weights: for speed and memory, never for quality.

Written with transformers' own classes and names, around the embedded model's tokenizer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..recipes.pebble import model_folder

TEXT: dict[str, dict[str, Any]] = {  # Qwen2.5-VL's language models
    "3b": {"hidden_size": 2048, "intermediate_size": 11008, "num_attention_heads": 16, "num_key_value_heads": 2},
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4},
    "32b": {"hidden_size": 5120, "intermediate_size": 27648, "num_attention_heads": 40, "num_key_value_heads": 8},
    "72b": {"hidden_size": 8192, "intermediate_size": 29568, "num_attention_heads": 64, "num_key_value_heads": 8},
}
LAYERS = {"3b": 36, "7b": 28, "32b": 64, "72b": 80}
VOCABULARY = 152064


def config_of(size: str, *, layers: int | None = None) -> Any:
    """Qwen2.5-VL's config of this size, for the embedded model's tokenizer. ValueError for an unknown size."""
    import transformers as t

    if size not in TEXT:
        raise ValueError(f"no shape {size!r}; there are {', '.join(TEXT)}")
    number = t.AutoTokenizer.from_pretrained(model_folder()).convert_tokens_to_ids
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    return t.Qwen2_5_VLConfig(
        text_config={
            **TEXT[size],
            "num_hidden_layers": layers or LAYERS[size],
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 32768,
            "rope_parameters": rope,
            "bos_token_id": number("<|endoftext|>"),
            "eos_token_id": number("<|im_end|>"),
            "pad_token_id": number("<|endoftext|>"),
            "tie_word_embeddings": False,
        },
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": TEXT[size]["hidden_size"],
        },
        image_token_id=number("<|image_pad|>"),
        video_token_id=number("<|video_pad|>"),
        vision_start_token_id=number("<|vision_start|>"),
        vision_end_token_id=number("<|vision_end|>"),
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


def write_shape(size: str, out: Path, *, layers: int | None = None, device: str = "cpu", seed: int = 0) -> Path:
    """Write a Qwen2.5-VL checkpoint of `size` with `layers` decoder layers (None: as many as the real one) into `out`.

    bfloat16, normal weights of deviation 0.02. ValueError for an unknown size.
    """
    import torch
    import transformers as t

    config = config_of(size, layers=layers)
    torch.manual_seed(seed)
    with torch.device(device):
        model = t.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    words = t.AutoTokenizer.from_pretrained(model_folder())
    model.generation_config.eos_token_id = words.convert_tokens_to_ids("<|im_end|>")
    model.save_pretrained(out, max_shard_size="4GB")
    template = t.AutoProcessor.from_pretrained(model_folder()).chat_template
    t.Qwen2_5_VLProcessor(
        image_processor=t.Qwen2VLImageProcessor(),
        video_processor=t.Qwen2VLVideoProcessor(),
        tokenizer=words,
        chat_template=template,
    ).save_pretrained(out)
    return out
