"""What one picture of the largest size costs: patches through the vision tower, tokens in the context.

The sizes are those that vLLM profiles with (`get_image_size_with_most_features` and `get_max_video_tokens` in its
model_executor/models: qwen2_vl.py, minicpmv.py, internvl.py, llava.py; read in 0.32). Knows config files, no engine's
memory; a family that is not in `KINDS` is told as unknown, not guessed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

QWEN_PIXELS = 28 * 28 * 1280  # Qwen2VLImageProcessor's own default, where no file says otherwise
QWEN_FRAMES = 14  # _MAX_FRAMES_PER_VIDEO in vLLM's qwen2_vl.py; two frames make one step in time
QWEN_ASPECT = 200  # a picture longer than this is refused by the processor
MINICPM_SIDE = 448  # pixels of a slice
KINDS = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), "qwen"),
    **dict.fromkeys(("minicpmv", "minicpmo", "minicpmv4_6"), "minicpm"),
    **dict.fromkeys(("internvl", "internvl_chat"), "tiles"),
    **dict.fromkeys(("llava", "gemma3", "paligemma"), "fixed"),
}


@dataclass(frozen=True)
class Vision:
    """A vision tower and its largest picture. `inner` is the MLP's width, counted twice where `gated`; `patch` the
    numbers in one patch of pixels; `outputs` how often each token's features are put out (deepstack)."""

    hidden: int
    inner: int
    gated: bool
    heads: int
    patch: int
    patches: int  # of the largest picture
    tokens: int  # that it takes in the context
    outputs: int = 1
    steps: int = 1  # in time that a video may have, each as large as the largest picture; 1: no video counted
    side: int = 0  # pixels of the edge of what one token stands for, 0 where pixels cannot be set

    def video_tokens(self, context: int) -> int:
        """Tokens of the longest video that is profiled at this context; one step in time at least."""
        return self.tokens * max(1, min(self.steps, context // self.tokens))

    @property
    def per_token(self) -> float:
        """Patches that make one token."""
        return self.patches / self.tokens

    def at_pixels(self, pixels: int) -> Vision:
        """The same tower with pictures of at most `pixels`. ValueError where the family has no such setting."""
        if not self.side:
            raise ValueError("this family's pictures have a fixed size; max_pixels is for Qwen-VL")
        tokens = _most_tokens(pixels // self.side**2)
        return replace(self, tokens=tokens, patches=int(tokens * self.per_token))


def read_vision(folder: Path, config: Mapping[str, Any]) -> Vision | None:
    """The tower of the checkpoint in `folder`; None where its family's pictures are not known here, or its config lacks
    a number that they need. OSError where a processor's file is not JSON."""
    kind = KINDS.get(str(config.get("model_type", "")).lower())
    vision = config.get("vision_config")
    if kind is None or not isinstance(vision, Mapping):
        return None
    try:
        return _READERS[kind](folder, config, vision)
    except (KeyError, TypeError, ZeroDivisionError):
        return None


def _qwen(folder: Path, config: Mapping[str, Any], vision: Mapping[str, Any]) -> Vision:
    hidden = int(vision.get("embed_dim") or vision["hidden_size"])  # Qwen2-VL's hidden_size is the decoder's
    inner = int(vision.get("intermediate_size") or hidden * float(vision["mlp_ratio"]))
    edge, merge = int(vision["patch_size"]), int(vision.get("spatial_merge_size", 2))
    side = edge * merge
    processor = _processor(folder)
    pixels = processor.get("max_pixels") or (processor.get("size") or {}).get("longest_edge") or QWEN_PIXELS
    tokens = _most_tokens(int(pixels) // side**2)
    temporal = int(vision.get("temporal_patch_size", 2))
    return Vision(
        hidden=hidden,
        inner=inner,
        gated=vision.get("hidden_act") == "silu",
        heads=int(vision["num_heads"]),
        patch=3 * temporal * edge**2,
        patches=tokens * merge**2,
        tokens=tokens,
        outputs=1 + len(vision.get("deepstack_visual_indexes") or ()),
        steps=QWEN_FRAMES // temporal,
        side=side,
    )


def _minicpm(folder: Path, config: Mapping[str, Any], vision: Mapping[str, Any]) -> Vision:
    edge = int(vision["patch_size"])
    slices = int(config.get("max_slice_num") or _processor(folder).get("max_slice_nums") or 9) + 1  # and the whole
    return _tower(
        vision, patches=slices * (MINICPM_SIDE // edge) ** 2, tokens=slices * int(config.get("query_num") or 64)
    )


def _tiles(folder: Path, config: Mapping[str, Any], vision: Mapping[str, Any]) -> Vision:
    size, edge = (_first(vision[key]) for key in ("image_size", "patch_size"))
    most = config.get("max_dynamic_patch") or _processor(folder).get("max_patches") or 12
    tiles = int(most) + 1  # and the thumbnail
    patches = (int(config.get("force_image_size") or size) // edge) ** 2
    kept = float(config.get("downsample_ratio") or 0.5) ** 2
    return _tower(vision, patches=tiles * patches, tokens=tiles * int(patches * kept))


def _fixed(folder: Path, config: Mapping[str, Any], vision: Mapping[str, Any]) -> Vision:
    size, edge = (_first(vision[key]) for key in ("image_size", "patch_size"))
    patches = (size // edge) ** 2
    return _tower(vision, patches=patches, tokens=int(config.get("mm_tokens_per_image") or patches))


_READERS = {"qwen": _qwen, "minicpm": _minicpm, "tiles": _tiles, "fixed": _fixed}


def _tower(vision: Mapping[str, Any], *, patches: int, tokens: int) -> Vision:
    return Vision(
        hidden=int(vision["hidden_size"]),
        inner=int(vision["intermediate_size"]),
        gated=False,
        heads=int(vision["num_attention_heads"]),
        patch=3 * _first(vision["patch_size"]) ** 2,
        patches=patches,
        tokens=tokens,
    )


def _first(value: Any) -> int:
    return int(value[0] if isinstance(value, list) else value)


def _most_tokens(most: int) -> int:
    """The largest number up to `most` that a picture no longer than `QWEN_ASPECT` can be cut into, as vLLM finds it."""
    for count in range(most, 0, -1):
        short = next(d for d in range(math.isqrt(count), 0, -1) if count % d == 0)
        if count // short <= QWEN_ASPECT * short:
            return count
    raise ValueError("the largest picture is smaller than one token; give more pixels")


def _processor(folder: Path) -> Mapping[str, Any]:
    """What the folder says of its picture processor, {} where it says nothing. OSError where it is not JSON."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = folder / name
        if path.is_file():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as e:
                raise OSError(f"{path}: not JSON: {e}") from None
            if found := (found if name.startswith("pre") else found.get("image_processor")):
                return found
    return {}
