"""Tiny random-weight mixtures of experts of real classes, with the names and layouts of the released checkpoints.

The router's rows are large, so that it chooses, and not alike for all tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

HIDDEN, INNER, EXPERTS, CHOSEN = 256, 384, 8, 2  # 2 inner is not hidden: a square would hide which way it lies
SPARSE = {  # kind -> decoder layers that hold a mixture, of three
    "mixtral": (0, 1, 2),
    "qwen2_moe": (0, 1, 2),
    "qwen3_moe": (1, 2),
    "qwen3_vl_moe": (0, 1, 2),
    "deepseek_v2": (1, 2),
    "deepseek_v3": (1, 2),
    "glm4v_moe": (1, 2),
}
FUSED = ("experts.gate_up_proj", "experts.down_proj")


def moe(kind: str, out: Path, **changes: Any) -> Path:
    """Write a checkpoint of `kind`, one of SPARSE, into `out`; `changes` are settings of its text model."""
    import transformers as t

    from mmq.recipes.pebble import model_folder

    words = t.AutoTokenizer.from_pretrained(model_folder())
    template = words.chat_template or (model_folder() / "chat_template.jinja").read_text(encoding="utf-8")
    if kind == "glm4v_moe":
        words.add_tokens(
            [f"<|{w}|>" for w in ("image", "video", "begin_of_video", "end_of_video")], special_tokens=True
        )
        template = template.replace("<|image_pad|>", "<|image|>").replace("<|video_pad|>", "<|video|>")
    torch.manual_seed(0)
    causal = t.AutoModelForImageTextToText if kind in ("qwen3_vl_moe", "glm4v_moe") else t.AutoModelForCausalLM
    model = causal.from_config(_config(kind, words, changes), dtype=torch.bfloat16)
    with torch.no_grad():
        for name, p in model.named_parameters():  # so that a lost bias or norm shows
            if name.endswith("bias"):
                p.normal_(0, 0.06)
            elif p.ndim == 1:
                p.add_(torch.randn_like(p) * 0.05)
            elif name.endswith("mlp.gate.weight"):
                p.normal_(0, 0.5)
        for name, b in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                b.normal_(0, 0.02)
    ends = [words.convert_tokens_to_ids(w) for w in ("<|im_end|>", "<|endoftext|>")]
    model.generation_config = t.GenerationConfig(eos_token_id=ends, pad_token_id=ends[1])
    model.save_pretrained(out)
    if kind == "qwen3_vl_moe":
        _turned(out)
    _write_processor(kind, words, template, out)
    return out


def _config(kind: str, words: Any, changes: dict[str, Any]) -> Any:
    import transformers as t

    number = words.convert_tokens_to_ids
    text: dict[str, Any] = {
        "vocab_size": len(words),
        "hidden_size": HIDDEN,
        "intermediate_size": 512,
        "moe_intermediate_size": INNER,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_experts_per_tok": CHOSEN,
        "max_position_embeddings": 4096,
        "initializer_range": 0.06,
        "bos_token_id": number("<|endoftext|>"),
        "eos_token_id": number("<|im_end|>"),
        "pad_token_id": number("<|endoftext|>"),
        "tie_word_embeddings": False,
    }
    grouped = {
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
    }
    latent = {**grouped, "num_key_value_heads": 4, "q_lora_rank": 128, "kv_lora_rank": 128}  # DeepSeek's attention
    latent |= {"head_dim": 64, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64}
    if kind == "mixtral":
        return t.MixtralConfig(**{**text, "num_local_experts": EXPERTS, "intermediate_size": INNER, **changes})
    if kind == "qwen2_moe":
        return t.Qwen2MoeConfig(**{**text, "num_experts": EXPERTS, "shared_expert_intermediate_size": 256, **changes})
    if kind == "qwen3_moe":
        return t.Qwen3MoeConfig(**{**text, "num_experts": EXPERTS, "mlp_only_layers": [0], **changes})
    if kind == "deepseek_v2":
        return t.DeepseekV2Config(**{**text, **latent, "topk_method": "group_limited_greedy", **changes})
    if kind == "deepseek_v3":
        told = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}  # vLLM asks for them
        return t.DeepseekV3Config(**{**text, **latent, **told, **changes})
    vision: dict[str, Any] = {
        "depth": 2,
        "num_heads": 2,
        "hidden_size": 128,
        "out_hidden_size": HIDDEN,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "initializer_range": 0.06,
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    if kind == "qwen3_vl_moe":
        text |= {"num_experts": EXPERTS, "rope_parameters": {**rope, "mrope_section": [8, 12, 12]}}
        text |= {"norm_topk_prob": True}  # vLLM asks for it
        vision |= {"patch_size": 16, "intermediate_size": 256, "num_position_embeddings": 256}
        vision |= {"deepstack_visual_indexes": [0]}
        return t.Qwen3VLMoeConfig(
            text_config={**text, **changes},
            vision_config=vision,
            tie_word_embeddings=False,
            image_token_id=number("<|image_pad|>"),
            video_token_id=number("<|video_pad|>"),
            vision_start_token_id=number("<|vision_start|>"),
            vision_end_token_id=number("<|vision_end|>"),
        )
    text |= {
        "use_qk_norm": False,
        **grouped,
        "rope_parameters": {**rope, "mrope_section": [8, 12, 12], "partial_rotary_factor": 1.0},
    }
    vision |= {"patch_size": 14, "image_size": 112, "intermediate_size": HIDDEN}
    return t.Glm4vMoeConfig(
        text_config={**text, **changes},
        vision_config=vision,
        tie_word_embeddings=False,
        image_token_id=number("<|image|>"),
        video_token_id=number("<|video|>"),
        image_start_token_id=number("<|vision_start|>"),
        image_end_token_id=number("<|vision_end|>"),
        video_start_token_id=number("<|begin_of_video|>"),
        video_end_token_id=number("<|end_of_video|>"),
    )


def _turned(out: Path) -> None:
    """Qwen3-VL-MoE is released with its fused experts as [experts, in, out]; transformers saves them as it holds them,
    [experts, out, in], and reads both."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(out / "model.safetensors")
    for name in tensors:
        if name.endswith(FUSED):
            tensors[name] = tensors[name].transpose(1, 2).contiguous()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def _write_processor(kind: str, words: Any, template: str, out: Path) -> None:
    import transformers as t

    if kind not in ("qwen3_vl_moe", "glm4v_moe"):
        words.chat_template = template
        words._processor_class = None  # the embedded model's: there are no pictures here
        words.init_kwargs.pop("processor_class", None)
        words.save_pretrained(out)
        return
    patch = 16 if kind == "qwen3_vl_moe" else 14
    shape: dict[str, Any] = {"patch_size": patch, "merge_size": 2, "temporal_patch_size": 2}
    if kind == "qwen3_vl_moe":
        size = {"shortest_edge": (4 * patch) ** 2, "longest_edge": (16 * patch) ** 2}
        images, videos, both = t.Qwen2VLImageProcessor, t.Qwen3VLVideoProcessor, t.Qwen3VLProcessor
    else:  # of GLM's sizes the larger counts frames, two a picture
        size = {"shortest_edge": 2 * (4 * patch) ** 2, "longest_edge": 2 * (16 * patch) ** 2}
        images, videos, both = t.Glm4vImageProcessor, t.Glm4vVideoProcessor, t.Glm4vProcessor
    both(
        image_processor=images(size=dict(size), **shape),
        tokenizer=words,
        video_processor=videos(size=dict(size), **shape),
        chat_template=template,
    ).save_pretrained(out)
