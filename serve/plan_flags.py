"""vLLM's flags for a plan, each with its reason; and what a user's own flags ask of the plan. Knows no arithmetic."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from .bill import Ask, Model
from .flags import Flag, given, number, settings, switched
from .machine import Gpu
from .parallel import size_flags
from .shape import context_length


def flags_of(
    model: Model, ask: Ask, card: Gpu, *, context: int, share: tuple[float, str], image_tokens: int
) -> tuple[Flag, ...]:
    """The engine's flags, each with its reason."""
    top = context_length(model.config)
    if ask.context is not None:
        why = "you asked for it"
    elif context == top:
        why = "the model's whole context fits"
    else:
        why = f"of {top} tokens this many fit beside the weights"
    if ask.context is None and ask.concurrency:
        why += f", {ask.concurrency} times"
    flags = [Flag("--max-model-len", str(context), why)]
    flags.append(Flag("--gpu-memory-utilization", f"{share[0]:.2f}", share[1]))
    if ask.abreast:
        why = "you asked for it; fewer than vLLM's own make sampling and CUDA graphs smaller"
        why += f"; {ask.concurrency} over {ask.dp} replicas" if ask.dp > 1 else ""
        flags.append(Flag("--max-num-seqs", str(ask.abreast), why))
    if ask.eager:
        flags.append(Flag("--enforce-eager", None, "you asked for it: the memory of CUDA graphs is the cache's"))
    if ask.kv_dtype != "auto":
        flags.append(Flag("--kv-cache-dtype", ask.kv_dtype, "half the bytes a token; costs accuracy, so check it"))
    flags += size_flags(ask.tp, ask.pp, ask.dp)
    if ask.pixels is not None and model.vision is not None:
        value = json.dumps({"max_pixels": ask.pixels}, separators=(",", ":"))
        flags.append(Flag("--mm-processor-kwargs", value, f"a picture takes {image_tokens} tokens at most"))
    if model.shape.vision:
        flags.append(picture_limit(model, ask))
    if card.capability < 8.0 and model.shape.dtype != "float16":
        why = f"{card.name} (compute capability {card.capability}) has no bfloat16"
        flags.append(Flag("--dtype", "float16", why))
    return tuple(flags)


def picture_limit(model: Model, ask: Ask) -> Flag:
    """How many pictures a request may hold; videos are shut out where they are not wanted, for what they would take."""
    limit, why = {"image": ask.pictures}, f"up to {ask.pictures} pictures in one request"
    if not ask.videos and model.vision is not None and model.vision.step:
        limit["video"] = 0
        why += "; no video, for which vLLM would keep memory free"
    return Flag("--limit-mm-per-prompt", json.dumps(limit, separators=(",", ":")), why)


def asked_in(extra: Sequence[str], *, context: int | None) -> Ask:
    """What the engine's flags in `extra` ask of the plan; `context` where they say nothing of it."""
    length = _whole(extra, "--max-model-len")
    wanted: dict[str, Any] = {"context": context if length in (None, -1) else length}  # -1: the engine's own choice
    if limit := settings(extra, "--limit-mm-per-prompt"):
        images, videos = (_count(limit.get(kind)) for kind in ("image", "video"))
        wanted |= {"images": images, "video": videos != 0}
    pixels = settings(extra, "--mm-processor-kwargs").get("max_pixels")
    compiling = settings(extra, "--compilation-config", "-cc")
    level = _level(extra)
    if isinstance(compiling.get("cudagraph_mode"), str):
        wanted["graphs"] = compiling["cudagraph_mode"].upper()
    elif level == "1":
        wanted["graphs"] = "PIECEWISE"
    return Ask(
        sequences=_whole(extra, "--max-num-seqs"),
        tp=_whole(extra, "--tensor-parallel-size", "-tp") or 1,
        pp=_whole(extra, "--pipeline-parallel-size", "-pp") or 1,
        dp=_whole(extra, "--data-parallel-size", "-dp") or 1,
        kv_dtype="fp8" if (given(extra, "--kv-cache-dtype") or "").startswith("fp8") else "auto",
        pixels=pixels if isinstance(pixels, int) else None,
        share=number(extra, "--gpu-memory-utilization"),
        batched=_whole(extra, "--max-num-batched-tokens"),
        eager=switched(extra, "--enforce-eager") or level == "0",
        compiled=compiling.get("mode") not in (0, "NONE"),
        **wanted,
    )


def _whole(extra: Sequence[str], *names: str) -> int | None:
    found = number(extra, *names)
    return None if found is None else int(found)


def _level(extra: Sequence[str]) -> str | None:
    """vLLM's -O1, -O=1, -O 1 or --optimization-level 1, as "1"."""
    joined = [word[-1] for word in extra if re.fullmatch(r"-O=?\d", word)]
    return joined[-1] if joined else given(extra, "--optimization-level", "-O")


def _count(limit: Any) -> int | None:
    """Of a kind of media in one request: a number, or vLLM's {"count": ..., "width": ..., "height": ...}."""
    found = limit.get("count") if isinstance(limit, dict) else limit
    return found if isinstance(found, int) else None
