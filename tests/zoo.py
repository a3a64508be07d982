"""Tiny random checkpoints of every family, of the real classes and under the names that released checkpoints have.

`write(kind, folder)` makes one: two decoder layers 128 wide, pebble's words, a processor built from code. Random
weights serve names, shapes and plumbing; nothing about quality. tiny.py holds the Qwen classes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny import vlm

TURN = """{%- for m in messages -%}
<|im_start|>{{ m['role'] }}
{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] -%}
{% if p['type'] == 'image' %}IMAGE{% elif p['type'] == 'text' %}{{ p['text'] }}{% endif %}
{%- endfor %}{% endif %}<|im_end|>
{% endfor -%}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
SIZE = {  # of the text model
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
}
EYE: dict[str, Any] = {  # of the vision tower
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}


@dataclass(frozen=True)
class Kind:
    """One family. `config(words)` gives config.json's content and `processor(words)` the processor (None: the tokenizer
    alone), given a tokenizer with the tokens `special`, which it also knows by these names. `stored` are the renamings
    (pattern, replacement) from transformers' own names to those of released checkpoints."""

    config: Callable[[Any], dict[str, Any]]
    processor: Callable[[Any], Any] | None = None
    special: tuple[tuple[str, str], ...] = ()
    stored: tuple[tuple[str, str], ...] = ()
    packed: int = 14  # linears that become int4


def tokenizer(special: tuple[tuple[str, str], ...] = ()) -> Any:
    """Pebble's, with these special tokens, each known by its name: `tokenizer.image_token`."""
    from transformers import AutoTokenizer

    from mmq.recipes.pebble import model_folder

    words = AutoTokenizer.from_pretrained(model_folder(), extra_special_tokens=dict(special))
    words.add_special_tokens(
        {"additional_special_tokens": [token for _, token in special]}, replace_extra_special_tokens=False
    )
    return words


def text(words: Any, kind: str, **more: Any) -> dict[str, Any]:
    """A text model's config, of SIZE."""
    number = words.convert_tokens_to_ids
    return {
        "model_type": kind,
        "vocab_size": len(words),
        **SIZE,
        "max_position_embeddings": 4096,
        "initializer_range": 0.06,
        "bos_token_id": number("<|endoftext|>"),
        "eos_token_id": number("<|im_end|>"),
        "pad_token_id": number("<|endoftext|>"),
        "tie_word_embeddings": False,
        **more,
    }


def words_only(kind: str, *, packed: int = 14, **more: Any) -> Kind:
    return Kind(lambda words: text(words, kind, **more), packed=packed)


def whole(
    kind: str, words: Any, llm: str, eye: dict[str, Any], image: str, *, text_more: Any = None, **more: Any
) -> Any:
    """The config of text model and vision tower; `image` is the placeholder."""
    token = words.convert_tokens_to_ids(image)
    return {
        "model_type": kind,
        "text_config": text(words, llm, **(text_more or {})),
        "vision_config": eye,
        "image_token_id": token,
        "image_token_index": token,
        "tie_word_embeddings": False,
        **more,
    }


def turns(image: str) -> str:
    return TURN.replace("IMAGE", image)


def llava(words: Any) -> Any:
    import transformers as t

    eyes = t.CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    more = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return t.LlavaProcessor(eyes, words, chat_template=turns("<image>\n"), **more)


def llava_next(words: Any) -> Any:
    import transformers as t

    eyes = t.LlavaNextImageProcessor(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_grid_pinpoints=PINPOINTS
    )
    more = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return t.LlavaNextProcessor(eyes, words, chat_template=turns("<image>\n"), **more)


PINPOINTS = [[56, 112], [112, 56], [112, 112]]
CLIP = {"model_type": "clip_vision_model", "projection_dim": 64, **EYE}
SIGLIP = {"model_type": "siglip_vision_model", **EYE}
IMAGE = (("image_token", "<image>"),)
CLIP_NAMES = (
    r"^(model\.)?vision_tower\.(embeddings|encoder|pre_layrnorm|post_layernorm)",
    r"vision_tower.vision_model.\2",
)
LLAVA = (
    CLIP_NAMES,
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.", ""),
)


def onevision(words: Any) -> Any:
    import transformers as t

    eyes = t.LlavaOnevisionImageProcessor(size={"height": 56, "width": 56}, image_grid_pinpoints=PINPOINTS)
    video = t.LlavaOnevisionVideoProcessor(size={"height": 56, "width": 56})
    more = {"num_image_tokens": 16, "vision_feature_select_strategy": "full"}
    return t.LlavaOnevisionProcessor(eyes, words, video, chat_template=turns("<image>\n"), **more)


def internvl(words: Any) -> Any:
    import transformers as t

    eyes = t.GotOcr2ImageProcessor(size={"height": 56, "width": 56}, crop_to_patches=True, max_patches=4)
    video = t.InternVLVideoProcessor(size={"height": 56, "width": 56})
    return t.InternVLProcessor(eyes, words, video, image_seq_length=4, chat_template=turns("<IMG_CONTEXT>\n"))


def gemma3(words: Any) -> Any:
    import transformers as t

    eyes = t.Gemma3ImageProcessor(size={"height": 56, "width": 56}, do_pan_and_scan=False)
    return t.Gemma3Processor(eyes, words, chat_template=turns("<start_of_image>"), image_seq_length=4)


def idefics3(words: Any) -> Any:
    import transformers as t

    eyes = t.Idefics3ImageProcessor(size={"longest_edge": 112}, max_image_size={"longest_edge": 56})
    return t.Idefics3Processor(eyes, words, image_seq_len=4, chat_template=turns("<image>"))


def smolvlm(words: Any) -> Any:
    import transformers as t

    eyes = t.SmolVLMImageProcessor(size={"longest_edge": 112}, max_image_size={"longest_edge": 56})
    video = t.SmolVLMVideoProcessor(size={"longest_edge": 112}, max_image_size={"longest_edge": 56})
    return t.SmolVLMProcessor(eyes, words, video, image_seq_len=4, chat_template=turns("<image>"))


def pixtral(words: Any) -> Any:
    import transformers as t

    eyes = t.PixtralImageProcessor(size={"longest_edge": 112}, patch_size={"height": 14, "width": 14})
    return t.PixtralProcessor(eyes, words, patch_size=14, spatial_merge_size=2, chat_template=turns("[IMG]"))


def pixtral12(words: Any) -> Any:
    import transformers as t

    eyes = t.PixtralImageProcessor(size={"longest_edge": 112}, patch_size={"height": 14, "width": 14})
    return t.PixtralProcessor(eyes, words, patch_size=14, chat_template=turns("[IMG]"))


def glm4v(words: Any) -> Any:
    import transformers as t

    size = {"shortest_edge": 56**2, "longest_edge": 224**2}
    place = "<|begin_of_image|><|image|><|end_of_image|>"
    return t.Glm4vProcessor(
        t.Glm4vImageProcessor(size=dict(size)),
        words,
        t.Glm4vVideoProcessor(size=dict(size)),
        chat_template=turns(place),
    )


def deepseek(words: Any) -> Any:
    import transformers as t

    eyes = t.DeepseekVLImageProcessor(size={"height": 56, "width": 56})
    return t.DeepseekVLProcessor(eyes, words, chat_template=turns("<image_placeholder>"), num_image_tokens=16)


def deepseek_hybrid(words: Any) -> Any:
    import transformers as t

    eyes = t.DeepseekVLHybridImageProcessor(
        size={"height": 56, "width": 56}, high_res_size={"height": 128, "width": 128}
    )
    return t.DeepseekVLHybridProcessor(eyes, words, chat_template=turns("<image_placeholder>"), num_image_tokens=16)


def ovis2(words: Any) -> Any:
    import transformers as t

    eyes = t.Ovis2ImageProcessor(size={"height": 56, "width": 56}, crop_to_patches=True, max_patches=4)
    return t.Ovis2Processor(eyes, words, chat_template=turns("<image>\n"), image_seq_length=4)


def minicpmv(words: Any) -> Any:
    import transformers as t

    return t.MiniCPMV4_6Processor(
        t.MiniCPMV4_6ImageProcessor(scale_resolution=112, max_slice_nums=4),
        t.MiniCPMV4_6VideoProcessor(scale_resolution=112),
        words,
        chat_template=turns("<|image_pad|>"),
    )


def phi4(words: Any) -> Any:
    import transformers as t

    eyes = t.Phi4MultimodalImageProcessor(dynamic_hd=1)
    words.chat_template = turns("")  # the released processor has none of its own
    return t.Phi4MultimodalProcessor(eyes, t.Phi4MultimodalFeatureExtractor(), words)


def _ids(words: Any, **names: str) -> dict[str, int]:
    return {key: words.convert_tokens_to_ids(token) for key, token in names.items()}


GLM_TOKENS = tuple(
    (name, token)
    for name, token in (
        ("image_token", "<|image|>"),
        ("video_token", "<|video|>"),
        ("boi", "<|begin_of_image|>"),
        ("eoi", "<|end_of_image|>"),
        ("bov", "<|begin_of_video|>"),
        ("eov", "<|end_of_video|>"),
    )
)
MINICPM_TOKENS = (
    ("image_token", "<|image_pad|>"),
    ("video_token", "<|video_pad|>"),
    ("image_start_token", "<image>"),
    ("image_end_token", "</image>"),
    ("slice_start_token", "<slice>"),
    ("slice_end_token", "</slice>"),
    ("image_id_start_token", "<image_id>"),
    ("image_id_end_token", "</image_id>"),
)
INDICATORS = tuple((t, t) for t in ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"))


def internvl_kind(llm: str) -> Kind:
    return Kind(
        lambda w: whole(
            "internvl",
            w,
            llm,
            {**EYE, "model_type": "internvl_vision", "image_size": [56, 56], "patch_size": [14, 14]},
            "<IMG_CONTEXT>",
            image_seq_length=4,
        ),
        internvl,
        (
            ("context_image_token", "<IMG_CONTEXT>"),
            ("start_image_token", "<img>"),
            ("end_image_token", "</img>"),
            ("video_token", "<video>"),
        ),
        LLAVA[1:],
    )


KINDS: dict[str, Kind] = {
    "llama": words_only("llama"),
    "qwen2": words_only("qwen2", tie_word_embeddings=True),
    "qwen3": words_only("qwen3"),
    "mistral": words_only("mistral", sliding_window=64),
    "phi3": words_only("phi3", packed=8),
    "gemma2": words_only("gemma2", tie_word_embeddings=True, query_pre_attn_scalar=64, sliding_window=64),
    "gemma3_text": words_only("gemma3_text", tie_word_embeddings=True, query_pre_attn_scalar=64, sliding_window=64),
    "gemma4_text": Kind(
        lambda w: text(
            w,
            "gemma4_text",
            num_hidden_layers=4,
            layer_types=["sliding_attention", "full_attention"] * 2,
            sliding_window=64,
            global_head_dim=128,  # of the layers that see everything
            num_kv_shared_layers=2,  # the last two read the keys and values of the first two
            hidden_size_per_layer_input=128,
            vocab_size_per_layer_input=len(w),
        ),
        packed=9 + 9 + 7 + 7,
    ),
    "opt": Kind(
        lambda w: {
            k: v
            for k, v in text(w, "opt", ffn_dim=256, word_embed_proj_dim=128).items()
            if k not in ("intermediate_size", "num_key_value_heads", "head_dim")
        },
        packed=12,
    ),
    "internvl": internvl_kind("qwen2"),
    "internvl_llama": internvl_kind("llama"),
    "llava": Kind(lambda w: whole("llava", w, "llama", CLIP, "<image>"), llava, IMAGE, LLAVA),
    "llava_next": Kind(
        lambda w: whole("llava_next", w, "mistral", CLIP, "<image>", image_grid_pinpoints=PINPOINTS),
        llava_next,
        IMAGE,
        ((r"^model\.image_newline", "image_newline"), *LLAVA),
    ),
    "llava_onevision": Kind(
        lambda w: whole(
            "llava_onevision",
            w,
            "qwen2",
            {**SIGLIP, "vision_use_head": False},
            "<image>",
            image_grid_pinpoints=PINPOINTS,
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
            video_token_index=w.convert_tokens_to_ids("<video>"),
            video_token_id=w.convert_tokens_to_ids("<video>"),
        ),
        onevision,
        (*IMAGE, ("video_token", "<video>")),
        LLAVA,
    ),
    "gemma3": Kind(
        lambda w: (
            whole(
                "gemma3",
                w,
                "gemma3_text",
                {**SIGLIP, "vision_use_head": False},
                "<image_soft_token>",
                text_more={"query_pre_attn_scalar": 64, "sliding_window": 64, "tie_word_embeddings": True},
                mm_tokens_per_image=4,
                boi_token_index=w.convert_tokens_to_ids("<start_of_image>"),
                eoi_token_index=w.convert_tokens_to_ids("<end_of_image>"),
            )
            | {"tie_word_embeddings": True}
        ),
        gemma3,
        (
            ("image_token", "<image_soft_token>"),
            ("boi_token", "<start_of_image>"),
            ("eoi_token", "<end_of_image>"),
            *((f"lines_{n}", "\n" * n) for n in (1, 2, 3, 4)),
        ),
        LLAVA,
    ),
    "idefics3": Kind(
        lambda w: whole("idefics3", w, "llama", {**EYE, "model_type": "idefics3_vision"}, "<image>", scale_factor=2),
        idefics3,
        (*IMAGE, ("fake", "<fake_token_around_image>"), ("end", "<end_of_utterance>"), ("global", "<global-img>")),
    ),
    "smolvlm": Kind(
        lambda w: whole("smolvlm", w, "llama", {**EYE, "model_type": "smolvlm_vision"}, "<image>", scale_factor=2),
        smolvlm,
        (
            *IMAGE,
            ("fake_image_token", "<fake_token_around_image>"),
            ("end_of_utterance_token", "<end_of_utterance>"),
            ("global_image_token", "<global-img>"),
        ),
    ),
    "mistral3": Kind(
        lambda w: whole(
            "mistral3",
            w,
            "mistral",
            {**EYE, "model_type": "pixtral", "image_size": 112, "head_dim": 64},
            "[IMG]",
            spatial_merge_size=2,
        ),
        pixtral,
        (("image_token", "[IMG]"), ("image_break_token", "[IMG_BREAK]"), ("image_end_token", "[IMG_END]")),
        LLAVA,
    ),
    "pixtral": Kind(
        lambda w: whole(
            "llava",
            w,
            "mistral",
            {**EYE, "model_type": "pixtral", "image_size": 112, "head_dim": 64},
            "[IMG]",
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        ),
        pixtral12,
        (("image_token", "[IMG]"), ("image_break_token", "[IMG_BREAK]"), ("image_end_token", "[IMG_END]")),
        LLAVA,
    ),
    "glm4v": Kind(
        lambda w: whole(
            "glm4v",
            w,
            "glm4v_text",
            {
                "model_type": "glm4v_vision",
                "depth": 2,
                "hidden_size": 128,
                "intermediate_size": 256,
                "num_heads": 2,
                "out_hidden_size": SIZE["hidden_size"],
                "image_size": 112,
                "patch_size": 14,
            },
            "<|image|>",
            text_more={
                "attention_bias": True,  # what engines read, and transformers takes for granted
                "head_dim": 128,
                "num_attention_heads": SIZE["hidden_size"] // 128,
                "num_key_value_heads": 1,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [8, 12, 12],
                    "partial_rotary_factor": 0.5,
                },
            },
            **_ids(
                w,
                video_token_id="<|video|>",
                image_start_token_id="<|begin_of_image|>",
                image_end_token_id="<|end_of_image|>",
                video_start_token_id="<|begin_of_video|>",
                video_end_token_id="<|end_of_video|>",
            ),
        ),
        glm4v,
        GLM_TOKENS,
        packed=12,
    ),
    "deepseek_vl": Kind(
        lambda w: whole("deepseek_vl", w, "llama", {**SIGLIP}, "<image_placeholder>"),
        deepseek,
        (("image_token", "<image_placeholder>"),),
    ),
    "deepseek_vl_hybrid": Kind(
        lambda w: whole(
            "deepseek_vl_hybrid",
            w,
            "llama",
            {**SIGLIP},
            "<image_placeholder>",
            high_res_vision_config={
                "model_type": "sam_vision_model",
                "hidden_size": 64,
                "output_channels": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 128,
                "patch_size": 16,
                "global_attn_indexes": [1],
                "window_size": 4,
                "mlp_dim": 128,
            },
        ),
        deepseek_hybrid,
        (("image_token", "<image_placeholder>"),),
    ),
    "ovis2": Kind(
        lambda w: whole(
            "ovis2",
            w,
            "qwen2",
            {**EYE, "vocab_size": 128, "hidden_stride": 2},
            "<IMG_ATOM>",
            hidden_size=SIZE["hidden_size"],
            vocab_size=len(w),
            visual_indicator_token_ids=[w.convert_tokens_to_ids(t) for _, t in INDICATORS],
        ),
        ovis2,
        (*IMAGE, ("atom", "<IMG_ATOM>"), *INDICATORS),
    ),
    "minicpmv4_6": Kind(
        lambda w: whole(
            "minicpmv4_6",
            w,
            "qwen3_5_text",
            {**EYE, "image_size": 112, "insert_layer_id": 0},
            "<|image_pad|>",
            insert_layer_id=0,
            text_more={
                "linear_key_head_dim": 128,
                "linear_value_head_dim": 128,
                "linear_num_key_heads": 1,
                "linear_num_value_heads": 2,
                "layer_types": ["linear_attention", "full_attention"],
            },
            **_ids(w, video_token_id="<|video_pad|>"),
        ),
        minicpmv,
        MINICPM_TOKENS,
        packed=13,  # the linear attention of the first layer has narrow ones
    ),
    "phi4_multimodal": Kind(
        lambda w: (
            text(w, "phi4_multimodal")
            | {
                "vision_config": {**EYE, "image_size": 448, **_ids(w, image_token_id="<|image|>")},
                "audio_config": {
                    "hidden_size": 64,
                    "intermediate_size": 64,
                    "num_blocks": 2,
                    "num_attention_heads": 2,
                    "ext_pw_out_channel": 64,
                    "depthwise_separable_out_channel": 64,
                    "nemo_conv_channels": 64,
                    **_ids(w, audio_token_id="<|audio|>"),
                },
            }
        ),
        phi4,
        (("image_token", "<|image|>"), ("audio_token", "<|audio|>")),
        packed=8,
    ),
}


LAYER_NAMES = (  # InternLM2's, with its one matrix for queries, keys and values
    (r"\.embed_tokens\.", ".tok_embeddings."),
    (r"\.self_attn\.o_proj\.", ".attention.wo."),
    (r"\.mlp\.gate_proj\.", ".feed_forward.w1."),
    (r"\.mlp\.down_proj\.", ".feed_forward.w2."),
    (r"\.mlp\.up_proj\.", ".feed_forward.w3."),
    (r"\.input_layernorm\.", ".attention_norm."),
    (r"\.post_attention_layernorm\.", ".ffn_norm."),
    (r"^lm_head\.", "output."),
    (r"^language_model\.lm_head\.", "language_model.output."),
)
VISION_NAMES = (
    (r"embeddings\.cls_token", "embeddings.class_embedding"),
    (r"embeddings\.position_embeddings", "embeddings.position_embedding"),
    (r"embeddings\.patch_embeddings\.projection", "embeddings.patch_embedding"),
    (r"encoder\.layer\.", "encoder.layers."),
    (r"lambda_(\d)", r"ls\1"),
    (r"attention\.projection_layer", "attn.proj"),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
)


def internlm2(out: Path) -> Path:
    """A Llama of ours as InternLM2 would have stored it."""
    write("llama", out)
    joined(out, kv_heads=SIZE["num_key_value_heads"])
    settle(out, model_type="internlm2", architectures=["InternLM2ForCausalLM"], bias=False)
    return out


def internlm3(out: Path) -> Path:
    """A Llama of ours as InternLM3 stores it: under Llama's own names."""
    write("llama", out)
    settle(out, model_type="internlm3", architectures=["InternLM3ForCausalLM"], bias=False, qkv_bias=False)
    return out


def internvl_chat(out: Path, llm: str) -> Path:
    """Our InternVL as OpenGVLab would have stored it, with a text model of type `llm`."""
    words = write("internvl" if llm == "qwen2" else "internvl_llama", out)
    config = json.loads((out / "config.json").read_text())
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(out / "model.safetensors").items():
        for number, part in enumerate(("layer_norm", "linear_1", None, "linear_2")):
            name = name.replace(f"multi_modal_projector.{part}.", f"mlp1.{number}.")
        if name.startswith("vision_tower."):
            name = name.replace("vision_tower.", "vision_model.")
            for pattern, new in VISION_NAMES:
                name = re.sub(pattern, new, name)
        tensors[name] = tensor
    for name in [n for n in tensors if ".attention.q_proj." in n and n.startswith("vision_model.")]:
        parts = [tensors.pop(name.replace("q_proj", f"{p}_proj")) for p in "qkv"]
        tensors[name.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    if llm == "internlm2":
        joined(out, kv_heads=SIZE["num_key_value_heads"])
    text_config, eye = config["text_config"], config["vision_config"]
    text_config |= {
        "model_type": llm,
        "architectures": ["InternLM2ForCausalLM" if llm == "internlm2" else "Qwen2ForCausalLM"],
    }
    eye |= {"model_type": "intern_vit_6b", "image_size": 56, "patch_size": 14, "qkv_bias": False}
    eye |= {"qk_normalization": False, "initializer_factor": 1.0}
    settle(
        out,
        only=True,
        model_type="internvl_chat",
        architectures=["InternVLChatModel"],
        llm_config=text_config,
        vision_config=eye,
        downsample_ratio=0.5,
        dynamic_image_size=True,
        use_thumbnail=True,
        force_image_size=56,
        max_dynamic_patch=4,
        min_dynamic_patch=1,
        ps_version="v2",
        select_layer=-1,
        template="internvl2_5",
        torch_dtype="bfloat16",
    )
    (out / "processor_config.json").unlink()
    assert words
    return out


def phi3_v(out: Path) -> Path:
    """A Phi-3 of ours beside a vision tower that nothing reads, as Phi-3-vision stores both."""
    write("phi3", out)
    path = out / "model.safetensors"
    eye = {
        "img_projection.0.weight": torch.randn(128, 128).bfloat16(),
        "img_projection.0.bias": torch.randn(128).bfloat16(),
        "img_processor.vision_model.encoder.layers.0.mlp.fc1.weight": torch.randn(256, 128).bfloat16(),
    }
    eye = {f"model.vision_embed_tokens.{name}": tensor for name, tensor in eye.items()}
    save_file(load_file(path) | eye, path, metadata={"format": "pt"})
    settle(out, model_type="phi3_v", architectures=["Phi3VForCausalLM"], img_processor={"image_dim_out": 128})
    return out


def ovis(out: Path) -> Path:
    """A Qwen2 of ours within what AIDC-AI's Ovis 1.6 and 2 store."""
    write("qwen2", out)
    path = out / "model.safetensors"
    rename(path, ((r"^", "llm."),))
    eye = {"visual_tokenizer.head.0.weight": torch.randn(128, 128).bfloat16(), "vte.weight": torch.zeros(128, 128)}
    save_file(load_file(path) | eye, path, metadata={"format": "pt"})
    text_config = json.loads((out / "config.json").read_text())
    settle(out, only=True, model_type="ovis", architectures=["Ovis"], llm_config=text_config, hidden_size=128)
    return out


def joined(out: Path, *, kv_heads: int) -> None:
    """q, k and v in one matrix, a block for each value head, under InternLM2's names."""
    tensors = load_file(out / "model.safetensors")
    for name in [n for n in tensors if n.endswith("self_attn.q_proj.weight")]:
        q, k, v = (tensors.pop(name.replace("q_proj", f"{p}_proj")) for p in "qkv")
        blocks = [t.unflatten(0, (kv_heads, -1)) for t in (q, k, v)]
        tensors[name.replace("self_attn.q_proj", "attention.wqkv")] = torch.cat(blocks, 1).flatten(0, 1)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    rename(out / "model.safetensors", LAYER_NAMES)


CODE = """from transformers import PretrainedConfig


class OwnConfig(PretrainedConfig):
    model_type = "KIND"

    def __init__(self, **more):
        for key in ("vision_config", "llm_config"):
            if isinstance(more.get(key), dict):
                more[key] = PretrainedConfig(**more[key])
        super().__init__(**more)

    def get_text_config(self, *args, **kwargs):
        return getattr(self, "llm_config", self)
"""


def own_config(out: Path) -> None:
    """A config class in the checkpoint, as released ones of the kind bring it: engines want one."""
    config = json.loads((out / "config.json").read_text())
    (out / "configuration_own.py").write_text(CODE.replace("KIND", config["model_type"]))
    settle(out, auto_map={"AutoConfig": "configuration_own.OwnConfig"})


def settle(out: Path, *, only: bool = False, **changes: Any) -> None:
    """Change config.json; `only`: these keys and no other."""
    path = out / "config.json"
    path.write_text(json.dumps({**({} if only else json.loads(path.read_text())), **changes}))


# What transformers has no class for: how it is written, the kind with the same weights, how many linears become int4.
OTHERS: dict[str, tuple[Callable[[Path], Path], str, int]] = {
    "internlm2": (internlm2, "llama", 10),
    "internlm3": (internlm3, "llama", 14),
    "phi3_v": (phi3_v, "phi3", 8),
    "ovis": (ovis, "qwen2", 14),
    "internvl_chat": (lambda out: internvl_chat(out, "qwen2"), "internvl", 14),
    "internvl_chat_internlm2": (lambda out: internvl_chat(out, "internlm2"), "internvl_llama", 10),
}


def packed(kind: str) -> int:
    """How many linears of it become int4."""
    return OTHERS[kind][2] if kind in OTHERS else KINDS[kind].packed


NEEDS = {"smolvlm": "num2words"}  # packages that a kind's processor wants, in transformers
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")  # of tiny.py
# What vLLM 0.32 does not run: it has no class for the first four, and wants files of their own code for the others.
NOT_SERVED = ("deepseek_vl", "deepseek_vl_hybrid", "ovis2", "phi4_multimodal", "phi3_v", "ovis", "internvl_llama")
SERVED: tuple[str, ...] = tuple(k for k in (*QWEN, *KINDS, *OTHERS) if k not in NOT_SERVED)


def write(kind: str, out: Path) -> Path:
    """A checkpoint of this kind in the folder `out`."""
    import transformers as t

    if kind in QWEN:
        return vlm(kind, out)
    if kind in OTHERS:
        OTHERS[kind][0](out)
        own_config(out)
        return out
    made = KINDS[kind]
    words = tokenizer(made.special)
    data = made.config(words)
    config = t.AutoConfig.for_model(data.pop("model_type"), **data)
    from mmq.quantize.classes import model_class

    torch.manual_seed(0)
    model = model_class(config).from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, p in model.named_parameters():  # so that a lost bias or norm shows
            if name.endswith("bias"):
                p.normal_(0, 0.06)
            elif p.ndim == 1:
                p.add_(torch.randn_like(p) * 0.05)
            if kind == "gemma4_text" and name.endswith("q_norm.weight"):
                p.mul_(0.125)  # it stands for the root of a head's width, which its attention does not divide by
    number = words.convert_tokens_to_ids
    model.generation_config = t.GenerationConfig(
        eos_token_id=[number("<|im_end|>"), number("<|endoftext|>")], pad_token_id=number("<|endoftext|>")
    )
    model.save_pretrained(out)
    if made.processor is None:
        words.chat_template = turns("")
        words.save_pretrained(out)
    else:
        made.processor(words).save_pretrained(out)
    if made.stored:
        rename(out / "model.safetensors", made.stored)
    return out


def rename(file: Path, rules: tuple[tuple[str, str], ...]) -> None:
    """Rename the tensors in a safetensors file; of the rules the first that matches is taken."""
    tensors = {}
    for name, tensor in load_file(file).items():
        hit = next((r for r in rules if re.search(r[0], name)), None)
        tensors[re.sub(*hit, name) if hit else name] = tensor
    save_file(tensors, file, metadata={"format": "pt"})
