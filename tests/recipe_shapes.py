"""Checkpoints of the bundled recipes' shapes, in AWQ, with nothing in them: what a planner sees of the released models.

The numbers are those of the released configs. Towers that the planner knows no pictures of count by their weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as t

from mmq.bench.hollow import PIXELS, fill
from mmq.bench.shapes import LAYERS, TEXT

Built = tuple[Any, dict[str, Any], dict[str, Any]]  # model without weights, config.json, preprocessor_config.json


NUMBERS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def text(kind: str, *numbers: int, **more: Any) -> dict[str, Any]:
    """A text model's config: `NUMBERS` and the vocabulary's size."""
    found = dict(zip((*NUMBERS, "vocab_size"), numbers, strict=True))
    return {"model_type": kind, "max_position_embeddings": 32768, "tie_word_embeddings": False, **found, **more}


def eye(kind: str, hidden: int, inner: int, layers: int, size: int, patch: int = 14) -> dict[str, Any]:
    found = {"model_type": kind, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    return found | {"num_attention_heads": 16, "image_size": size, "patch_size": patch}


SIGLIP = eye("siglip_vision_model", 1152, 4304, 27, 384)
QWEN2_7B = (3584, 18944, 28, 28, 4)
QWEN3_8B = (4096, 12288, 36, 32, 8)


def seeing(kind: str, words: dict[str, Any], vision: dict[str, Any], processor: Any = None, **more: Any) -> Built:
    """A model of transformers' class for `kind`."""
    tied = {"tie_word_embeddings": words["tie_word_embeddings"]}
    config = t.AutoConfig.for_model(kind, text_config=words, vision_config=vision, **tied, **more)
    with torch.device("meta"):
        model = t.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    return model, config.to_dict(), processor or {}


def words_alone(words: dict[str, Any]) -> Built:
    config = t.AutoConfig.for_model(**words)
    with torch.device("meta"):
        model = t.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model, config.to_dict(), {}


def qwen2_vl(words: dict[str, Any]) -> Built:
    hidden = words["hidden_size"]
    vision = {"depth": 32, "embed_dim": 1280, "hidden_size": hidden, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14}
    return seeing("qwen2_vl", words, vision, {"size": PIXELS})


def qwen2_5_vl(size: str) -> Built:
    words = {**TEXT[size], "num_hidden_layers": LAYERS[size], "vocab_size": 152064 if size != "3b" else 151936}
    words |= {"model_type": "qwen2_5_vl_text", "max_position_embeddings": 128000, "tie_word_embeddings": size == "3b"}
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3456 if size in ("32b", "72b") else 3420}
    vision |= {"num_heads": 16, "out_hidden_size": words["hidden_size"], "hidden_act": "silu"}
    return seeing("qwen2_5_vl", words, vision, {"size": PIXELS})


def qwen3_vl(*sizes: int, tied: bool) -> Built:
    words = text("qwen3_vl_text", *sizes, 151936, head_dim=128, tie_word_embeddings=tied)
    wide = not tied  # the two smaller ones have the smaller tower
    vision: dict[str, Any] = {"depth": 27 if wide else 24, "hidden_size": 1152 if wide else 1024, "num_heads": 16}
    vision |= {"intermediate_size": 4304 if wide else 4096, "out_hidden_size": sizes[0]}
    vision |= {"deepstack_visual_indexes": [8, 16, 24] if wide else [5, 11, 17]}
    return seeing("qwen3_vl", words, vision, {"size": {"shortest_edge": 65536, "longest_edge": 16777216}})


def internvl(*sizes: int) -> Built:
    vision = {"model_type": "internvl_vision", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    vision |= {"num_attention_heads": 16, "image_size": [448, 448], "patch_size": [14, 14]}
    return seeing("internvl", text("qwen2", *sizes, 151674), vision, image_seq_length=256)


def gemma3(*sizes: int, head_dim: int) -> Built:
    words = text("gemma3_text", *sizes, 262208, head_dim=head_dim, tie_word_embeddings=True, sliding_window=1024)
    vision = {**SIGLIP, "image_size": 896}
    return seeing("gemma3", words, vision, mm_tokens_per_image=256)


def minicpmv(version: str, words: dict[str, Any]) -> Built:
    """The released layout: `llm.`, `vpm.` and a resampler of 64 queries."""
    model, config, _ = words_alone(words)
    with torch.device("meta"):
        tower = t.SiglipVisionModel(t.SiglipVisionConfig(**{**SIGLIP, "image_size": 980}))
        sampler = torch.nn.ParameterDict(
            {"query": torch.empty(64, words["hidden_size"]), "kv_proj": torch.empty(words["hidden_size"], 1152)}
        )
    whole = torch.nn.Module()
    whole.llm, whole.vpm, whole.resampler = model, tower, sampler
    config |= {"model_type": "minicpmv", "architectures": ["MiniCPMV"], "version": version, "query_num": 64}
    return whole, config | {"vision_config": {**SIGLIP, "image_size": 980}}, {}


SHAPES: dict[str, Callable[[], Built]] = {
    "MiniCPM-V-2_6": lambda: minicpmv("2.6", text("qwen2", *QWEN2_7B, 151666)),
    "MiniCPM-V-4": lambda: minicpmv("4.0", text("llama", 2560, 10240, 32, 32, 2, 73448)),
    "MiniCPM-V-4_5": lambda: minicpmv("4.5", text("qwen3", *QWEN3_8B, 151748, head_dim=128)),
    "Qwen2-VL-2B-Instruct": lambda: qwen2_vl(
        text("qwen2_vl_text", 1536, 8960, 28, 12, 2, 151936, tie_word_embeddings=True)
    ),
    "Qwen2-VL-7B-Instruct": lambda: qwen2_vl(text("qwen2_vl_text", *QWEN2_7B, 152064)),
    "Qwen2.5-VL-3B-Instruct": lambda: qwen2_5_vl("3b"),
    "Qwen2.5-VL-7B-Instruct": lambda: qwen2_5_vl("7b"),
    "Qwen2.5-VL-32B-Instruct": lambda: qwen2_5_vl("32b"),
    "Qwen2.5-VL-72B-Instruct": lambda: qwen2_5_vl("72b"),
    "Qwen3-VL-2B-Instruct": lambda: qwen3_vl(2048, 6144, 28, 16, 8, tied=True),
    "Qwen3-VL-4B-Instruct": lambda: qwen3_vl(2560, 9728, 36, 32, 8, tied=True),
    "Qwen3-VL-8B-Instruct": lambda: qwen3_vl(*QWEN3_8B, tied=False),
    "Qwen3-VL-32B-Instruct": lambda: qwen3_vl(5120, 25600, 64, 64, 8, tied=False),
    "InternVL3-2B-hf": lambda: internvl(1536, 8960, 28, 12, 2),
    "InternVL3-8B-hf": lambda: internvl(*QWEN2_7B),
    "gemma-3-4b-it": lambda: gemma3(2560, 10240, 34, 8, 4, head_dim=256),
    "gemma-3-12b-it": lambda: gemma3(3840, 15360, 48, 16, 8, head_dim=256),
    "gemma-3-27b-it": lambda: gemma3(5376, 21504, 62, 32, 16, head_dim=128),
    "llava-onevision-qwen2-7b-ov-hf": lambda: seeing(
        "llava_onevision", text("qwen2", *QWEN2_7B, 152000), {**SIGLIP, "num_hidden_layers": 26}
    ),
    "pixtral-12b": lambda: seeing(
        "llava",
        text("mistral", 5120, 14336, 40, 32, 8, 131072, head_dim=128),
        eye("pixtral", 1024, 4096, 24, 1024, 16),
    ),
    "SmolVLM2-2.2B-Instruct": lambda: seeing(
        "smolvlm", text("llama", 2048, 8192, 24, 32, 32, 49280), {**SIGLIP, "model_type": "smolvlm_vision"}
    ),
    "Qwen2.5-7B-Instruct": lambda: words_alone(text("qwen2", *QWEN2_7B, 152064)),
    "Qwen3-4B-Instruct-2507": lambda: words_alone(
        text("qwen3", 2560, 9728, 36, 32, 8, 151936, head_dim=128, tie_word_embeddings=True)
    ),
    "Qwen3-8B": lambda: words_alone(text("qwen3", *QWEN3_8B, 151936, head_dim=128)),
}


def write(name: str, folder: Path) -> Path:
    """The AWQ artifact of the recipe `name`, by its shapes, in `folder`."""
    model, config, processor = SHAPES[name]()
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    tied |= {f"llm.{name}" for name in getattr(getattr(model, "llm", None), "all_tied_weights_keys", None) or ()}
    tensors = {name: ("BF16", tuple(p.shape)) for name, p in model.named_parameters() if name not in tied}
    config.setdefault("architectures", [type(model).__name__])
    config["architectures"] = config["architectures"] or [type(model).__name__]
    folder.mkdir(exist_ok=True)
    for file, content in (("config", config), ("preprocessor_config", processor)):
        (folder / f"{file}.json").write_text(json.dumps(content, default=str), encoding="utf-8")
    return fill(folder, tensors, packed=True)
