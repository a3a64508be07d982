"""Vision-language checkpoints of which transformers knows the text model only: calibrated on words.

Their vision parts are copied as they are; engines that have their class read them. What pictures do to the decoder's
activations is not seen: a recipe's `check` cannot show them either. Knows no tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .words import plain_tokenizer


@dataclass(frozen=True)
class Text:
    """Where a config.json keeps its text model's config ("" is the top), and its type ("" is what that config says)."""

    key: str = ""
    kind: str = ""


TEXTS = {
    "phi3_v": Text(kind="phi3"),
    "llava": Text(kind="llama"),  # as LLaVA's own code stored it, with Vicuna or Yi
    "llava_llama": Text(kind="llama"),
    "llava_mistral": Text(kind="mistral"),
    "llava_qwen": Text(kind="qwen2"),
    "ovis": Text("llm_config"),
    "multi_modality": Text("language_config"),  # DeepSeek-VL's own
}


def build(folder: Path, config: Mapping[str, Any], *, dtype: torch.dtype) -> tuple[Any, Any]:
    """Text model (weights not loaded) and tokenizer. ValueError where transformers lacks the text model too."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    where = TEXTS[config["model_type"]]
    text = dict(config[where.key] if where.key else config)
    kind = where.kind or text.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"the text model of {config['model_type']} is a {kind!r}, which transformers has no class for")
    drop = ("model_type", "auto_map", "architectures", "_name_or_path", "torch_dtype", "transformers_version")
    made = AutoConfig.for_model(str(kind), **{k: v for k, v in text.items() if k not in drop})
    return AutoModelForCausalLM.from_config(made, dtype=dtype), plain_tokenizer(folder)


def rules(model: Any) -> list[Any]:
    """The text model's own names, without what stands before them in the whole."""
    from transformers.core_model_loading import WeightRenaming

    return [WeightRenaming(r"^llm\.", ""), WeightRenaming(r"^language_model\.", "")]
