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
QWEN3_VIDEO_PIXELS = 32 * 32 * 768  # Qwen3VLVideoProcessor's default, over all frames
QWEN_ASPECT = 200  # a picture longer than this is refused by the processor
MINICPM_SIDE = 448  # pixels of a slice
MINICPM_TABLE = 70 * 70  # places that the resampler keeps a float32 position for (Resampler2_5, max_size)
MINICPM_FRAMES = 16  # _MAX_FRAMES_PER_VIDEO in vLLM's minicpmv.py
MINICPM_VIDEOS = ("2.6", "4.0", "4.5")  # the versions that vLLM serves videos of
OWN_ACTS = ("silu", "quick_gelu", "gelu_new", "gelu_fast")  # custom ops in model_executor/layers/activation.py
ENDLESS = 1 << 30  # InternVL's video has as many frames as the context holds
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
    step: int = 0  # tokens of one step in time of a video, 0 where videos are not served
    steps: int = 0  # that a video may have at most
    before: int = 0  # tokens of the context that a video leaves to pictures
    own_act: bool = False  # the activation is one of vLLM's own kernels, which has a plain form too
    resampled: int = 0  # the decoder's width, where each patch is brought to it before patches are pooled
    table: int = 0  # bytes of positions that the engine computes for itself
    side: int = 0  # pixels of the edge of what one token stands for, 0 where pixels cannot be set

    def video_tokens(self, context: int) -> int:
        """Tokens of the longest video that is profiled at this context: one step in time at least, 0 for no videos."""
        return self.step * max(1, min(self.steps, (context - self.before) // self.step)) if self.step else 0

    @property
    def per_token(self) -> float:
        """Patches that make one token."""
        return self.patches / self.tokens

    def at_pixels(self, pixels: int) -> Vision:
        """The same tower with pictures of at most `pixels`. ValueError where the family has no such setting."""
        if not self.side:
            raise ValueError("this family's pictures have a fixed size; max_pixels is for Qwen-VL")
        tokens = _most_tokens(pixels // self.side**2)
        step = tokens if self.step == self.tokens else self.step  # Qwen3-VL's videos have pixels of their own
        return replace(self, tokens=tokens, patches=int(tokens * self.per_token), step=step)


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
    step, steps = tokens, QWEN_FRAMES // temporal
    if str(config["model_type"]).lower() not in ("qwen2_vl", "qwen2_5_vl"):  # two frames that share all the pixels
        most = (_processor(folder, "video").get("size") or {}).get("longest_edge") or QWEN3_VIDEO_PIXELS
        step, steps = _most_tokens(int(most) // temporal // side**2), 1
    return Vision(
        hidden=hidden,
        inner=inner,
        gated=vision.get("hidden_act") == "silu",
        own_act=vision.get("hidden_act") in OWN_ACTS,
        heads=int(vision["num_heads"]),
        patch=3 * temporal * edge**2,
        patches=tokens * merge**2,
        tokens=tokens,
        outputs=1 + len(vision.get("deepstack_visual_indexes") or ()),
        step=step,
        steps=steps,
        side=side,
    )


def _minicpm(folder: Path, config: Mapping[str, Any], vision: Mapping[str, Any]) -> Vision:
    edge = int(vision["patch_size"])
    slices = int(config.get("max_slice_num") or _processor(folder).get("max_slice_nums") or 9) + 1  # and the whole
    query = int(config.get("query_num") or 64)
    found = _tower(vision, patches=slices * (MINICPM_SIDE // edge) ** 2, tokens=slices * query)
    if config.get("hidden_size") and str(config.get("model_type")).lower() != "minicpmv4_6":  # that one merges patches
        wide = int(config["hidden_size"])
        found = replace(found, resampled=wide, table=MINICPM_TABLE * wide * 4)
    if str(config.get("version")) not in MINICPM_VIDEOS:
        return found
    return replace(found, step=query, steps=MINICPM_FRAMES, before=found.tokens)


def _tiles(folder: Path, config: Mapping[str, Any], vision: Mapping[str, Any]) -> Vision:
    size, edge = (_first(vision[key]) for key in ("image_size", "patch_size"))
    most = config.get("max_dynamic_patch") or _processor(folder).get("max_patches") or 12
    tiles = int(most) + 1  # and the thumbnail
    patches = (int(config.get("force_image_size") or size) // edge) ** 2
    kept = float(config.get("downsample_ratio") or 0.5) ** 2
    tile = int(patches * kept)
    found = _tower(vision, patches=tiles * patches, tokens=tiles * tile)
    return replace(found, step=tile, steps=ENDLESS, before=found.tokens)


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
        own_act=vision.get("hidden_act") in OWN_ACTS,
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


def _processor(folder: Path, kind: str = "image") -> Mapping[str, Any]:
    """What the folder says of its picture (or video) processor, {} where nothing. OSError where it is not JSON."""
    own = "preprocessor_config.json" if kind == "image" else "video_preprocessor_config.json"
    for name in (own, "processor_config.json"):
        path = folder / name
        if path.is_file():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as e:
                raise OSError(f"{path}: not JSON: {e}") from None
            if found := (found if name == own else found.get(f"{kind}_processor")):
                return found
    return {}
