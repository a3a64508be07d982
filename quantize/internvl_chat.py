"""OpenGVLab's own checkpoints of InternVL2, 2.5 and 3: transformers' InternVL under their names.

The weights are the same; vision attention is stored in one matrix and is split as it is read, the text model is
Qwen2, Llama, Phi-3 or InternLM2 (internlm2.py). Knows no tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from . import internlm2
from .words import plain_tokenizer

TEXT = ("qwen2", "qwen3", "llama", "phi3", "internlm2")
NAMES = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
}
TEMPLATE = """{%- for m in messages -%}
<|im_start|>{{ m['role'] }}
{{ m['content'] }}<|im_end|>
{% endfor -%}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def build(folder: Path, config: Mapping[str, Any], *, dtype: torch.dtype) -> tuple[Any, Any]:
    """Model (weights not loaded) and processor of the checkpoint in `folder`. ValueError for a part not known here."""
    from transformers import AutoModelForImageTextToText

    words = plain_tokenizer(folder, names=NAMES)
    if words.convert_tokens_to_ids("<IMG_CONTEXT>") in (None, words.unk_token_id):
        raise ValueError(f"{folder}: its tokenizer has no <IMG_CONTEXT>, the place of a picture's vectors")
    words.video_token = "<|no video|>"  # the processor asks for one, and looks for it in every text: none is added
    made = internvl_config(config, image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"))
    model = AutoModelForImageTextToText.from_config(made, dtype=dtype)
    if config["llm_config"]["model_type"] == "internlm2":
        internlm2.join_layers(model.model.language_model)
    return model, processor(config, words, made.image_seq_length)


def internvl_config(config: Mapping[str, Any], *, image_token_id: int) -> Any:
    """The InternVLConfig of config.json's content. ValueError names a part that transformers' class lacks."""
    from transformers import AutoConfig, InternVLConfig

    eye, llm = dict(config["vision_config"]), dict(config["llm_config"])
    kind = llm.pop("model_type")
    if kind not in TEXT:
        raise ValueError(f"llm_config's model_type is {kind!r}; known in InternVL are {', '.join(TEXT)}")
    if config.get("ps_version", "v2") != "v2":
        raise ValueError(f"ps_version is {config['ps_version']!r}; transformers' InternVL knows v2 only")
    if config.get("select_layer", -1) != -1:
        raise ValueError(f"select_layer is {config['select_layer']}; mmq knows the last, -1, only")
    size, patch = eye["image_size"], eye["patch_size"]
    ratio = config.get("downsample_ratio", 0.5)
    vision = {
        **{k: eye[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")},
        **{k: eye[k] for k in ("hidden_act", "norm_type", "layer_norm_eps", "initializer_range") if k in eye},
        "image_size": [size, size],
        "patch_size": [patch, patch],
        "attention_bias": eye.get("qkv_bias", True),
        "use_qk_norm": eye.get("qk_normalization", False),
    }
    text = internlm2.llama_config(llm) if kind == "internlm2" else AutoConfig.for_model(kind, **_plain(llm))
    return InternVLConfig(
        vision_config=vision,
        text_config={**text.to_dict(), "model_type": text.model_type},
        image_token_id=image_token_id,
        image_seq_length=int((size // patch) ** 2 * ratio**2),
        downsample_ratio=ratio,
        tie_word_embeddings=bool(text.tie_word_embeddings),
    )


def _plain(llm: dict[str, Any]) -> dict[str, Any]:
    """What a text config says, without what tells of code and of how it was saved."""
    return {k: v for k, v in llm.items() if k not in ("auto_map", "architectures", "_name_or_path", "torch_dtype")}


def processor(config: Mapping[str, Any], words: Any, places: int) -> Any:
    """Tiles of one size, at most `max_dynamic_patch` of them and the whole picture besides, as InternVL cuts them."""
    from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

    side = config.get("force_image_size") or config["vision_config"]["image_size"]
    tiles = {
        "size": {"height": side, "width": side},
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
    eyes = GotOcr2ImageProcessor(
        **tiles,
        crop_to_patches=bool(config.get("dynamic_image_size", True)),
        min_patches=config.get("min_dynamic_patch", 1),
        max_patches=config.get("max_dynamic_patch", 12),
    )
    if not words.chat_template:
        words.chat_template = TEMPLATE
    made: Any = InternVLProcessor(eyes, words, InternVLVideoProcessor(**tiles), image_seq_length=places)
    made.picture = "<IMG_CONTEXT>\n"  # a picture has a line of its own
    return made


def rules(model: Any) -> list[Any]:
    """From OpenGVLab's names and layouts to transformers'."""
    from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming

    pairs = (
        (r"^vision_model\.embeddings\.class_embedding", "model.vision_tower.embeddings.cls_token"),
        (r"^vision_model\.embeddings\.position_embedding", "model.vision_tower.embeddings.position_embeddings"),
        (r"^vision_model\.embeddings\.patch_embedding\.", "model.vision_tower.embeddings.patch_embeddings.projection."),
        (r"^vision_model\.encoder\.layers\.", "model.vision_tower.encoder.layer."),
        (r"\.ls1$", ".lambda_1"),
        (r"\.ls2$", ".lambda_2"),
        (r"\.attn\.proj\.", ".attention.projection_layer."),
        (r"\.attn\.q_norm\.", ".attention.q_norm."),
        (r"\.attn\.k_norm\.", ".attention.k_norm."),
        (r"\.norm1\.", ".layernorm_before."),
        (r"\.norm2\.", ".layernorm_after."),
        (r"^mlp1\.0\.", "model.multi_modal_projector.layer_norm."),
        (r"^mlp1\.1\.", "model.multi_modal_projector.linear_1."),
        (r"^mlp1\.3\.", "model.multi_modal_projector.linear_2."),
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^language_model\.model\.", "model.language_model."),
    )
    converters = [
        WeightConverter(f"attn.qkv.{leaf}", [f"attention.{part}_proj.{leaf}" for part in "qkv"], [Chunk(dim=0)])
        for leaf in ("weight", "bias")
    ]
    return [*internlm2.rules(model), *(WeightRenaming(a, b) for a, b in pairs), *converters]
