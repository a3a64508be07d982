"""Families that transformers has no class for, in the PyTorch engine: mmq's own classes, all weights loaded.

`transformers serve` asks a processor and a model; these two are its face over a skeleton, by the same reading as
`mmq check`'s. Part of the engine's program: imports torch, and nothing of serve imports it but pytorch_engine.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from ..export.view import view
from ..quantize.inputs import encode, end_tokens
from ..quantize.skeleton import Skeleton, build, load
from ..recipes.samples import Sample


class Inputs(dict[str, Any]):
    """Tensors that are on the model's device already."""

    def to(self, device: Any) -> Inputs:
        return self


class OwnProcessor:
    """What `transformers serve` asks of a processor: a conversation with pictures as tensors, tokens as text."""

    def __init__(self, skeleton: Skeleton) -> None:
        self.skeleton = skeleton
        self.tokenizer = skeleton.words

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Inputs:
        """The prompt of one conversation; its pictures are data URLs. ValueError for what the family does not take."""
        if options.get("tools"):
            raise ValueError("of this family the pytorch engine takes no tools; --engine vllm may")
        images: list[Image.Image] = []
        said = []
        for message in messages:
            parts = [self._part(part, images) for part in message["content"]]
            words = "".join(part["text"] for part in parts if part["type"] == "text")
            pictures = any(part["type"] == "image" for part in parts)
            said.append({"role": message["role"], "content": parts if pictures else words})
        if images and not self.skeleton.sees:
            raise ValueError("of this model the words alone are served here; --engine vllm takes its pictures")
        sample, opened = Sample(messages=said, images=tuple(images)), options.get("add_generation_prompt", True)
        return Inputs(encode(self.skeleton, sample, prompt_only=opened))

    def _part(self, part: Mapping[str, Any], images: list[Image.Image]) -> dict[str, Any]:
        if part["type"] == "text":
            return {"type": "text", "text": part["text"]}
        if part["type"] != "image":
            raise ValueError("of this family the pytorch engine takes pictures and no video; send its frames as images")
        data = base64.b64decode(part["url"].partition(",")[2])
        images.append(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
        return {"type": "image"}

    def decode(self, ids: Any, **options: Any) -> str:
        """Tokens as text."""
        return self.tokenizer.decode(ids, **options)


def load_own(folder: Path, *, device: str, trust: bool = False) -> tuple[Any, OwnProcessor]:
    """The model of a checkpoint's folder and its processor, by mmq's own classes; float32 on a CPU. Errors as
    `build`'s."""
    skeleton = build(folder, source=view(folder), device=device, trust=trust)
    load(skeleton, skeleton.names)
    module = skeleton.module
    module.tie_weights()
    if module.generation_config.eos_token_id is None:
        module.generation_config.eos_token_id = sorted(end_tokens(skeleton))
    for name, value in (("device", skeleton.device), ("dtype", skeleton.dtype), ("name_or_path", str(folder))):
        if not hasattr(module, name):
            setattr(module, name, value)
    return module, OwnProcessor(skeleton)
