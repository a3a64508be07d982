"""How many frames of a video an engine holds decoded at once, as far as that can be told before it looks.

Engines take frames in two ways, and which one is the model's matter, not told here: some, evenly spread over whatever
length (vLLM and LMDeploy: 32), or so many a second up to a number (vLLM for Qwen-VL: 2 and 768). The larger counts.
Taken from vLLM 0.32's and transformers' 5.19 sources and LMDeploy's (November 2026). Of those that take more by
themselves none is known here: GLM-4.6V (6 a second of the first 30), GLM-5 (2,048), Molmo2 (all).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

ENDLESS = 1 << 40
FEWEST = 4  # that Qwen-VL's loaders take of the shortest


@dataclass(frozen=True)
class Frames:
    """Frames of a video: `spread` of any length, no more than `slowed` a second; or `rate` a second, at most `most`."""

    spread: float = 32
    slowed: float = ENDLESS
    rate: float = 2
    most: float = 768


# engine -> what it takes unasked; transformers has models of which it takes all (Qwen2-VL, InternVL, LLaVA-OneVision)
TAKEN = {"vllm": Frames(), "lmdeploy": Frames(rate=0), "pytorch": Frames(spread=ENDLESS, rate=0)}


def asked(usual: Frames, said: Any) -> Frames:
    """What is taken where a request's `media_io_kwargs` for videos, or an engine's flag, say `said`; what is not of
    vLLM's words, or has no number, is left to the engine to refuse."""
    said = said if isinstance(said, Mapping) else {}
    fps, count, most = (_number(said.get(name)) for name in ("fps", "num_frames", "max_frames"))
    if usual.spread == ENDLESS:  # transformers knows one of the two, and no most
        count, most = (None, None) if fps else (count, None)
    if count is not None:
        usual = replace(usual, spread=count if count > 0 else ENDLESS)
    elif fps:
        usual = replace(usual, spread=ENDLESS)
    if fps and fps > 0:
        usual = replace(usual, slowed=fps, rate=fps if usual.rate else 0)
    return replace(usual, most=min(most, usual.most)) if most and most > 0 else usual


def taken(frames: Frames, total: float, fps: float) -> int:
    """How many of `total` frames, `fps` of them a second (0 where that is unknown)."""
    seconds = total / fps if fps > 0 else math.inf
    spread = min(frames.spread, frames.slowed * seconds)
    timed = min(frames.rate * seconds, frames.most) if frames.rate else 0
    return math.ceil(min(total, max(FEWEST, spread, timed)))


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return min(value, ENDLESS)
