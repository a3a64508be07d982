"""A checkpoint that transformers 5 wrote, as transformers 4 reads it: for the peers that stopped at 4.51.

Qwen2-VL and Qwen2.5-VL only: their decoder's settings stood at the top of config.json, the rotary ones under
rope_theta and rope_scaling, the image processor's in preprocessor_config.json. Weights are linked, not copied, and
their names are left as they are. Knows nothing of quantization. Standard library only.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FAMILIES = ("qwen2_vl", "qwen2_5_vl")
REWRITTEN = ("config.json", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


def readable(model: Path, scratch: Path) -> Path:
    """`model` itself where transformers 4 reads it, else `scratch`, filled with links to its files and an older config.

    ValueError for a family whose older form is not known here.
    """
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    if "rope_parameters" not in config.get("text_config", config):
        return model
    if config["model_type"] not in FAMILIES:
        raise ValueError(
            f"{model}: a {config['model_type']} checkpoint in the form of transformers 5, which transformers 4 cannot "
            f"read; the older form is known for {', '.join(FAMILIES)}"
        )
    for file in model.iterdir():
        if file.is_file() and file.name not in REWRITTEN:
            (scratch / file.name).symlink_to(file.resolve())
    _write(scratch / "config.json", older_config(config))
    processor = _read(model / "processor_config.json")
    if "image_processor" in processor:
        _write(scratch / "preprocessor_config.json", _older_pictures(processor))
    else:
        for name in ("processor_config.json", "preprocessor_config.json"):
            if (model / name).exists():
                (scratch / name).symlink_to((model / name).resolve())
    tokenizer = _read(model / "tokenizer_config.json")
    if tokenizer:
        _write(scratch / "tokenizer_config.json", _older_tokenizer(tokenizer))
    return scratch


def older_config(config: dict[str, Any]) -> dict[str, Any]:
    """config.json of transformers 5 -> that of transformers 4.45 to 4.51: one flat decoder beside `vision_config`."""
    text = dict(config.get("text_config", {}))
    rope = text.pop("rope_parameters")
    dtype = config.get("dtype") or text.get("dtype")
    dropped = ("model_type", "dtype", "layer_types")
    vision = {k: v for k, v in config["vision_config"].items() if k not in ("dtype", "rope_parameters")}
    return {
        **{k: v for k, v in text.items() if k not in dropped},
        **{k: v for k, v in config.items() if k not in ("text_config", "dtype", "rope_parameters")},
        "vision_config": vision,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        "torch_dtype": dtype,
    }


def _older_pictures(processor: dict[str, Any]) -> dict[str, Any]:
    pictures = dict(processor["image_processor"])
    size = pictures.pop("size")  # 4.51 overwrites `size` with its own default; these two it obeys
    return {
        **pictures,
        "min_pixels": size["shortest_edge"],
        "max_pixels": size["longest_edge"],
        "processor_class": processor["processor_class"],
    }


def _older_tokenizer(tokenizer: dict[str, Any]) -> dict[str, Any]:
    extra = tokenizer.get("extra_special_tokens")
    kept = {k: v for k, v in tokenizer.items() if k not in ("backend", "extra_special_tokens")}
    if isinstance(extra, list):  # 4.51 knows a mapping only
        kept["additional_special_tokens"] = extra
    elif extra:
        kept["extra_special_tokens"] = extra
    if kept.get("tokenizer_class") == "TokenizersBackend":
        kept["tokenizer_class"] = "Qwen2Tokenizer"
    return kept


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
