"""The cases on which MiniCPM-V is compared with its original: tiny checkpoints, pictures and questions.

Everything comes from seeds, by arithmetic that no version of numpy, torch or Pillow may change, so that the original
in an environment of its time and mmq today see the same. Needs numpy and Pillow only.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>", "<image>", "</image>", "<slice>", "</slice>")
SPECIAL += ("<image_id>", "</image_id>", "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "</s>")
SPECIAL += ("<|start_header_id|>", "<|end_header_id|>")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADERS = (  # as that of 2.5, it opens the assistant's turn whether it is asked to or not
    "{% for m in messages %}{% if loop.first %}<|begin_of_text|>{% endif %}"
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}<|eot_id|>{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
VERSIONS = ("2.5", "2.6", "4.5")  # whose original code is at hand; that of 4.0 is 2.6's around a Llama
SIZES = {  # width, height
    "small": (60, 40),
    "one": (448, 448),
    "two": (640, 420),
    "wide": (1400, 300),
    "tall": (210, 1130),
    "nine": (1344, 1344),
    "grey": (333, 517),
    "edge": (700, 280),  # 50 patches wide: every fifth lies on the edge between two of 70 places
}
CASES: dict[str, tuple[str, ...]] = {name: (name,) for name in SIZES} | {"pair": ("wide", "small"), "text": ()}
VIDEO = ("two", 5, ((0, 4), (9,), (13, 21)))  # the frames' size, their number, their groups by time
QUESTION = "What is in the picture? 图里有什么？"
SEEN = 8  # the last positions, whose logits are kept whole


def numbers(name: str, shape: Sequence[int]) -> np.ndarray:
    """float64 of mean 0 and variance 1, uniform, by the name alone."""
    count = int(np.prod(shape))
    raw = np.random.Philox(key=zlib.crc32(name.encode())).random_raw(count)
    return (((raw >> np.uint64(11)).astype(np.float64) * 2.0**-53 - 0.5) * 12**0.5).reshape(tuple(shape))


def weight(name: str, shape: Sequence[int]) -> np.ndarray:
    """A parameter of the tiny checkpoints, float32: large enough that whatever is lost shows in the logits."""
    value = numbers(name, shape)
    if name.endswith("embedding.weight") or name in ("resampler.query", "llm.model.embed_tokens.weight"):
        value = 0.5 * value
    elif len(shape) == 1:
        value = 0.2 * value + float(name.endswith("weight"))
    else:
        value = value / np.prod(shape[1:]) ** 0.5
    return value.astype(np.float32)


def picture(name: str, *, number: int = 0) -> Image.Image:
    """A picture with shades, edges and noise."""
    width, height = SIZES[name]
    y, x = np.mgrid[0:height, 0:width]
    shade = np.stack([x * 255 // width, y * 255 // height, (x + 2 * y + 40 * number) % 256], axis=-1)
    noise = np.random.Philox(key=width * 10000 + height + number).random_raw(height * width).reshape(height, width, 1)
    edges = ((x // 37 + y // 23 + number) % 2)[..., None] * 60
    pixels = ((shade + edges + (noise >> np.uint64(59)).astype(np.int64)) % 256).astype(np.uint8)
    return Image.fromarray(pixels).convert("L" if name == "grey" else "RGB")


def checkpoint(version: str, folder: Path) -> None:
    """Write a tiny checkpoint's small files: config, preprocessor, tokenizer, and no code."""
    config: dict[str, Any] = {
        "architectures": ["MiniCPMV"],
        "model_type": "minicpmv",
        "auto_map": {
            "AutoConfig": "configuration_minicpm.MiniCPMVConfig",
            "AutoModel": "modeling_minicpmv.MiniCPMV",
            "AutoModelForCausalLM": "modeling_minicpmv.MiniCPMV",
        },
        "version": float(version),
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "vocab_size": 256 + len(SPECIAL),
        "bos_token_id": 256,
        "eos_token_id": 258,
        "torch_dtype": "float32",
        "drop_vision_last_layer": False,
        "batch_vision_input": True,
        "image_size": 448,
        "patch_size": 14,
        "query_num": 16,
        "slice_config": {"max_slice_nums": 9, "patch_size": 14, "model_type": "minicpmv"},
        "slice_mode": True,
        "vision_config": {
            "model_type": "idefics2" if version == "2.5" else "siglip",
            "hidden_size": 64,
            "image_size": 980,
            "intermediate_size": 96,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "patch_size": 14,
        },
    }
    pictures: dict[str, Any] = {
        "image_processor_type": "MiniCPMVImageProcessor",
        "processor_class": "MiniCPMVProcessor",
        "auto_map": {
            "AutoProcessor": "processing_minicpmv.MiniCPMVProcessor",
            "AutoImageProcessor": "image_processing_minicpmv.MiniCPMVImageProcessor",
        },
        "max_slice_nums": 9,
        "scale_resolution": 448,
        "patch_size": 14,
        "image_feature_size": 16,
        "norm_mean": [0.5, 0.5, 0.5],
        "norm_std": [0.5, 0.5, 0.5],
        "version": 2.5 if version == "2.5" else 2.6,
    }
    if version == "2.5":
        del config["version"]  # as first published
        config |= {"query_num": 24, "eos_token_id": 256 + SPECIAL.index("<|end_of_text|>")}
        pictures["image_feature_size"] = 24
    else:
        config["use_image_id"] = pictures["use_image_id"] = pictures["slice_mode"] = True
    if version == "4.5":
        config["batch_3d_resampler"] = True
    words = {
        "tokenizer_class": "MiniCPMVTokenizerFast",
        "auto_map": {"AutoTokenizer": ["tokenization_minicpmv_fast.MiniCPMVTokenizerFast", None]},
        "chat_template": HEADERS if version == "2.5" else CHATML,
        "bos_token": "<|begin_of_text|>" if version == "2.5" else "<|im_start|>",
        "eos_token": "<|end_of_text|>" if version == "2.5" else "<|im_end|>",
        "unk_token": "<unk>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }
    files = {
        "config.json": config,
        "preprocessor_config.json": pictures,
        "tokenizer_config.json": words,
        "tokenizer.json": tokenizer(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")


def tokenizer() -> Mapping[str, Any]:
    """tokenizer.json of a token a byte, and the special ones."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves
    others = [b for b in range(256) if b not in shown]
    letters = {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(others)}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": 256 + i, "content": t, **flags} for i, t in enumerate(SPECIAL)],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {letters[b]: b for b in range(256)},
            "merges": [],
        },
    }


def messages(case: str) -> list[dict[str, Any]]:
    """The conversation of a case, its pictures as places."""
    parts = [{"type": "image"} for _ in CASES[case]]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]}]
