"""A packed folder as a transformers model: int4 weights restored to 16 bit, each when transformers' own loader asks.

So AWQ, GPTQ and compressed-tensors need no further package, and the model takes the memory of its 16-bit original.
Knows the formats by view.py alone; families, names and fused experts are transformers' business.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..quantize.classes import model_class
from ..quantize.source import Source
from .packing import LAYOUTS
from .view import packed_format, view


@dataclass(frozen=True)
class Lazy:
    """A tensor that is read, and restored, when it is indexed; transformers' loader asks a state dict for no more."""

    source: Source
    name: str
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.source.metas[self.name].shape)

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def __getitem__(self, index: Any) -> Tensor:
        return self.source.get(self.name)[index]


def load_model(folder: Path, **options: Any) -> Any:
    """The transformers model of a checkpoint's folder; AWQ, GPTQ and compressed-tensors restored, all else as
    transformers loads it. `options` as `from_pretrained`'s: `dtype`, `device_map`, `attn_implementation`. ValueError
    where parts of the model are not among the files' tensors; errors as `view`'s, and transformers' own."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    cls = model_class(config)._model_mapping[type(config)]
    if packed_format(config.to_dict()) not in LAYOUTS:
        return cls.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    text = config.get_text_config()
    for part in (config, text):
        if getattr(part, "quantization_config", None) is not None:
            delattr(part, "quantization_config")
    if options.get("dtype") in (None, "auto"):
        options["dtype"] = config.dtype or text.dtype or torch.bfloat16
    source = view(folder)
    state = {name: Lazy(source, name, meta.dtype or torch.uint8) for name, meta in source.metas.items()}
    model, found = cls.from_pretrained(None, config=config, state_dict=state, output_loading_info=True, **options)
    if made_up := sorted(found["missing_keys"]):
        raise ValueError(
            f"{folder}: transformers finds no weights for {made_up[0]} (of {len(made_up)}) under the files' names, and "
            "would make them up; serve it with --engine vllm"
        )
    if (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    model.config.name_or_path = model.name_or_path = str(folder)
    return model
