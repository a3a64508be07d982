"""A packed folder as a transformers model: int4 weights restored to 16 bit, each when transformers' own loader asks.

So AWQ, GPTQ and compressed-tensors need no further package. The model takes the memory of its 16-bit original, or of
its files, where it is told to keep them packed.
Knows the formats by view.py alone; families, names and fused experts are transformers' business.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..quantize.bnb import functional
from ..quantize.classes import model_class
from ..quantize.source import open_source
from .packed_weight import packed_weight
from .packing import LAYOUTS
from .view import on_grid, packed_format, packed_linears, view


@dataclass(frozen=True)
class Lazy:
    """A tensor that is made when it is indexed; transformers' loader asks a state dict for no more."""

    shape: torch.Size
    dtype: torch.dtype
    make: Callable[[], Tensor]

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def __getitem__(self, index: Any) -> Tensor:
        return self.make()[index] if index is not ... else self.make()


def tensors_of(folder: Path, format: str, *, packed: bool) -> dict[str, Lazy]:
    """A packed folder's tensors under the checkpoint's names, its linears restored to 16 bit or, if `packed`, as
    tensors that stay int4 in memory. Nothing is read yet."""
    source = view(folder)
    found = {
        name: Lazy(torch.Size(meta.shape), meta.dtype or torch.uint8, partial(source.get, name))
        for name, meta in source.metas.items()
    }
    if packed:
        raw = open_source(folder)

        def small(linear: str, dtype: torch.dtype) -> Tensor:
            return packed_weight(on_grid(linear, format, raw.get, raw.metas), dtype)

        for linear in packed_linears(raw.metas, format):
            whole = found[f"{linear}.weight"]
            found[f"{linear}.weight"] = replace(whole, make=partial(small, linear, whole.dtype))
    return found


def load_model(folder: Path, *, packed: bool = False, **options: Any) -> Any:
    """The transformers model of a checkpoint's folder; AWQ, GPTQ and compressed-tensors restored, or `packed` and
    restored anew at each use; all else as transformers loads it. `options` as `from_pretrained`'s: `dtype`,
    `device_map`, `attn_implementation`. ValueError where parts of the model are not among the files' tensors; errors
    as `view`'s, and transformers' own."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    cls = model_class(config)._model_mapping[type(config)]
    format = packed_format(config.to_dict())
    if format not in LAYOUTS:
        if format == "bnb":
            functional()  # imported first and in mmq's way, which runs no code from a hub
        return cls.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    text = config.get_text_config()
    for part in (config, text):
        if getattr(part, "quantization_config", None) is not None:
            delattr(part, "quantization_config")
    if options.get("dtype") in (None, "auto"):
        options["dtype"] = config.dtype or text.dtype or torch.bfloat16
    state = tensors_of(folder, format, packed=packed)
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
